"""Qwen3 end to end on a CPU: sampled answers against transformers' own logits processors, and preemption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    Qwen3Config,
    Qwen3ForCausalLM,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pymllm_core import SamplingParams
from pymllm_core.engine.sampler import uniform
from pymllm_core.testing.checkpoints import randomise, save
from pymllm_core.testing.engines import check_idle, complete, greedy, make_engine

QWEN3 = "pymllm_qwen3.plugin"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    config = Qwen3Config(
        vocab_size=257,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        attention_bias=True,
    )
    model = randomise(Qwen3ForCausalLM(config), std=0.12, seed=3)
    folder = tmp_path_factory.mktemp("qwen3")
    save(model, folder)
    return model, folder


CASES: dict[str, tuple[dict[str, Any], list[Any]]] = {
    "temperature": ({"temperature": 0.8}, [TemperatureLogitsWarper(0.8)]),
    "top-k": ({"temperature": 1.3, "top_k": 12}, [TemperatureLogitsWarper(1.3), TopKLogitsWarper(12)]),
    "top-p": ({"temperature": 1.3, "top_p": 0.8}, [TemperatureLogitsWarper(1.3), TopPLogitsWarper(0.8)]),
    "min-p": ({"temperature": 1.3, "min_p": 0.15}, [TemperatureLogitsWarper(1.3), MinPLogitsWarper(0.15)]),
    "qwen3": (
        {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
        [TemperatureLogitsWarper(0.6), TopKLogitsWarper(20), TopPLogitsWarper(0.95)],
    ),
    "repetition": (
        {"temperature": 1.0, "top_k": 30, "repetition_penalty": 1.4},
        [RepetitionPenaltyLogitsProcessor(1.4), TopKLogitsWarper(30)],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_each_token_is_the_one_that_its_number_picks(checkpoint: tuple[Any, Path], case: str) -> None:
    """transformers' processors give the distribution, `uniform` the number; the token follows from both.

    Filtered rows are sorted by probability, unfiltered ones stay in the order of the vocabulary.
    """
    model, folder = checkpoint
    fields, processors = CASES[case]
    prompt = list(range(20, 50))
    params = SamplingParams(max_tokens=40, seed=77, ignore_eos=True, **fields)
    (answer,) = complete(make_engine(folder, QWEN3), [prompt], params)
    whole: Any = torch.tensor([[*prompt, *answer.token_ids]])
    with torch.no_grad():
        logits = model(whole).logits[0]
    for index, token in enumerate(answer.token_ids):
        end = len(prompt) + index
        row = LogitsProcessorList(processors)(whole[:, :end], logits[end - 1][None].clone())[0]
        probabilities = row.double().softmax(-1)
        order = torch.arange(257)
        if fields.keys() & {"top_k", "top_p"}:
            order = probabilities.argsort(descending=True, stable=True)
        cumulative = probabilities[order].cumsum(0)
        number = uniform(77, index)
        picked = int(torch.searchsorted(cumulative, number * cumulative[-1], right=True))
        distance = float((cumulative - number).abs().min())
        assert int(order[picked]) == token or distance < 1e-5


def test_preempted_answers_are_the_same(checkpoint: tuple[Any, Path]) -> None:
    _, folder = checkpoint
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 257, (n,), generator=generator).tolist() for n in (30, 12, 25, 7, 19, 3)]
    params = [
        greedy(30) if i % 2 else SamplingParams(max_tokens=30, seed=i, ignore_eos=True) for i in range(6)
    ]
    wanted = complete(make_engine(folder, QWEN3), prompts, params)
    for overlap in (False, True):
        tiny = make_engine(
            folder,
            QWEN3,
            overlap=overlap,
            max_total_tokens=72,
            radix_cache_page_size=4,
            max_prefill_tokens=16,
            schedule_conservativeness=0.01,
        )
        found = complete(tiny, prompts, params)
        assert tiny.stats().preemptions > 2
        assert [a.token_ids for a in found] == [a.token_ids for a in wanted]
        check_idle(tiny)
