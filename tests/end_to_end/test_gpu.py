"""On a CUDA device: the demo over HTTP, and the engine's results against the CPU's and transformers'.

Run by hand (`nox -s gpu`); CI has no GPU. A greedy answer may differ from the CPU's only from a token on at
which the CPU's two best logits lie within `TIE`: bf16 keeps 8 bits of a logit, and the two devices sum in
another order, so that nearer candidates than that are a tie.
"""

from __future__ import annotations

import asyncio
import functools
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from pymllm_core import LLM, SamplingParams

pytestmark = pytest.mark.gpu

TIE = 0.25
PROMPTS = [
    "你好,只回复:ok",
    "Hello!",
    "Reply only: blue whale 42",
    "只回复:苹果树",
    "What is 37 + 48?",
    "What is 91 - 25?",
    "Reverse the word: planet",
    "What is the capital of France?",
    "法国的首都是哪里?",
    "Which day comes after Monday?",
    "Repeat three times: moon",
    "How many letters are in: banana",
    "Give me JSON with keys name and age for Tom, 12",
    "Who are you?",
    "Thank you!",
    "What comes after March?",
]
LONG = "Repeat after me: " + " ".join(f"word{n}" for n in range(120))


def chat(prompt: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": prompt}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The demo on the GPU with PyTorch attention."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("gpu") / "log"
    command = (
        f"{sys.executable} -m pymllm.server.launch --server.model_path demo --server.device cuda "
        f"--server.attention_backend pytorch --server.port {port} --server.mem_fraction_static 0.1"
    )
    with log.open("wb") as output:
        process = subprocess.Popen(
            command.split(), cwd=log.parent, env=dict(os.environ), stdout=output, stderr=output
        )
    url = f"http://127.0.0.1:{port}"
    start = time.monotonic()
    while True:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() - start < 240, log.read_text()
        try:
            if httpx.get(f"{url}/health", trust_env=False).status_code == 200:
                break
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    print(f"ready after {time.monotonic() - start:.1f} s")
    yield url
    process.terminate()
    assert process.wait(timeout=30) == 0, log.read_text()


@functools.cache
def answers_on_cpu(model: str) -> list[Any]:
    """Greedy answers on the CPU by PyTorch's attention, with the two best candidates of each token."""
    with LLM(model, device="cpu", dtype="bfloat16", attention_backend="pytorch") as llm:
        params = SamplingParams(max_tokens=48, temperature=0.0, logprobs=2)
        return llm.chat([chat(p) for p in [*PROMPTS, LONG]], params)


@pytest.fixture(scope="module")
def on_cpu() -> list[Any]:
    """The reference."""
    return answers_on_cpu("demo")


def assert_same_but_for_ties(tokens: tuple[int, ...], reference: Any) -> None:
    for index, (got, expected) in enumerate(zip(tokens, reference.token_ids, strict=False)):
        if got != expected:
            (_, best), (second_id, second) = reference.logprobs[index].top
            print(f"tie at token {index}: {expected} or {second_id}, {best - second:.3f} apart")
            assert best - second < TIE, f"token {index}: {got}, expected {expected}"
            return
    assert len(tokens) == len(reference.token_ids)


def test_http_greedy_answers_equal_the_cpus(server: str, on_cpu: list[Any]) -> None:
    async def ask(client: httpx.AsyncClient, prompt: str) -> dict[str, Any]:
        body = {
            "model": "default",
            "messages": chat(prompt),
            "max_tokens": 48,
            "temperature": 0.0,
            "logprobs": True,
        }
        answer = await client.post(f"{server}/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()["choices"][0]
        return found

    async def ask_all() -> list[dict[str, Any]]:
        async with httpx.AsyncClient(trust_env=False, timeout=120) as client:
            return await asyncio.gather(*(ask(client, p) for p in [*PROMPTS, LONG]))

    answers = asyncio.run(ask_all())
    assert answers[0]["message"]["content"] == "ok"
    same = 0
    with LLM("demo", device="cpu", max_total_tokens=4096) as llm:
        for answer, reference in zip(answers, on_cpu, strict=True):
            text = "".join(entry["token"] for entry in answer["logprobs"]["content"])
            expected = "".join(llm.processor.token_text(t) for t in reference.token_ids)
            if text == expected:
                same += 1
                continue
            # From the first difference on, only a tie excuses it.
            tokens = [entry["token"] for entry in answer["logprobs"]["content"]]
            texts = [llm.processor.token_text(t) for t in reference.token_ids]
            index = next(i for i, (a, b) in enumerate(zip(tokens, texts, strict=False)) if a != b)
            (_, best), (_, second) = reference.logprobs[index].top
            print(f"tie at token {index} of {expected!r}: {best - second:.3f} apart")
            assert best - second < TIE, f"{text!r}, expected {expected!r}"
    print(f"{same} of {len(answers)} answers equal to the CPU's")


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("radix", [False, True])
def test_overlap_and_radix_do_not_change_answers(on_cpu: list[Any], overlap: bool, radix: bool) -> None:
    from pymllm_core.config import Settings
    from pymllm_core.engine.build import assemble, build_engine

    settings = Settings.of(
        "demo", device="cuda", attention_backend="pytorch", disable_radix_cache=not radix,
        mem_fraction_static=0.1, max_prefill_tokens=64, radix_cache_page_size=4,
    )  # fmt: skip
    engine = build_engine(assemble(settings), overlap=overlap)
    params = SamplingParams(max_tokens=48, temperature=0.0)
    for _ in range(2):  # the second time with a full prefix cache
        for index, prompt in enumerate([*PROMPTS, LONG]):
            engine.add(engine.processor.from_chat(chat(prompt), params, request_id=str(index)).request)
        tokens: dict[str, tuple[int, ...]] = {}
        while engine.has_work:
            for delta in engine.step():
                tokens[delta.request_id] = tokens.get(delta.request_id, ()) + delta.token_ids
        for index, reference in enumerate(on_cpu):
            assert_same_but_for_ties(tokens[str(index)], reference)


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "eager"])
@pytest.mark.parametrize("backend", ["flashinfer", "triton"])
@pytest.mark.parametrize("model", ["demo", "demo-w8a8", "demo-w4a16"])
def test_answers_of_all_backends(model: str, backend: str, graphs: bool) -> None:
    """All prompts at once, so that batches shrink through the sizes of the graphs; then sampled ones."""
    on_cpu = answers_on_cpu(model)
    with LLM(
        model,
        device="cuda",
        attention_backend=backend,
        disable_cuda_graph=not graphs,
        mem_fraction_static=0.1,
        max_running_requests=20,
        max_prefill_tokens=256,
    ) as llm:
        params = SamplingParams(max_tokens=48, temperature=0.0)
        for _ in range(2):
            answers = llm.chat([chat(p) for p in [*PROMPTS, LONG]], params)
            for answer, reference in zip(answers, on_cpu, strict=True):
                assert_same_but_for_ties(answer.token_ids, reference)
        for seed in range(3):
            sampled = SamplingParams(max_tokens=16, temperature=0.8, top_p=0.9, seed=seed)
            # The same tokens again; and among greedy ones, whose answers it must not touch.
            alone = llm.chat(chat(PROMPTS[1]), sampled)
            mixed = llm.chat([chat(p) for p in PROMPTS[:3]], [params, sampled, params])
            assert alone.token_ids == llm.chat(chat(PROMPTS[1]), sampled).token_ids
            assert mixed[1].finish_reason is not None
            assert_same_but_for_ties(mixed[0].token_ids, on_cpu[0])
            assert_same_but_for_ties(mixed[2].token_ids, on_cpu[2])


