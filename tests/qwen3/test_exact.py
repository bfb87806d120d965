"""Qwen3 against transformers: logits of every position, however a sequence is cut, and greedy tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from pymllm_core.request import Request
from pymllm_core.testing.checkpoints import randomise, save
from pymllm_core.testing.engines import LogitsRecorder, check_idle, complete, greedy, make_engine, run

QWEN3 = "pymllm_qwen3.plugin"
VOCAB = 293  # odd, and no multiple of anything
TOLERANCE = 1e-4

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "group-1": {"num_attention_heads": 3, "num_key_value_heads": 3},
    "group-8": {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 8},
    "odd-heads": {"num_attention_heads": 15, "num_key_value_heads": 5, "head_dim": 6, "hidden_size": 50},
    "odd-group": {"num_attention_heads": 7, "num_key_value_heads": 1, "head_dim": 10, "hidden_size": 34},
    "bias": {"attention_bias": True, "num_attention_heads": 6, "num_key_value_heads": 2},
    "yarn": {"rope_parameters": YARN, "max_position_embeddings": 128},
    "yarn-tied-bias": {
        "rope_parameters": {
            **YARN,
            "factor": 2.5,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "attention_factor": 1.3,
        },
        "tie_word_embeddings": True,
        "attention_bias": True,
    },
    "linear-rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 3.0}},
    "one-layer-wide-heads": {"num_hidden_layers": 1, "head_dim": 64, "hidden_size": 24},
}


def reference(seed: int = 0, **fields: Any) -> Any:
    """A random Qwen3 of transformers."""
    config = {
        "vocab_size": VOCAB,
        "hidden_size": 40,
        "intermediate_size": 56,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "max_position_embeddings": 256,
        "eos_token_id": 2,
        **fields,
    }
    return randomise(Qwen3ForCausalLM(Qwen3Config(**config)), std=0.15, seed=seed)


def expected_logits(model: Any, tokens: tuple[int, ...]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([tokens])).logits[0].float()
    return logits


def prompts_of(lengths: list[int], seed: int = 0, vocab: int = VOCAB) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocab, (n,), generator=generator).tolist() for n in lengths]


@pytest.fixture(scope="module", params=CONFIGS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    model = reference(seed=len(request.param), **CONFIGS[request.param])
    folder = tmp_path_factory.mktemp(request.param)
    save(model, folder)
    return model, folder


CUTS: dict[str, dict[str, Any]] = {
    "whole": {},
    "chunked": {"max_prefill_tokens": 7, "chunked_prefill_size": 5},
    "token-by-token": {"chunked_prefill_size": 1, "max_prefill_tokens": 2},
    "pages-of-one": {"radix_cache_page_size": 1, "max_prefill_tokens": 11},
}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("radix", [True, False], ids=["radix", "chunk"])
def test_logits_at_every_position(checkpoint: tuple[Any, Path], cut: str, radix: bool) -> None:
    model, folder = checkpoint
    settings = {"radix_cache_page_size": 4, "disable_radix_cache": not radix, **CUTS[cut]}
    engine = make_engine(folder, QWEN3, **settings)
    recorder = LogitsRecorder(engine)
    prompts = prompts_of([1, 4, 23, 37])
    first = complete(engine, prompts, greedy(9))
    # Again, longer, from what the first round left behind: a shared beginning and an own end.
    longer = [
        [*p, *c.token_ids[:6], *e] for p, c, e in zip(prompts, first, prompts_of([3] * 4, 9), strict=True)
    ]
    requests = [Request(f"again {i}", tuple(p), greedy(5)) for i, p in enumerate(longer)]
    second = run(engine, requests)
    check_idle(engine)
    for index, (prompt, answer) in enumerate(zip(prompts, first, strict=True)):
        whole = (*prompt, *answer.token_ids)[:-1]  # the last token is never put in
        logits = expected_logits(model, whole)
        assert recorder.computed[str(index)][0][0] == 0
        assert recorder.compare(str(index), logits) < TOLERANCE
        assert answer.token_ids == tuple(logits[len(prompt) - 1 :].argmax(-1).tolist())
    for request in requests:
        answer = second[request.id]
        logits = expected_logits(model, (*request.token_ids, *answer.token_ids)[:-1])
        assert recorder.compare(request.id, logits) < TOLERANCE
        assert answer.usage.cached_tokens == recorder.computed[request.id][0][0]
        # All whole pages that the first round computed of what both share.
        page = engine.scheduler.pool.page_size
        shared = len(request.token_ids) - 3
        assert answer.usage.cached_tokens == (shared // page * page if radix else 0)


def test_greedy_tokens_of_20_prompts_for_64_steps(tmp_path: Path) -> None:
    model = reference(seed=5)
    save(model, tmp_path)
    engine = make_engine(tmp_path, QWEN3, max_prefill_tokens=33, radix_cache_page_size=8)
    prompts = prompts_of([1 + 2 * (i % 10) for i in range(20)], seed=3)
    answers = complete(engine, prompts, greedy(64))
    for prompt, answer in zip(prompts, answers, strict=True):
        with torch.no_grad():
            tokens = model.generate(
                torch.tensor([prompt]), max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0
            )
        assert answer.token_ids == tuple(tokens[0, len(prompt) :].tolist())
        assert answer.finish_reason == "length"
    assert len({token for answer in answers for token in answer.token_ids}) > 100, (
        "too uniform to show anything"
    )


def test_eos_of_the_config_ends_an_answer(tmp_path: Path) -> None:
    model = reference(seed=5)
    save(model, tmp_path)
    (tmp_path / "generation_config.json").unlink()  # it has an eos of its own
    engine = make_engine(tmp_path, QWEN3)
    (prompt,) = prompts_of([11])
    free = complete(engine, [prompt], greedy(40))[0].token_ids
    eos = next(token for token in free[10:] if free.index(token) >= 10)
    save(model, tmp_path, eos_token_id=[VOCAB - 1, eos])
    (tmp_path / "generation_config.json").unlink()
    ended = complete(make_engine(tmp_path, QWEN3), [prompt], greedy(40, ignore_eos=False))[0]
    assert ended.token_ids == free[: free.index(eos) + 1]
    assert (ended.finish_reason, ended.matched_stop) == ("stop", None)


def test_bf16_rounds_no_worse_than_transformers(tmp_path: Path) -> None:
    """Both implementations round to 8 bits after each operation, in another order here and there.

    So neither can be expected to meet the other, but both stay within the same distance of the float32
    logits: the mean error must be that of transformers within a quarter, the largest within a factor 2.
    """
    model = reference(seed=7, num_hidden_layers=4, hidden_size=64, head_dim=16, num_attention_heads=8)
    rounded: Any = Qwen3ForCausalLM(model.config)
    rounded.bfloat16().eval()
    rounded.load_state_dict(model.state_dict())
    # The rounding of the weights themselves is common to all three.
    exact: Any = Qwen3ForCausalLM(model.config)
    exact.float().eval()
    exact.load_state_dict({name: value.bfloat16().float() for name, value in model.state_dict().items()})
    save(rounded, tmp_path)
    engine = make_engine(tmp_path, QWEN3, dtype="bfloat16", max_prefill_tokens=16)
    recorder = LogitsRecorder(engine)
    prompts = prompts_of([5, 29, 61, 90], seed=1)
    answers = complete(engine, prompts, greedy(20))
    ours, theirs, largest_ours, largest_theirs = 0.0, 0.0, 0.0, 0.0
    for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        whole = (*prompt, *answer.token_ids)[:-1]
        reference_logits = expected_logits(exact, whole)
        rows = torch.cat([rows for _, rows in recorder.computed[str(index)]])
        their_error = (expected_logits(rounded, whole) - reference_logits).abs()
        our_error = (rows - reference_logits).abs()
        ours, theirs = ours + float(our_error.mean()), theirs + float(their_error.mean())
        largest_ours = max(largest_ours, float(our_error.max()))
        largest_theirs = max(largest_theirs, float(their_error.max()))
    assert 0 < ours < 1.25 * theirs
    assert largest_ours < 2 * largest_theirs
