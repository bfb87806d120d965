"""Qwen3 with routed experts against transformers: logits of every position, greedy tokens, preemption, bf16."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from pymllm_core.bench.cost import ModelCost
from pymllm_core.builtin.torch_kernels import TorchLinear
from pymllm_core.config import Settings
from pymllm_core.engine.build import assemble
from pymllm_core.errors import CheckpointError
from pymllm_core.nn.builder import Builder
from pymllm_core.nn.moe import OneByOne
from pymllm_core.request import Request
from pymllm_core.testing.checkpoints import randomise, save
from pymllm_core.testing.engines import (
    LogitsRecorder,
    check_idle,
    complete,
    greedy,
    make_engine,
    registry_of,
    run,
)
from pymllm_core.testing.linting import check
from pymllm_qwen3.config import Qwen3MoeConfig as OurConfig
from pymllm_qwen3.moe import Qwen3MoeForCausalLM as Ours

QWEN3 = "pymllm_qwen3.plugin"
GROUPED = "pymllm_core.testing.grouped_experts"
TOLERANCE = 1e-4  # as of Qwen3 dense: float32, logits of about 10
VOCAB = 293  # odd, and no multiple of anything
FIELDS: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 40,
    "intermediate_size": 56,
    "moe_intermediate_size": 20,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 256,
    "eos_token_id": 2,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "not-renormalised": {"norm_topk_prob": False},
    "some-layers-dense": {"mlp_only_layers": [0, 2]},
    "every-second-layer": {"num_hidden_layers": 4, "decoder_sparse_step": 2},
    "step-and-list": {"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3]},
    "one-expert-a-token": {"num_experts_per_tok": 1},
    "one-expert-a-token-not-renormalised": {"num_experts_per_tok": 1, "norm_topk_prob": False},
    "all-experts": {"num_experts": 5, "num_experts_per_tok": 5},
    "one-expert": {"num_experts": 1, "num_experts_per_tok": 1, "norm_topk_prob": False},
    "odd-sizes": {
        "hidden_size": 37,
        "moe_intermediate_size": 13,
        "num_experts": 11,
        "num_experts_per_tok": 3,
    },
    "tied-bias": {"tie_word_embeddings": True, "attention_bias": True},
}


def reference(seed: int = 0, **fields: Any) -> Any:
    """A random model of transformers, with the experts' plain definition: its grouped product has no odd sizes."""
    config = Qwen3MoeConfig(**{**FIELDS, **fields})
    config._experts_implementation = "eager"
    model = randomise(Qwen3MoeForCausalLM(config), std=0.15, seed=seed)
    assert model.config._experts_implementation == "eager"
    return model


def expected_logits(model: Any, tokens: tuple[int, ...]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([tokens])).logits[0].float()
    return logits


