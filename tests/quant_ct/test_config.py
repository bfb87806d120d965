"""Configs: the samples of real versions run, everything else runs or is refused by the name of its field."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from ct_files import TINY, group, inputs, weights

from pymllm_core.config import Settings
from pymllm_core.engine.build import Assembly, assemble
from pymllm_core.errors import CheckpointError
from pymllm_core.testing.engines import complete, greedy, make_engine, registry_of
from pymllm_quant_ct.config import read_config

PLUGINS = ("pymllm_qwen3.plugin", "pymllm_quant_ct.plugin")
SAMPLES: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "samples.json").read_text())
MODEL = {**TINY, "architectures": ["Qwen3ForCausalLM"], "dtype": "bfloat16", "rms_norm_eps": 1e-6}
MODEL.update(hidden_size=128, intermediate_size=256, num_attention_heads=4, tie_word_embeddings=True)


def folder_with(folder: Path, quantisation: Any, **fields: Any) -> str:
    config = {**MODEL, "quantization_config": quantisation, **fields}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return str(folder)


def plan_of(folder: Path, quantisation: Any, **fields: Any) -> Assembly:
    settings = Settings.of(folder_with(folder, quantisation, **fields), load_format="dummy", device="cpu")
    return assemble(settings, registry_of(*PLUGINS))


def operations(assembly: Assembly) -> set[str]:
    """Those of the linears."""
    return {label.split()[0] for label in assembly.plan.kernels if label.split()[0].endswith("linear")}


def changed(sample: str, *path: str, to: Any) -> dict[str, Any]:
    """A sample with one field set; ``to=...`` removes it."""
    config = copy.deepcopy(SAMPLES[sample])
    inner = config
    for name in path[:-1]:
        inner = inner[name]
    if to is ...:
        inner.pop(path[-1], None)
    else:
        inner[path[-1]] = to
    return config


WEIGHTS = ("config_groups", "group_0", "weights")
INPUTS = ("config_groups", "group_0", "input_activations")
W4, W8, W8A8 = "w4a16_linear", "w8a16_linear", "w8a8_linear"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (SAMPLES["A"], {W4}),
        (SAMPLES["B"], {W4}),
        (SAMPLES["C"], {W8}),
        (SAMPLES["D"], {W8A8}),
        (SAMPLES["E"], {W8A8}),
        (SAMPLES["F"], {W4}),
        (changed("G", "kv_cache_scheme", to=None), {W8A8}),
        # Odd ones that mean something.
        (changed("A", "config_groups", to={"W4A16": ["Linear"]}), {W4}),
        (changed("C", "config_groups", to={"W8A16": ["Linear"]}), {W8}),
        (changed("D", "config_groups", to={"W8A8": ["Linear"]}), {W8A8}),
        (changed("D", "config_groups", to={"UNQUANTIZED": ["Linear"]}), set()),
        (changed("A", "ignore", to=None), {W4}),
        (changed("A", "ignore", to=["re:.*"]), set()),
        (changed("A", "format", to=...), {W4}),
        (changed("A", *WEIGHTS, "strategy", to=...), {W4}),
        (changed("A", *WEIGHTS, "group_size", to=64), {W4}),
        (changed("C", *WEIGHTS, "group_size", to=-1), {W8}),
        (changed("A", *WEIGHTS, "actorder", to="group"), {W4}),
        (changed("A", *WEIGHTS, "invented_in_version_99", to={"x": 1}), {W4}),
        (changed("A", "invented_too", to=[1]), {W4}),
        ({"quantization_config": SAMPLES["A"], "sparsity_config": {}}, {W4}),
        (changed("A", "sparsity_config", to={"format": "dense"}), {W4}),
        (
            changed(
                "A",
                "transform_config",
                to={"config_groups": {"R1": {"type": "hadamard", "apply": [{"location": "weight_input"}]}}},
            ),
            {W4},
        ),
    ],
)
def test_runs(config: dict[str, Any], expected: set[str], tmp_path: Path) -> None:
    assert operations(plan_of(tmp_path, config)) - {"linear"} == expected
    # Dummy weights go through loading, packing and a step.
    engine = make_engine(tmp_path, *PLUGINS, load_format="dummy")
    (answer,) = complete(engine, [[1, 2, 3]], greedy(2))
    assert len(answer.token_ids) == 2


BAD_TRANSFORM = {"config_groups": {"R3": {"type": "hadamard", "apply": [{"location": "q_attn"}]}}}


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (SAMPLES["G"], "kv_cache_scheme"),
        ({"quant_method": "compressed-tensors"}, "config_groups"),
        (changed("A", "config_groups", to={}), "config_groups"),
        (changed("A", "config_groups", to=["x"]), "config_groups"),
        (changed("A", "config_groups", to={"FP8": ["Linear"]}), "config_groups.FP8"),
        (changed("A", "config_groups", "group_0", to=3), "config_groups.group_0"),
        (changed("A", "config_groups", "group_0", "targets", to=...), "group_0.targets"),
        (changed("A", "config_groups", "group_0", "targets", to=[1]), "group_0.targets"),
        (changed("A", "config_groups", "group_0", "targets", to=["re:(("]), r"group_0.targets\[0\]"),
        (
            changed("A", "config_groups", "group_0", "output_activations", to={"num_bits": 8}),
            "output_activations",
        ),
        (changed("A", "config_groups", "group_0", "format", to="nvfp4-pack-quantized"), "group_0.format"),
        (changed("D", "config_groups", "group_0", "weights", to=None), "group_0.weights"),
        (changed("A", *WEIGHTS, to="int4"), "group_0.weights"),
        (changed("A", *WEIGHTS, "type", to="float"), "weights.type"),
        (changed("A", *WEIGHTS, "num_bits", to=3), "weights.num_bits"),
        (changed("A", *WEIGHTS, "num_bits", to="4"), "weights.num_bits"),
        (changed("A", *WEIGHTS, "num_bits", to=True), "weights.num_bits"),
        (changed("A", *WEIGHTS, "group_size", to=0), "weights.group_size"),
        (changed("A", *WEIGHTS, "group_size", to=None), "weights.group_size"),
        (changed("A", *WEIGHTS, "group_size", to=1 << 40), "weights.group_size"),
        (changed("A", *WEIGHTS, "group_size", to=48), "weights.group_size"),
        (changed("A", *WEIGHTS, "symmetric", to="yes"), "weights.symmetric"),
        (changed("A", *WEIGHTS, "strategy", to="block"), "weights.strategy"),
        (changed("A", *WEIGHTS, "strategy", to="tensor_group"), "weights.strategy"),
        (changed("A", *WEIGHTS, "dynamic", to=True), "weights.dynamic"),
        (changed("A", *WEIGHTS, "actorder", to="random"), "weights.actorder"),
        (changed("D", *WEIGHTS, "num_bits", to=4), "weights.num_bits"),
        (changed("D", *WEIGHTS, "symmetric", to=False), "weights.symmetric"),
        (changed("D", *INPUTS, to=[8]), "input_activations"),
        (changed("D", *INPUTS, "type", to="float"), "input_activations.type"),
        (changed("D", *INPUTS, "num_bits", to=4), "input_activations.num_bits"),
        (changed("D", *INPUTS, "dynamic", to="local"), "input_activations.dynamic"),
        (changed("D", *INPUTS, "strategy", to="group"), "input_activations.strategy"),
        (changed("E", *INPUTS, "strategy", to="token"), "input_activations.strategy"),
        (changed("A", "format", to="marlin-24"), "format"),
        (changed("A", "format", to="float-quantized"), "format"),
        (changed("A", "quantization_status", to="frozen"), "quantization_status"),
        (changed("A", "ignore", to={"lm_head": 1}), "ignore"),
        (changed("A", "ignore", to=["re:["]), r"ignore\[0\]"),
        (changed("A", "sparsity_config", to={"format": "sparse-24-bitmask"}), "sparsity_config.format"),
        (changed("A", "transform_config", to=BAD_TRANSFORM), r"transform_config.config_groups.R3.apply\[0\]"),
        (changed("A", "transform_config", to=7), "transform_config"),
        (changed("D", "config_groups", "group_0", "targets", to=["re:.*embed"]), "input_activations"),
    ],
)
def test_is_refused_by_the_name_of_its_field(config: dict[str, Any], field: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"quantization_config.*{field}"):
        plan_of(tmp_path, config)


def test_the_old_key_is_read(tmp_path: Path) -> None:
    assembly = plan_of(tmp_path, None, compression_config=changed("A", "quant_method", to=...))
    assert operations(assembly) == {W4, "linear"}


def test_groups_keep_their_own_format() -> None:
    found = read_config(changed("G", "kv_cache_scheme", to=None))
    assert [(g.packed, g.activations is not None) for g in found.groups] == [(False, True), (True, False)]


def test_the_plan_names_every_kernel_with_its_shape(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, SAMPLES["A"]).plan
    assert plan.quant is not None
    assert plan.quant.spec.name == "compressed-tensors"
    label = "w4a16_linear K=128 N=192 group_size=128 groups=1 symmetric=1 g_idx=0"
    assert plan.kernels[label].spec.name in ("torch", "int4pack")


def test_ct_files_make_what_the_samples_say() -> None:
    """The helpers of these tests and the samples agree on what a group looks like."""
    assert read_config({"config_groups": {"group_0": group(weights(4, 128))}}).groups[0].weights == (
        read_config(SAMPLES["A"]).groups[0].weights
    )
    assert (
        read_config({"config_groups": {"group_0": group(weights(8), inputs())}}).groups
        == read_config({**SAMPLES["D"], "format": "int-quantized"}).groups
    )
