"""Model folders that are broken: each is refused with a message that says what is wrong and where."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pymllm_core.engine.checkpoint import Checkpoint
from pymllm_core.engine.headers import read_json
from pymllm_core.errors import CheckpointError, ConfigError, ModelNotFoundError, PymllmError, SelectionError
from pymllm_core.protocols.quant import WeightSlot
from pymllm_core.testing.checkpoints import save, toy_model, write_toy
from pymllm_core.testing.engines import complete, greedy, make_engine

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pristine")
    write_toy(folder)
    return folder


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    """A copy to be broken."""
    return Path(shutil.copytree(pristine, tmp_path / "model"))


def change_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def refusal(folder: Path, **settings: Any) -> str:
    """The message with which the folder is refused."""
    with pytest.raises(CheckpointError) as caught:
        make_engine(folder, **settings)
    return str(caught.value)


def logprobs_of(folder: Path) -> list[float]:
    """Numbers in which every weight has a part; how tensors are aligned in a file shows in the last digit."""
    (answer,) = complete(make_engine(folder), [[5, 6, 7]], greedy(9, logprobs=0))
    assert answer.logprobs is not None
    return [entry.logprob for entry in answer.logprobs]


# -- the folder and its config ------------------------------------------------------------------------


def test_an_empty_folder(tmp_path: Path) -> None:
    message = refusal(tmp_path)
    assert f"{tmp_path} holds no config.json, so it is no model; found there: nothing" in message


def test_no_folder_at_all(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=f"there is no folder {tmp_path}/nowhere"):
        make_engine(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"config.json cannot be read as JSON"),
        ("", r"config.json cannot be read as JSON"),
        ("[1]", r"config.json holds a JSON list, expected an object"),
        ("{}", r"config.json names no architecture \(field `architectures`\)"),
        ('{"architectures": []}', r"names no architecture"),
        ('{"architectures": "ToyForCausalLM"}', r"names no architecture"),
        ('{"architectures": [3]}', r"names no architecture"),
        ('{"architectures": ["ToyForCausalLM"]}', r"config.json lacks the field 'num_attention_heads'"),
    ],
)
def test_a_config_that_is_none(folder: Path, text: str, message: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        make_engine(folder)


def test_a_config_that_is_no_text(folder: Path) -> None:
    (folder / "config.json").write_bytes(b"\xff\xfe{}")
    assert "cannot be read as JSON" in refusal(folder)


def test_another_architecture(folder: Path) -> None:
    change_config(folder, architectures=["MambaForCausalLM"])
    with pytest.raises(SelectionError, match="'MambaForCausalLM'") as caught:
        make_engine(folder)
    assert "available: ToyForCausalLM" in str(caught.value)


def test_a_dtype_that_is_none(folder: Path) -> None:
    change_config(folder, dtype="float8_e4m3fn")
    assert "dtype 'float8_e4m3fn' is not supported; set --server.dtype" in refusal(folder, dtype="auto")


def test_an_older_torch_dtype_field(folder: Path) -> None:
    change_config(folder, dtype=..., torch_dtype="float32")
    assert make_engine(folder, dtype="auto").plan.dtype == "float32"


def test_quantisation_that_no_plugin_reads(folder: Path) -> None:
    change_config(folder, quantization_config={"quant_method": "exotic"})
    with pytest.raises(SelectionError, match="quantisation method 'exotic'"):
        make_engine(folder)
    change_config(folder, quantization_config="exotic")
    assert "quantization_config is no object" in refusal(folder)
    change_config(folder, quantization_config=...)
    with pytest.raises(ConfigError, match=r"config\.json has no quantization_config"):
        make_engine(folder, quantization="exotic")


def test_read_json_names_the_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{tmp_path}/x.json is missing; is {tmp_path} a model folder"):
        read_json(tmp_path / "x.json")


# -- weights ------------------------------------------------------------------------------------------


def test_no_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    assert refusal(folder) == f"{folder} holds no .safetensors file"


def test_pickles_only(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80")
    message = refusal(folder)
    assert (
        "holds no .safetensors file (pytorch_model.bin are pickles, which are never loaded; convert them)"
        in message
    )


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: b"",
        lambda raw: raw[:5],
        lambda raw: raw[:100],
        lambda raw: raw[: len(raw) // 2],
        lambda raw: raw[:-1],
        lambda raw: struct.pack("<Q", 2**60) + raw[8:],
        lambda raw: struct.pack("<Q", len(raw)) + raw[8:],
        lambda raw: raw[:8] + b"x" + raw[9:],
        lambda raw: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    ],
    ids=[
        "empty",
        "5-bytes",
        "header",
        "half",
        "last-byte",
        "huge-header",
        "long-header",
        "no-json",
        "lfs-pointer",
    ],
)
def test_damaged_files(folder: Path, damage: Callable[[bytes], bytes]) -> None:
    path = folder / WEIGHTS
    damaged = damage(path.read_bytes())
    path.write_bytes(damaged)
    message = refusal(folder)
    assert f"{path} ({len(damaged):,} bytes) is no whole safetensors file" in message
    assert message.endswith("download it again")


def test_missing_unused_and_misshapen_tensors_are_all_named(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.norm.weight"]
        tensors["model.layers.1.mlp.down_proj.weight"] = torch.zeros(32, 47)
        tensors["model.layers.7.mlp.down_proj.weight"] = torch.zeros(1)

    change_weights(folder, change)
    message = refusal(folder)
    assert message.startswith(f"{folder} does not fit its config.json.")
    assert "missing: model.norm.weight." in message
    assert "wrong shape: model.layers.1.mlp.down_proj.weight is [32, 47], expected [32, 48]" in message
    assert "not used by the model: model.layers.7.mlp.down_proj.weight" in message


def test_of_many_problems_ten_are_named(folder: Path) -> None:
    change_weights(folder, lambda tensors: [tensors.update({f"x{i:02}": torch.zeros(1)}) for i in range(14)])
    message = refusal(folder)
    assert "x00, x01, x02, x03, x04, x05, x06, x07, x08, x09 and 4 more" in message


def test_a_stored_copy_of_a_tied_head_is_no_problem(tmp_path: Path) -> None:
    write_toy(tmp_path, tie_word_embeddings=True)
    without = logprobs_of(tmp_path)
    # A copy that differs shows that it is not read.
    change_weights(tmp_path, lambda t: t.update({"lm_head.weight": torch.zeros(300, 32)}))
    assert logprobs_of(tmp_path) == pytest.approx(without, abs=1e-5)


def test_integers_where_numbers_are_wanted(folder: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    change_weights(folder, lambda t: t.update({name: torch.zeros(32, 48, dtype=torch.int8)}))
    message = refusal(folder)
    assert f"tensor {name!r} of {folder / WEIGHTS} is torch.int8, expected torch.float32" in message
    assert "quantised" in message


def test_other_float_dtypes_are_converted(folder: Path) -> None:
    exact = logprobs_of(folder)

    def halve(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: value.bfloat16() for name, value in tensors.items()})

    change_weights(folder, halve)
    rounded = logprobs_of(folder)
    assert rounded != pytest.approx(exact, abs=1e-5)
    assert rounded[:3] == pytest.approx(exact[:3], abs=0.3)


# -- shards -------------------------------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    model = toy_model()
    save(
        model, tmp_path / "sharded", max_shard_size="20KB", architectures=["ToyForCausalLM"], model_type="toy"
    )
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    return tmp_path / "sharded"


def index_of(folder: Path) -> dict[str, Any]:
    index: dict[str, Any] = json.loads((folder / INDEX).read_text())
    return index


def test_shards_give_the_answers_of_a_single_file(sharded: Path, folder: Path) -> None:
    assert logprobs_of(sharded) == pytest.approx(logprobs_of(folder), abs=1e-5)
    # Also without an index.
    (sharded / INDEX).unlink()
    assert logprobs_of(sharded) == pytest.approx(logprobs_of(folder), abs=1e-5)


@pytest.mark.parametrize(
    "name", ["../evil.safetensors", "/etc/evil.safetensors", "sub/evil.safetensors", "evil.bin", ".."]
)
def test_an_index_that_points_elsewhere(sharded: Path, name: str) -> None:
    index = index_of(sharded)
    index["weight_map"]["model.norm.weight"] = name
    (sharded / INDEX).write_text(json.dumps(index))
    shutil.copy(next(sharded.glob("*.safetensors")), sharded.parent / "evil.safetensors")
    assert refusal(sharded) == f"{sharded / INDEX} names {name!r}, which is no file of the folder"


def test_a_missing_shard(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    assert refusal(sharded) == f"{sharded} lacks {shard.name}, which {INDEX} names"


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}', '{"weight_map": ["a"]}'])
def test_an_index_without_a_map(sharded: Path, content: str) -> None:
    (sharded / INDEX).write_text(content)
    assert refusal(sharded) == f"{sharded / INDEX} has no weight_map"


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    both = {**load_file(first), **load_file(second)}
    save_file(both, second)
    message = refusal(sharded)
    assert "is stored twice, in" in message
    assert first.name in message
    assert second.name in message


def test_optional_tensors_and_reading(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    slot = WeightSlot("absent", (1,), torch.float32, optional=True)
    slots = [WeightSlot(n, tuple(t.shape), torch.float32) for n, t in load_file(folder / WEIGHTS).items()]
    checkpoint.check([*slots, slot], set())
    assert checkpoint.read(slot) is None
    with pytest.raises(CheckpointError, match="missing: absent"):
        checkpoint.check([*slots, WeightSlot("absent", (1,), torch.float32)], set())
    tensor = checkpoint.read(slots[0])
    checkpoint.close()
    assert tensor is not None
    torch.testing.assert_close(tensor, load_file(folder / WEIGHTS)[slots[0].name])


@pytest.mark.parametrize(
    "field", ["vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings"]
)
def test_a_config_that_lacks_a_field(folder: Path, field: str) -> None:
    change_config(folder, **{field: ...})
    assert refusal(folder) == f"config.json lacks the field '{field}'"


def test_everything_raised_is_of_the_one_tree() -> None:
    assert issubclass(CheckpointError, PymllmError)
