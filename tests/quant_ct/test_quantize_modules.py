"""Which linears are quantised, by names and shapes; what cannot be is refused before anything is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pymllm_core.engine.checkpoint import Checkpoint
from pymllm_core.errors import CheckpointError, ConfigError, PymllmError
from pymllm_quant_ct.quantize.modules import Selection, check_plain, select
from pymllm_quant_ct.quantize.run import quantise
from pymllm_quant_ct.quantize.scheme import Request

LAYER = "model.layers.0"
DENSE = {
    "model.embed_tokens.weight": (64, 128),
    "model.norm.weight": (128,),
    **{f"{LAYER}.self_attn.{part}_proj.weight": (64, 128) for part in "qkv"},
    f"{LAYER}.self_attn.q_proj.bias": (64,),
    f"{LAYER}.self_attn.o_proj.weight": (128, 64),
    f"{LAYER}.mlp.gate_proj.weight": (96, 128),
    f"{LAYER}.mlp.up_proj.weight": (96, 128),
    f"{LAYER}.mlp.down_proj.weight": (128, 96),
    "lm_head.weight": (64, 128),
}
EXPERTS = {
    f"{LAYER}.mlp.experts.{expert}.{part}_proj.weight": (128, 64) if part == "down" else (64, 128)
    for expert in range(2)
    for part in ("gate", "up", "down")
}
MOE = {
    **DENSE,
    **EXPERTS,
    f"{LAYER}.mlp.gate.weight": (2, 128),
    f"{LAYER}.mlp.shared_expert_gate.weight": (1, 128),
}
VISION = {
    **DENSE,
    "model.visual.patch_embed.proj.weight": (64, 3, 2, 16, 16),
    "model.visual.pos_embed.weight": (16, 64),
    "model.visual.blocks.0.mlp.linear_fc1.weight": (86, 64),
    "model.visual.merger.linear_fc2.weight": (64, 86),
}


def checkpoint(
    folder: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.bfloat16
) -> Checkpoint:
    folder.mkdir(exist_ok=True)
    save_file(
        {name: torch.ones(shape, dtype=dtype) for name, shape in shapes.items()}, folder / "model.safetensors"
    )
    return Checkpoint(folder)


def chosen(
    folder: Path, shapes: dict[str, tuple[int, ...]], *ignore: str, group: int | None = None
) -> Selection:
    return select(checkpoint(folder, shapes), ignore, group)


def test_dense(tmp_path: Path) -> None:
    found = chosen(tmp_path, DENSE)
    assert len(found.modules) == 7
    assert all(name.startswith(LAYER) for name in found.modules)
    assert (found.left, found.ignore) == (("lm_head",), ("lm_head",))


def test_router_and_visual_tower_are_left(tmp_path: Path) -> None:
    moe = chosen(tmp_path, MOE)
    assert set(moe.left) == {"lm_head", f"{LAYER}.mlp.gate", f"{LAYER}.mlp.shared_expert_gate"}
    assert f"{LAYER}.mlp.gate_proj" in moe.modules
    assert f"{LAYER}.mlp.experts.1.down_proj" in moe.modules
    vision = chosen(tmp_path, VISION)
    assert set(vision.modules) == set(chosen(tmp_path, DENSE).modules)
    assert vision.ignore == ("lm_head", r"re:.*visual\.")


def test_ignore(tmp_path: Path) -> None:
    found = chosen(tmp_path, DENSE, f"{LAYER}.mlp.down_proj", "re:.*self_attn")
    assert set(found.modules) == {f"{LAYER}.mlp.gate_proj", f"{LAYER}.mlp.up_proj"}
    assert found.ignore == ("lm_head", f"{LAYER}.mlp.down_proj", "re:.*self_attn")
    assert chosen(tmp_path, DENSE, "lm_head").ignore == ("lm_head",)


@pytest.mark.parametrize(
    ("shapes", "ignore", "group", "message"),
    [
        (DENSE, (f"{LAYER}.mlp.down_porj",), None, r"matches none of the 8 linears.*did you mean.*down_proj"),
        (DENSE, ("k_proj",), None, r"k_proj matches none of the 8 linears; 1 end so: --ignore 're:\.\*k_proj\$'"),
        (DENSE, ("re:self_attn",), None, r"re:self_attn matches none of the 8 linears.*from its start; the first is"),
        (DENSE, ("re:(",), None, r"is no regular expression"),
        (DENSE, ("Linear",), None, r"of its 8 linears 8 are ignored \(lm_head, Linear\)"),
        (DENSE, (f"{LAYER}.self_attn.k_proj",), None, rf"leaves out {LAYER}.self_attn.k_proj, but not .*q_proj"),
        (DENSE, ("re:.*up_proj$",), None, r"leaves out .*up_proj, but not .*gate_proj"),
        (MOE, ("re:.*experts.0.down_proj$",), None, r"leaves out .*experts.0.down_proj, but not .*experts"),
        (DENSE, (), 64, r"groups of 64 do not divide the 96 columns of .*down_proj; use --group-size 32, or"),
        (DENSE, (), 128, r"groups of 128 do not divide the 96 columns of .* \(and 1 more\); use --group-size 32"),
        ({**DENSE, f"{LAYER}.mlp.experts.gate_up_proj": (2, 64, 128)}, (), None, r"holds all experts of a layer"),
        ({"model.embed_tokens.weight": (4, 4)}, (), None, r"has no weight to quantise: of its 0 linears"),
    ],
)  # fmt: skip
def test_refused(
    shapes: dict[str, tuple[int, ...]],
    ignore: tuple[str, ...],
    group: int | None,
    message: str,
    tmp_path: Path,
) -> None:
    with pytest.raises(PymllmError, match=message):
        chosen(tmp_path, shapes, *ignore, group=group)


def test_the_advice_works(tmp_path: Path) -> None:
    """What the messages about groups advise is then taken."""
    assert len(chosen(tmp_path, DENSE, group=32).modules) == 7
    assert len(chosen(tmp_path, DENSE, f"{LAYER}.mlp.down_proj", group=64).modules) == 6
    assert (
        len(chosen(tmp_path, {**DENSE, f"{LAYER}.mlp.down_proj.weight": (128, 90)}, group=None).modules) == 7
    )


def test_weights_must_be_floats(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"_proj.weight is of type I8, expected .*quantised already"):
        select(checkpoint(tmp_path, DENSE, torch.int8), (), None)


@pytest.mark.parametrize(
    "config",
    [
        {"quantization_config": {"quant_method": "awq"}},
        {"compression_config": {"format": "pack-quantized"}},
        {"text_config": {"quantization_config": {"quant_method": "fp8"}}},
    ],
)
def test_a_quantised_model_is_refused(config: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"is quantised already .*give the model that it was made of"):
        quantise(tmp_path, tmp_path.with_name("out"), Request("W8A8"))
    check_plain({"quantization_config": None}, "a plain one")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (("W3A16",), r"--scheme: found 'W3A16', allowed: W4A16, W8A16, W8A8"),
        (("W4A16", 48), r"--group-size: found 48, allowed: 32, 64, 128, -1"),
        (("W8A8", 64), r"--group-size 64 cannot be had with --scheme W8A8.*leave it out, or take W8A16"),
        (("W8A8", None, False), r"--asymmetric cannot be had with --scheme W8A8"),
    ],
)
def test_requests_that_cannot_be(fields: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Request(*fields)  # type: ignore[arg-type]
