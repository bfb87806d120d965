"""On a CUDA device: the engine's results against the CPU's and transformers', and the demo over HTTP.

Run by hand (`nox -s gpu`); CI has no GPU. What may differ from the CPU's answers says `greedy_reference`; that
the comparison can fail is shown by `test_greedy_reference`, on the CPU. FlashInfer has `test_gpu_flashinfer`.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_answers import FORMATS, GRAPHS, check_answers
from greedy_reference import MAX_TOKENS, QUESTIONS, chat, greedy, reference

from pymllm_core import LLM, SamplingParams
from pymllm_core.config import Settings
from pymllm_core.engine.build import assemble, build_engine
from pymllm_core.engine.inputs import on_device
from pymllm_core.testing.engines import complete

pytestmark = pytest.mark.gpu


@FORMATS
@GRAPHS
@pytest.mark.parametrize("backend", ["triton", "cuda", "pytorch"])
def test_answers(model: str, backend: str, graphs: bool) -> None:
    """`cuda` compiles its decode kernel at its first use, for which it needs nvcc."""
    check_answers(model, backend, graphs)


@pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlap"])
@pytest.mark.parametrize("radix", [False, True], ids=["chunk", "radix"])
def test_schedules_do_not_change_answers(overlap: bool, radix: bool) -> None:
    """Prompts in pieces, small pages, fewer places than prompts; the second time with a full prefix cache."""
    settings = Settings.of(
        "demo", device="cuda", attention_backend="triton", disable_radix_cache=not radix, mem_fraction_static=0.1,
        max_prefill_tokens=64, radix_cache_page_size=4, max_running_requests=6,
    )  # fmt: skip
    engine = build_engine(assemble(settings), overlap=overlap)
    found = reference("demo")
    for _ in range(2):
        found.check([one.token_ids for one in complete(engine, found.prompts, greedy())])
    assert (engine.stats().cache_hit_tokens > 0) == radix


def fetch(url: str, body: object = None) -> bytes:
    """GET, or POST of `body` as JSON, past any proxy."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=120) as answer:
        return bytes(answer.read())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The demo on the GPU, as it runs by default."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("gpu") / "log"
    command = (
        f"{sys.executable} -m pymllm.server.launch --server.model_path demo --server.device cuda "
        f"--server.port {port} --server.mem_fraction_static 0.1 --server.max_running_requests 20"
    )
    with log.open("wb") as output:
        process = subprocess.Popen(
            command.split(), cwd=log.parent, env=dict(os.environ), stdout=output, stderr=output
        )
    url = f"http://127.0.0.1:{port}"
    start = time.monotonic()
    try:
        while True:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() - start < 240, log.read_text()
            try:
                fetch(f"{url}/health")
                break
            except (urllib.error.URLError, ConnectionError):
                pass
            time.sleep(0.1)
        print(f"healthy after {time.monotonic() - start:.1f} s")
        yield url
    finally:
        process.terminate()
        try:
            code = process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    assert code == 0, log.read_text()


def test_answers_over_http(server: str) -> None:
    found = reference("demo")
    question = {"model": "default", "messages": chat(QUESTIONS[0]), "max_tokens": 8, "temperature": 0.0}
    reply: Any = json.loads(fetch(f"{server}/v1/chat/completions", question))
    assert reply["choices"][0]["message"]["content"] == "ok"
    params = {"max_new_tokens": MAX_TOKENS, "temperature": 0.0, "ignore_eos": True}
    bodies = [{"input_ids": prompt, "sampling_params": params} for prompt in found.prompts]
    with ThreadPoolExecutor(len(bodies)) as pool:
        answers = [
            json.loads(text) for text in pool.map(lambda body: fetch(f"{server}/generate", body), bodies)
        ]
    found.check([answer["output_token_ids"] for answer in answers])


def test_seeded_sampling_and_penalties_run_on_the_device() -> None:
    params = SamplingParams(
        max_tokens=32, temperature=0.9, top_p=0.9, top_k=50, min_p=0.01, seed=7,
        repetition_penalty=1.1, frequency_penalty=0.2, presence_penalty=0.1, logit_bias={5: 1.0}, logprobs=3,
    )  # fmt: skip
    with LLM("demo", device="cuda", attention_backend="pytorch", mem_fraction_static=0.1) as llm:
        alone = llm.chat(chat(QUESTIONS[1]), params)
        again = llm.chat(chat(QUESTIONS[1]), params)
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


def test_numbers_are_sent_without_waiting_for_the_device() -> None:
    """Else a step could not be launched while the one before it runs."""
    device = torch.device("cuda")
    on_device([0], device)  # pinned memory is there
    torch.cuda.synchronize()
    begin = time.perf_counter()
    torch.cuda._sleep(1 << 29)  # clocks: about a third of a second
    sent = [on_device([step, 7 - step], device, torch.float32) for step in range(50)]
    asked = time.perf_counter() - begin
    torch.cuda.synchronize()
    assert asked < (time.perf_counter() - begin) / 2
    assert [numbers.tolist() for numbers in sent] == [[step, 7 - step] for step in range(50)]