def test_seeded_sampling_and_penalties_run_on_the_device() -> None:
    params = SamplingParams(
        max_tokens=32, temperature=0.9, top_p=0.9, top_k=50, min_p=0.01, seed=7,
        repetition_penalty=1.1, frequency_penalty=0.2, presence_penalty=0.1, logit_bias={5: 1.0}, logprobs=3,
    )  # fmt: skip
    with LLM("demo", device="cuda", attention_backend="pytorch", mem_fraction_static=0.1) as llm:
        alone = llm.chat(chat(PROMPTS[1]), params)
        again = llm.chat(chat(PROMPTS[1]), params)
        assert alone.token_ids == again.token_ids
        assert alone.logprobs is not None
        assert all(len(entry.top) == 3 for entry in alone.logprobs)


def test_float32_logits_equal_transformers(tmp_path: Path) -> None:
    """Greedy tokens of a random float32 model for 64 steps, against transformers on the CPU."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from pymllm_core.testing.checkpoints import randomise, save

    config = Qwen3Config(
        vocab_size=320, hidden_size=96, intermediate_size=160, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=512, tie_word_embeddings=True, eos_token_id=0,
    )  # fmt: skip
    model = randomise(Qwen3ForCausalLM(config), std=0.15, seed=3)
    save(model, tmp_path)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(1, 320, (n,), generator=generator).tolist() for n in (1, 7, 33, 100, 129)]
    with LLM(
        str(tmp_path), device="cuda", dtype="float32", mem_fraction_static=0.1, max_prefill_tokens=48
    ) as llm:
        params = SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True, logprobs=1)
        answers = llm.generate(prompts, params)
    for prompt, answer in zip(prompts, answers, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + list(answer.token_ids)])).logits[0].float().log_softmax(-1)
        at = len(prompt) - 1
        expected = logits[at : at + 64]
        assert tuple(expected.argmax(-1).tolist()) == answer.token_ids
        assert answer.logprobs is not None
        got = torch.tensor([entry.logprob for entry in answer.logprobs])
        # Float32 sums in another order on another device; TF32 is off by default in torch.
        assert torch.allclose(got, expected.max(-1).values, atol=1e-3)