def prompts_of(lengths: list[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]


@pytest.fixture(scope="module", params=CONFIGS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    model = reference(seed=len(request.param), **CONFIGS[request.param])
    folder = tmp_path_factory.mktemp(request.param)
    save(model, folder)
    return model, folder


CUTS: dict[str, dict[str, Any]] = {
    "whole": {},
    "chunked": {"max_prefill_tokens": 7, "chunked_prefill_size": 5},
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
    again = [
        Request(f"again {i}", (*p, *c.token_ids, 7), greedy(5))
        for i, (p, c) in enumerate(zip(prompts, first, strict=True))
    ]
    second = run(engine, again)
    check_idle(engine)
    for index, (prompt, answer) in enumerate(zip(prompts, first, strict=True)):
        logits = expected_logits(model, (*prompt, *answer.token_ids)[:-1])
        assert recorder.compare(str(index), logits) < TOLERANCE
        assert answer.token_ids == tuple(logits[len(prompt) - 1 :].argmax(-1).tolist())
    for request in again:
        answer = second[request.id]
        logits = expected_logits(model, (*request.token_ids, *answer.token_ids)[:-1])
        assert recorder.compare(request.id, logits) < TOLERANCE
        assert bool(answer.usage.cached_tokens) == (radix and len(request.token_ids) > 10)


def test_logits_by_a_grouped_kernel(checkpoint: tuple[Any, Path]) -> None:
    """The way of a GPU's kernels: experts in stacks, one call for all of them."""
    model, folder = checkpoint
    engine = make_engine(folder, QWEN3, GROUPED, max_prefill_tokens=7, chunked_prefill_size=5)
    chosen = {name.split(" ")[0]: choice.spec.name for name, choice in engine.plan.kernels.items()}
    assert chosen["moe_experts"] == "grouped"
    recorder = LogitsRecorder(engine)
    prompts = prompts_of([3, 17])
    for index, (prompt, answer) in enumerate(zip(prompts, complete(engine, prompts, greedy(4)), strict=True)):
        logits = expected_logits(model, (*prompt, *answer.token_ids)[:-1])
        assert recorder.compare(str(index), logits) < TOLERANCE


def test_greedy_and_preempted_answers(tmp_path: Path) -> None:
    """The tokens of transformers' generate, also where sequences are preempted and the device runs ahead."""
    model = reference(seed=5)
    save(model, tmp_path)
    prompts = prompts_of([1 + 5 * i for i in range(7)], seed=3)
    wanted = []
    for prompt in prompts:
        with torch.no_grad():
            tokens = model.generate(
                torch.tensor([prompt]), max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0
            )
        wanted.append(tuple(tokens[0, len(prompt) :].tolist()))
    for overlap in (False, True):
        engine = make_engine(
            tmp_path,
            QWEN3,
            overlap=overlap,
            max_total_tokens=72,
            radix_cache_page_size=4,
            max_prefill_tokens=16,
            schedule_conservativeness=0.01,
        )
        assert [a.token_ids for a in complete(engine, prompts, greedy(30))] == wanted
        assert engine.stats().preemptions > 2
        check_idle(engine)
    assert len({token for answer in wanted for token in answer}) > 50, "too uniform to show anything"


def test_bf16_rounds_no_worse_than_transformers(tmp_path: Path) -> None:
    """As for Qwen3 dense: both are within the same distance of the float32 logits.

    Rounding may also change which experts a token gets, here as there.
    """
    fields = {"num_hidden_layers": 4, "hidden_size": 64, "head_dim": 16, "num_attention_heads": 8}
    model = reference(seed=7, moe_intermediate_size=32, **fields)
    rounded: Any = Qwen3MoeForCausalLM(model.config)
    rounded.bfloat16().eval()
    rounded.load_state_dict(model.state_dict())
    exact: Any = Qwen3MoeForCausalLM(model.config)
    exact.float().eval()
    exact.load_state_dict({name: value.bfloat16().float() for name, value in model.state_dict().items()})
    save(rounded, tmp_path)
    engine = make_engine(tmp_path, QWEN3, dtype="bfloat16", max_prefill_tokens=16)
    recorder = LogitsRecorder(engine)
    prompts = prompts_of([5, 29, 61, 90], seed=1)
    answers = complete(engine, prompts, greedy(20))
    ours, theirs = [], []
    for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        whole = (*prompt, *answer.token_ids)[:-1]
        logits = expected_logits(exact, whole)
        theirs.append((expected_logits(rounded, whole) - logits).abs().flatten())
        ours.append((torch.cat([rows for _, rows in recorder.computed[str(index)]]) - logits).abs().flatten())
    our_error, their_error = torch.cat(ours), torch.cat(theirs)
    assert 0 < our_error.mean() < 1.25 * their_error.mean()
    assert our_error.max() < 2 * their_error.max()


def test_the_published_checkpoint_holds_what_the_graph_asks_for(shared_qwen: Path) -> None:
    """Names and shapes of Qwen3-30B-A3B; no weights are read or allocated. A token needs 3.3 B of 30.5 B."""
    config = json.loads((shared_qwen / "configs" / "Qwen3-30B-A3B" / "config.json").read_text())
    published = json.loads((shared_qwen / "keys" / "Qwen3-30B-A3B.json").read_text())
    builder = Builder(dtype=torch.bfloat16, max_positions=8, kernel=any_kernel)
    Ours(config, builder)
    assert {s.name: list(s.shape) for n in builder.nodes for s in n.slots()} == published["shapes"]
    assert not builder.ignored
    assert builder.weight_bytes == 2 * published["stored_parameters"] == 61_064_245_248
    experts = 48 * 128 * 3 * 768 * 2048
    active = published["stored_parameters"] - experts + experts * 8 // 128
    assert builder.active_weight_bytes == 2 * active


def any_kernel(operation: str, shape: Any) -> Any:
    return OneByOne() if "experts" in operation else TorchLinear()


def test_the_published_config_alone_can_be_planned(shared_qwen: Path, tmp_path: Path) -> None:
    config = json.loads((shared_qwen / "configs" / "Qwen3-30B-A3B" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    settings = Settings.of(
        str(tmp_path),
        device="cpu",
        dtype="bfloat16",
        load_format="dummy",
        max_total_tokens=64,
        mem_fraction_static=0.9,
    )
    assembly = assemble(settings, registry_of(QWEN3))
    plan = assembly.plan
    assert plan.kernels["moe_experts experts=128 top_k=8 K=2048 N=1536"].spec.name == "one-by-one"
    reasoning = plan.parsers["reasoning"]
    assert reasoning is not None
    assert reasoning.spec.name == "qwen3"
    assert {"linear K=2048 N=128", "linear K=2048 N=1536", "linear K=768 N=2048"} <= plan.kernels.keys()
    # One layer by hand: q, k, v, o, the router and the norms; each token's 8 experts; the head; a row of embedding.
    attention = 2048 * (4096 + 2 * 512) + 4096 * 2048
    fixed = attention + 2048 * 128 + 2 * 2048 + 2 * 128 + 2048 + 2048 * 151936
    expert = 3 * 768 * 2048
    assert assembly.builder.weight_bytes == 2 * (fixed + 128 * expert + 2048 * 151936)
    cost = ModelCost.of(assembly)
    kv = 2 * 2 * 4 * 128
    assert cost.decode(1, 1).bytes == pytest.approx(2 * (fixed + 8 * expert + 2048) + kv)
    # Two tokens share an expert here and there: 1 - (120/128)² of all.
    read = 128 * (1 - (120 / 128) ** 2)
    assert cost.decode(2, 1).bytes == pytest.approx(2 * (fixed + read * expert + 2 * 2048) + 2 * kv)
    products = attention + 2048 * 128 + 8 * expert + 2048 * 151936
    assert cost.decode(1, 1).total_flops == pytest.approx(2 * products + 4 * 32 * 128)


@pytest.mark.parametrize("grouped", [False, True])
def test_lint_shows_what_serves_the_experts(tmp_path: Path, grouped: bool) -> None:
    save(reference().bfloat16(), tmp_path)
    report = check(tmp_path, QWEN3, *([GROUPED] if grouped else []))
    assert not report.findings
    rows = {row.names[0]: row for row in report.rows if ".experts." in row.names[0]}
    assert set(rows) == {
        "model.layers.{0-2}.mlp.experts.{0-5}.gate_proj+up_proj",
        "model.layers.{0-2}.mlp.experts.{0-5}.down_proj",
    }
    assert {row.operation for row in rows.values()} == {"moe_experts" if grouped else "linear"}


def test_dummy_weights_run(tmp_path: Path) -> None:
    save(reference(), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    engine = make_engine(tmp_path, QWEN3, load_format="dummy")
    answer = complete(engine, prompts_of([9]), greedy(6))[0]
    assert len(answer.token_ids) == 6


def test_both_names_of_the_number_of_experts(tmp_path: Path) -> None:
    """transformers 5 writes num_local_experts; published configs say num_experts."""
    model = reference()
    save(model, tmp_path)
    assert "num_local_experts" in json.loads((tmp_path / "config.json").read_text())
    save(model, tmp_path, num_local_experts=None, num_experts=6)
    engine = make_engine(tmp_path, QWEN3)
    recorder = LogitsRecorder(engine)
    (answer,) = complete(engine, prompts_of([20]), greedy(2))
    assert (
        recorder.compare("0", expected_logits(model, (*prompts_of([20])[0], *answer.token_ids)[:-1]))
        < TOLERANCE
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts_per_tok": 7}, "num_experts_per_tok=7 is more than num_experts=6"),
        ({"num_experts": None}, "num_experts: Field required"),
        ({"num_experts": 0}, "num_experts: Input should be greater than 0"),
        ({"moe_intermediate_size": None}, "moe_intermediate_size: Field required"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step: Input should be greater than 0"),
        ({"mlp_only_layers": [-1]}, "mlp_only_layers.0: Input should be greater than or equal to 0"),
        ({"mlp_only_layers": 3}, "mlp_only_layers: Input should be a valid tuple"),
    ],
)
def test_what_is_not_supported_is_refused(change: dict[str, Any], message: str) -> None:
    fields = {name: value for name, value in {**FIELDS, **change}.items() if value is not None}
    with pytest.raises(CheckpointError, match=message):
        OurConfig.read(fields)


def test_head_dim_has_transformers_default() -> None:
    fields = {name: value for name, value in FIELDS.items() if name != "head_dim"}
    assert OurConfig.read(fields).head_dim == 10 == Qwen3MoeConfig(**fields).hidden_size // 4


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save(reference(), tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.experts.4.up_proj.weight"]
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"missing: model\.layers\.1\.mlp\.experts\.4\.up_proj\.weight"):
        make_engine(tmp_path, QWEN3)
