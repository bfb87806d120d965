"""What Qwen3 checkpoints hold, in every form they come in, and which configs are refused."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen3Config as TheirConfig
from transformers import Qwen3ForCausalLM as Theirs

from pymllm_core.builtin.torch_kernels import TorchLinear
from pymllm_core.config import Settings
from pymllm_core.engine.build import assemble
from pymllm_core.errors import CheckpointError, MemoryPlanError
from pymllm_core.nn.builder import Builder
from pymllm_core.testing.checkpoints import randomise, save
from pymllm_core.testing.engines import LogitsRecorder, complete, greedy, make_engine, registry_of
from pymllm_qwen3.config import Qwen3Config
from pymllm_qwen3.text import Qwen3ForCausalLM

QWEN3 = "pymllm_qwen3.plugin"
DENSE = ["Qwen3-0.6B", "Qwen3-1.7B", "Qwen3-4B", "Qwen3-8B", "Qwen3-14B", "Qwen3-32B"]
FIELDS: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}


def model_of(**fields: Any) -> Any:
    return randomise(Theirs(TheirConfig(**{**FIELDS, **fields})), std=0.2, seed=1)


def assert_same_logits(model: Any, folder: Path) -> None:
    engine = make_engine(folder, QWEN3)
    recorder = LogitsRecorder(engine)
    prompt = list(range(3, 33))
    (answer,) = complete(engine, [prompt], greedy(4))
    with torch.no_grad():
        expected = model(torch.tensor([[*prompt, *answer.token_ids][:-1]])).logits[0]
    assert recorder.compare("0", expected) < 1e-4


@pytest.mark.parametrize("name", DENSE)
def test_published_checkpoints_hold_what_the_graph_asks_for(shared_qwen: Path, name: str) -> None:
    """Names and shapes, from the published config and index; no weights are read or allocated."""
    config = json.loads((shared_qwen / "configs" / name / "config.json").read_text())
    published = json.loads((shared_qwen / "keys" / f"{name}.json").read_text())
    builder = Builder(dtype=torch.bfloat16, max_positions=8, kernel=lambda *_: TorchLinear())
    Qwen3ForCausalLM(config, builder)
    slots = {slot.name: list(slot.shape) for node in builder.nodes for slot in node.slots()}
    stored = dict(published["shapes"])
    if published["tied"]:
        # Tied checkpoints may store the head again; it is known, and ignored.
        assert builder.ignored == {"lm_head.weight"}
        assert ("lm_head.weight" in stored) == published["lm_head_in_file"]
        stored.pop("lm_head.weight", None)
    else:
        assert not builder.ignored
    assert slots == stored
    assert len(published["shapes"]) == published["tensors"]
    count = sum(torch.Size(shape).numel() for shape in published["shapes"].values())
    assert count == published["stored_parameters"]


@pytest.mark.parametrize("name", ["Qwen3-0.6B", "Qwen3-1.7B"])
def test_a_published_config_alone_can_be_planned(shared_qwen: Path, tmp_path: Path, name: str) -> None:
    raw = json.loads((shared_qwen / "configs" / name / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw))
    fields: dict[str, Any] = {
        "device": "cpu",
        "dtype": "bfloat16",
        "load_format": "dummy",
        "context_length": 2048,
    }
    plan = assemble(Settings.of(str(tmp_path), max_total_tokens=2048, **fields), registry_of(QWEN3)).plan
    assert plan.limits.context_length == plan.limits.max_total_tokens == 2048
    # Two tensors of a layer's K and V, of 2 bytes a number.
    assert (
        plan.memory.kv_bytes_per_token == raw["num_hidden_layers"] * 2 * raw["num_key_value_heads"] * 128 * 2
    )
    published = json.loads((shared_qwen / "keys" / f"{name}.json").read_text())
    head = raw["vocab_size"] * raw["hidden_size"]
    stored = published["stored_parameters"] - (head if published["lm_head_in_file"] else 0)
    # The tied table is counted once for the embedding and once for the head, which may keep a copy.
    assert plan.memory.weights in (2 * stored, 2 * (stored + head))
    with pytest.raises(
        MemoryPlanError, match=r"the model does not fit: .*Raise --server\.mem_fraction_static"
    ):
        assemble(Settings.of(str(tmp_path), mem_fraction_static=0.001, **fields), registry_of(QWEN3))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("size", ["10GB", "9KB"], ids=["single", "sharded"])
def test_files_of_transformers(tmp_path: Path, tied: bool, size: str) -> None:
    model = model_of(tie_word_embeddings=tied)
    save(model, tmp_path, max_shard_size=size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (size == "9KB")
    assert_same_logits(model, tmp_path)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize("scaling", [None, YARN], ids=["default", "yarn"])
def test_both_forms_of_the_rope_fields(tmp_path: Path, scaling: dict[str, Any] | None) -> None:
    parameters = {**(scaling or {"rope_type": "default"}), "rope_theta": 5e5}
    model = model_of(rope_parameters=parameters)
    save(model, tmp_path / "new")
    assert "rope_parameters" in json.loads((tmp_path / "new" / "config.json").read_text())
    assert_same_logits(model, tmp_path / "new")
    old = None if scaling is None else {"type" if k == "rope_type" else k: v for k, v in scaling.items()}
    save(model, tmp_path / "old", rope_parameters=None, rope_theta=5e5, rope_scaling=old)
    assert "rope_parameters" not in json.loads((tmp_path / "old" / "config.json").read_text())
    assert_same_logits(model, tmp_path / "old")


def test_yarn_stretches_the_context() -> None:
    """As the model cards say to do it: the length stays as trained, the factor stretches it."""
    config = {**FIELDS, "max_position_embeddings": 40960, "rope_theta": 1e6}
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    assert Qwen3ForCausalLM.shape(config).max_positions == 40960
    assert Qwen3ForCausalLM.shape({**config, "rope_scaling": scaling}).max_positions == 131072
    assert (
        Qwen3ForCausalLM.shape(
            {**config, "max_position_embeddings": 131072, "rope_scaling": scaling}
        ).max_positions
        == 131072
    )


@pytest.mark.parametrize("field", [f for f in FIELDS if f != "head_dim"])
def test_a_missing_field_is_named(field: str) -> None:
    with pytest.raises(CheckpointError, match=rf"config\.json of a Qwen3 model: .*{field}: Field required"):
        Qwen3Config.read({name: value for name, value in FIELDS.items() if name != field})


def test_head_dim_has_a_default() -> None:
    assert Qwen3Config.read({**FIELDS, "head_dim": None}).head_dim == 128  # as transformers


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_key_value_heads": 3}, "num_attention_heads=4 is no multiple of num_key_value_heads=3"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({"use_sliding_window": True}, "use_sliding_window=true is not supported"),
        ({"head_dim": 7}, "head_dim: Input should be a multiple of 2"),
        ({"vocab_size": 0}, "vocab_size: Input should be greater than 0"),
        ({"rms_norm_eps": -1}, "rms_norm_eps: Input should be greater than 0"),
        ({"rope_scaling": {"type": "longrope"}}, "rope type 'longrope' is not supported"),
    ],
)
def test_what_is_not_supported_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Qwen3Config.read({**FIELDS, **change})


Json = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
SCALING = (
    "rope_type",
    "type",
    "factor",
    "rope_theta",
    "original_max_position_embeddings",
    "attention_factor",
)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    changes=st.dictionaries(
        st.sampled_from(
            [*FIELDS, "rope_theta", "rope_scaling", "rope_parameters", "hidden_act", "rms_norm_eps"]
        ),
        Json,
        max_size=3,
    ),
    scaling=st.none()
    | st.dictionaries(st.sampled_from(SCALING), Json | st.sampled_from(["yarn", "linear"]), max_size=4),
)
def test_no_config_raises_anything_else(changes: dict[str, Any], scaling: dict[str, Any] | None) -> None:
    config = {**FIELDS, **changes, **({} if scaling is None else {"rope_scaling": scaling})}
    with suppress(CheckpointError):
        shape = Qwen3ForCausalLM.shape(config)
        assert (
            min(shape.num_layers, shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.max_positions)
            > 0
        )
