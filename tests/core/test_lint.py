"""`pymllm lint-checkpoint` on toy checkpoints: a good one has no findings, and each mistake has its own."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pymllm_core.engine.engine import Engine
from pymllm_core.errors import CheckpointError, ConfigError
from pymllm_core.hookspecs import hookimpl
from pymllm_core.lint.device import imagined_device
from pymllm_core.nn.linear import Linear
from pymllm_core.specs import KernelSpec, Needs
from pymllm_core.testing.checkpoints import save, toy_model
from pymllm_core.testing.engines import TOY, make_engine
from pymllm_core.testing.linting import WEIGHTS, change_config, change_weights, check, only

INDEX = "model.safetensors.index.json"
DOWN = "model.layers.1.mlp.down_proj.weight"
CONTRACT = "1.0"


@hookimpl
def pymllm_kernels() -> list[KernelSpec]:
    """Kernels for devices that are not here: a plugin by which choices for them can be seen."""
    absent, present = {"no_such_module_at_all": "no-such>=1"}, {"json": "json>=0"}
    return [
        KernelSpec(
            operation="linear",
            name=name,
            implementation="no_module:Kernel",
            needs=Needs(devices=("cuda",), capability_min=capability, modules=modules),
            priority=priority,
        )
        for name, capability, modules, priority in (
            ("ampere", (8, 0), present, 10),
            ("hopper", (9, 0), present, 20),
            ("uninstalled", (8, 0), absent, 30),
        )
    ]


def toy(folder: Path, **fields: Any) -> Path:
    """A toy checkpoint in bfloat16."""
    model = toy_model(**fields).bfloat16()
    options = {"max_shard_size": fields.pop("max_shard_size")} if "max_shard_size" in fields else {}
    save(model, folder, architectures=["ToyForCausalLM"], model_type="toy", **options)
    return folder


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy(tmp_path_factory.mktemp("pristine"))


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "model"))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    model = toy_model().bfloat16()
    path = tmp_path / "sharded"
    save(model, path, max_shard_size="20KB", architectures=["ToyForCausalLM"], model_type="toy")
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


def linears(engine: Engine) -> dict[str, Linear]:
    """The linears that an engine runs, by the name of their first part."""
    model: Any = engine._runner._model
    found = [
        *(n for layer in model.layers for n in (layer.qkv, layer.o, layer.gate_up, layer.down)),
        model.head,
    ]
    return {node.layer.parts[0].name: node for node in found}


# -- what is good -------------------------------------------------------------------------------------


def test_a_good_checkpoint_has_no_findings(folder: Path, sharded: Path) -> None:
    assert not check(folder).findings
    assert not check(sharded).findings


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_kernels_are_those_that_an_engine_uses(folder: Path, dtype: str) -> None:
    report = check(folder, dtype=dtype)
    nodes = linears(make_engine(folder, dtype=dtype))
    seen = 0
    for row in report.rows:
        if row.kernel is None:
            assert row.operation == "embedding"
            continue
        if row.operation == "attention_prep":
            assert (row.kernel.partition(" ")[0], row.count) == ("torch", 2)
            continue
        names = [name for layer in range(2) for name in [row.names[0].replace("{0-1}", str(layer))]]
        for name in dict.fromkeys(names):
            node = nodes[name.partition("+")[0]]
            wanted = {"torch": "TorchLinear", "onednn": "OneDnnLinear"}[row.kernel.partition(" ")[0]]
            assert type(node.kernel).__name__ == wanted
            assert (row.rows, row.columns) == (node.layer.out_features, node.layer.in_features)
            assert row.operation == node.scheme.operation
            seen += 1
    assert seen == len(nodes) == 9


def test_like_layers_are_one_row(folder: Path) -> None:
    rows = check(folder).rows
    assert [(row.names, row.count, row.rows, row.columns) for row in rows] == [
        (("model.embed_tokens",), 1, 300, 32),
        (("model.layers.{0-1}.self_attn.q_proj+k_proj+v_proj",), 2, 64, 32),
        (("model.layers.{0-1}.self_attn.o_proj",), 2, 32, 32),
        (("model.layers.{0-1}.mlp.gate_proj+up_proj",), 2, 96, 32),
        (("model.layers.{0-1}.mlp.down_proj",), 2, 32, 48),
        (("lm_head",), 1, 300, 32),
        (("attention of layers {0-1}",), 2, None, None),
    ]


def test_the_bytes_of_a_token(folder: Path) -> None:
    """Worked out by hand: every weight but the embedding, one row of that, and K and V of the context."""
    totals = check(folder, bandwidth=102.4).totals
    stored = sum(tensor.nbytes for tensor in load_file(folder / WEIGHTS).values())
    assert totals.stored == {"BF16": stored}
    assert sum(totals.weights.values()) == stored
    table = 300 * 32 * 2
    assert totals.weights_per_token == stored - table + 32 * 2
    assert totals.kv_per_token == 2 * 2 * 2 * 8 * 2
    first, last = totals.tokens
    assert (first.context, last.context) == (1, 256)
    assert last.num_bytes == totals.weights_per_token + 256 * totals.kv_per_token
    assert last.floor_ms == pytest.approx(last.num_bytes / 102.4e9 * 1000)
    assert check(folder).totals.tokens[0].floor_ms is None


def test_a_tied_table_weighs_once_and_is_read(tmp_path: Path) -> None:
    folder = toy(tmp_path / "tied", tie_word_embeddings=True)
    totals = check(folder).totals
    stored = sum(tensor.nbytes for tensor in load_file(folder / WEIGHTS).values())
    assert sum(totals.weights.values()) == stored
    assert totals.weights_per_token == stored + 32 * 2


def test_a_head_that_is_rounded_at_loading(tmp_path: Path) -> None:
    """A tied table is then held twice: as it is for look-ups, as codes and scales for the head."""
    folder = toy(tmp_path / "tied", tie_word_embeddings=True)
    before, totals = check(folder).totals, check(folder, lm_head="int8").totals
    head = 300 * (32 + 2)
    assert totals.weights["int8 head channel sym"] == head
    assert totals.weights["bfloat16"] == before.weights["bfloat16"]
    assert before.weights_per_token is not None
    assert totals.weights_per_token == before.weights_per_token - 300 * 32 * 2 + head


def test_tensor_data_is_not_read(tmp_path: Path) -> None:
    """A file of 200 GB, of which only the header is there: reading a thousandth of it would take longer."""
    folder = toy(tmp_path / "toy")
    header, end = {}, 0
    shapes = {name: tensor.shape for name, tensor in load_file(folder / WEIGHTS).items()}
    shapes["model.embed_tokens.weight"] = shapes["lm_head.weight"] = torch.Size((50_000_000, 1024))
    for name, shape in shapes.items():
        size = shape.numel() * 2
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(header).encode()
    with (folder / WEIGHTS).open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + end)
    assert (folder / WEIGHTS).stat().st_size > 200e9
    start = time.perf_counter()
    finding = only(check(folder))
    assert time.perf_counter() - start < 2
    assert finding.message == "stored as [50000000, 1024], expected [300, 32]"


# -- files --------------------------------------------------------------------------------------------


def test_a_file_that_was_cut_off(folder: Path) -> None:
    path = folder / WEIGHTS
    size = path.stat().st_size
    os.truncate(path, size - 1)
    report = check(folder)
    finding = only(report)
    assert (finding.severity, finding.code, finding.where) == ("error", "damaged-file", (WEIGHTS,))
    assert f"({size - 1:,} bytes) is no whole safetensors file: it was cut off" in finding.message
    assert len(report.rows) == 7  # what its header says is looked at all the same


def test_a_header_that_is_garbage(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", 2**50) + b"x" * 100)
    finding = only(check(folder))
    assert finding.code == "damaged-file"
    assert WEIGHTS in finding.message


def test_no_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    finding = only(check(folder))
    assert (finding.severity, finding.code) == ("error", "no-weights")
    assert finding.message == f"{folder} holds no .safetensors file"
    finding = only(check(folder, weights=False))
    assert (finding.severity, finding.code) == ("note", "weights-not-here")


def test_missing_shards(sharded: Path) -> None:
    files = sorted(sharded.glob("*.safetensors"))
    files[1].unlink()
    report = check(sharded)
    missing, tensors = report.findings
    assert missing.code == "missing-file"
    assert f"lacks {files[1].name}, which {INDEX} names" in missing.message
    assert tensors.code == "missing-tensor"
    assert "may be in the files that cannot be read" in tensors.message
    (sharded / INDEX).unlink()
    finding = check(sharded).findings[0]
    assert finding.where == (files[1].name,)
    assert f"the other shards' names tell of {files[1].name}" in finding.message


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    save_file({**load_file(first), **load_file(second)}, second)
    found = [finding for finding in check(sharded).findings if finding.code == "duplicate-tensor"]
    assert len(found) == len(load_file(first))
    assert found[0].message.endswith(f"is stored twice, in {first.name} and {second.name}")


def test_an_index_that_differs_from_the_files(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    places = index["weight_map"]
    files = [file for file in sorted(set(places.values())) if list(places.values()).count(file) > 1]
    moved = next(name for name, file in places.items() if file == files[0])
    removed = next(name for name, file in places.items() if file == files[1])
    places[moved] = files[1]
    del places[removed]
    (sharded / INDEX).write_text(json.dumps(index))
    save_file({"left": torch.zeros(1)}, sharded / "old.safetensors")
    (sharded / "model-00001-of-00002.safetensors.incomplete").write_bytes(b"")
    report = check(sharded)
    found = {(finding.severity, finding.code): finding for finding in report.findings}
    assert len(report.findings) == 4
    one, other = (finding for finding in report.findings if finding.code == "index-mismatch")
    assert (one.severity, one.where) == ("warning", (moved,))
    assert one.message == f"{INDEX} has them in {files[1]}, the headers in {files[0]}"
    assert other.where == (removed,)
    assert found["note", "unread-file"].where == ("old.safetensors",)
    assert found["warning", "unfinished-file"].where == ("model-00001-of-00002.safetensors.incomplete",)
    make_engine(sharded)  # none of this stops loading


@pytest.mark.parametrize(
    "content", ["{}", '{"weight_map": []}', "[", '{"weight_map": {"a": "../x.safetensors"}}']
)
def test_an_index_that_is_none(sharded: Path, content: str) -> None:
    (sharded / INDEX).write_text(content)
    finding = only(check(sharded), "error")
    assert (finding.code, finding.where) == ("bad-index", (INDEX,))


# -- tensors ------------------------------------------------------------------------------------------


def test_missing_unused_misshapen_and_mistyped_tensors(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.norm.weight"]
        tensors[DOWN] = torch.zeros(32, 47)
        tensors["model.layers.0.mlp.down_proj.weight"] = torch.zeros(32, 48, dtype=torch.int8)
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(48, 32, dtype=torch.float8_e4m3fn)
        tensors["model.layers.7.mlp.down_proj.weight"] = torch.zeros(1, dtype=torch.bfloat16)

    change_weights(folder, change)
    report = check(folder)
    assert {(finding.code, finding.where, finding.message) for finding in report.findings} == {
        ("missing-tensor", ("model.norm.weight",), "the model reads them, and no file holds them"),
        ("wrong-shape", (DOWN,), "stored as [32, 47], expected [32, 48]"),
        (
            "wrong-dtype",
            ("model.layers.0.mlp.down_proj.weight",),
            "stored as I8, expected bfloat16",
        ),
        ("wrong-dtype", ("model.layers.0.mlp.up_proj.weight",), "stored as F8_E4M3, expected bfloat16"),
        (
            "unused-tensor",
            ("model.layers.7.mlp.down_proj.weight",),
            "stored, and nothing in the model reads them; loading refuses what it does not understand",
        ),
        ("wide-weights", (DOWN,), "stored as F32, computed in bfloat16"),
    }
    assert report.count("error") == 5


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_what_is_mistyped_for_lint_is_refused_by_loading(folder: Path, dtype: torch.dtype) -> None:
    change_weights(folder, lambda tensors: tensors.update({DOWN: torch.zeros(32, 48).to(dtype)}))
    assert only(check(folder)).code == "wrong-dtype"
    with pytest.raises(CheckpointError, match=f"tensor '{DOWN}' of .* is {dtype}"):
        make_engine(folder)


def test_a_copy_of_a_tied_head(tmp_path: Path) -> None:
    folder = toy(tmp_path / "tied", tie_word_embeddings=True)
    change_weights(
        folder, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(300, 32, dtype=torch.bfloat16)})
    )
    finding = only(check(folder))
    assert (finding.severity, finding.code, finding.where) == ("note", "tied-head-copy", ("lm_head.weight",))
    assert finding.message == "stored (18.8 KiB), and not read: the head is tied to the embedding"


def test_float32_weights_are_noted(tmp_path: Path) -> None:
    save(toy_model(), tmp_path, architectures=["ToyForCausalLM"], model_type="toy")
    finding = only(check(tmp_path))
    assert (finding.severity, finding.code) == ("note", "wide-weights")
    assert finding.message == "stored as F32, computed in float32"
    assert len(finding.where) == 2 * 7 + 2


# -- config, device, plugins --------------------------------------------------------------------------


def test_an_unknown_architecture_is_listed_by_its_modules(folder: Path) -> None:
    change_config(folder, architectures=["MambaForCausalLM"])
    report = check(folder)
    finding = only(report)
    assert finding.code == "architecture"
    assert "'MambaForCausalLM'" in finding.message
    assert "available: ToyForCausalLM" in finding.message
    assert ("model.layers.{0-1}.mlp.down_proj",) in [row.names for row in report.rows]
    down = next(row for row in report.rows if "down_proj" in row.names[0])
    assert down.format == "weight BF16 [32, 48]"
    assert report.totals.stored


@pytest.mark.parametrize(
    ("fields", "code", "message"),
    [
        ({"architectures": []}, "architecture", "names no architecture"),
        ({"dtype": "float8"}, "dtype", "dtype 'float8' is not supported"),
        ({"num_attention_heads": ...}, "config", "config.json lacks the field 'num_attention_heads'"),
        ({"num_attention_heads": "x"}, "config", "ValueError: invalid literal"),
        (
            {"quantization_config": {"quant_method": "exotic"}},
            "quantisation",
            "method 'exotic' was asked for",
        ),
        ({"quantization_config": 3}, "quantisation", "quantization_config is no object"),
        ({"rope_scaling": {"type": "x"}, "rope_parameters": ...}, "graph", "rope type 'x' is not supported"),
    ],
)
def test_a_config_that_is_refused(folder: Path, fields: dict[str, Any], code: str, message: str) -> None:
    change_config(folder, **fields)
    finding = only(check(folder))
    assert (finding.severity, finding.code) == ("error", code)
    assert message in finding.message


def test_a_config_that_is_no_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    finding = only(check(folder))
    assert finding.code == "bad-config"


def test_several_refusals_are_all_named(folder: Path) -> None:
    change_config(folder, architectures=["X"], dtype="float8", quantization_config={"quant_method": "exotic"})
    assert {finding.code for finding in check(folder).findings} == {"architecture", "dtype", "quantisation"}


def test_settings_count(folder: Path) -> None:
    finding = only(check(folder, kv_cache_dtype="fp8_e4m3"))
    assert finding.code == "kv-dtype"
    assert check(folder, dtype="float32").dtype == "float32"
    assert "--server.context_length 999" in only(check(folder, context_length=999)).message


@pytest.mark.parametrize(
    ("arch", "dtype", "kernel"),
    [("7.5", "float16", "torch"), ("8.7", "bfloat16", "ampere"), ("9.0", "bfloat16", "hopper")],
)
def test_a_device_that_is_not_here(folder: Path, arch: str, dtype: str, kernel: str) -> None:
    """Its kernels are chosen and not imported; what this machine lacks is said."""
    report = check(folder, TOY, __name__, arch=arch)
    assert report.dtype == dtype
    assert {(row.kernel or "").partition(" ")[0] for row in report.rows if row.operation == "linear"} == {
        kernel
    }
    notes = {finding.where: finding.message for finding in report.findings}
    if arch == "7.5":
        assert not notes
    else:
        expected = [name for name in ("linear/ampere", "linear/hopper") if arch == "9.0" or "ampere" in name]
        assert notes[tuple(expected)].startswith("they need json>=0, which this machine has")
        assert "needs the package no-such>=1, which is not installed" in notes["linear/uninstalled",]
    assert not report.count("error")


def test_a_kernel_that_cannot_be_imported_is_an_error_where_it_would_run(folder: Path) -> None:
    module = sys.modules[__name__]
    specs = pymllm_kernels()
    try:
        broken = KernelSpec(operation="linear", name="b", implementation="no_module:K", priority=1000)
        module.pymllm_kernels = hookimpl(lambda: [broken])  # type: ignore[attr-defined]
        finding = only(check(folder, TOY, __name__))
    finally:
        module.pymllm_kernels = hookimpl(lambda: specs)  # type: ignore[attr-defined]
    assert (finding.code, finding.where) == ("broken-kernel", ("linear/b",))


@pytest.mark.parametrize("arch", ["87", "sm_87", "8.", "", "8.7.1", "x"])
def test_an_arch_that_is_none(arch: str) -> None:
    with pytest.raises(ConfigError, match=r"give MAJOR\.MINOR, e\.g\. 8\.7 for Orin"):
        imagined_device(arch)


# -- the command --------------------------------------------------------------------------------------


def run(*argv: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pymllm_core", "lint-checkpoint", *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_the_command(folder: Path) -> None:
    """The architecture is one that no installed plugin has: the report of a checkpoint that will not load."""
    done = run(folder, "--json", "--arch", "8.7")
    assert done.returncode == 1
    found = json.loads(done.stdout)
    assert found["counts"] == {"errors": 1, "warnings": 0, "notes": 0}
    assert found["findings"][0]["code"] == "architecture"
    assert found["device"]["capability"] == [8, 7]
    assert not done.stderr


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["./no/such"], 1, "there is no model './no/such'"),
        ([".", "--arch", "x"], 2, "--arch x is no compute capability"),
        ([".", "--arch", "8.7", "--device", "cpu"], 2, "leave one of them out"),
        ([".", "--bandwidth", "0"], 2, "--bandwidth"),
        ([".", "--bandwith", "1"], 2, "did you mean --bandwidth?"),
    ],
)
def test_mistakes_of_a_person(argv: list[str], code: int, message: str) -> None:
    done = run(*argv)
    assert done.returncode == code
    assert message in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_cuda_device_that_is_missing_points_to_arch() -> None:
    done = run(".", "--device", "cuda")
    assert done.returncode == 2
    assert "--arch 8.7 checks for a device that is not here" in done.stderr


def test_exit_codes_and_strict(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from pymllm_core import cli
    from pymllm_core.commands import lint_checkpoint
    from pymllm_core.testing.engines import registry_of

    monkeypatch.setattr(lint_checkpoint, "registry", lambda: registry_of(TOY))
    argv = ["lint-checkpoint", str(folder), "--server.device", "cpu"]
    assert cli.run(argv) == 0
    assert capsys.readouterr().out.rstrip().endswith("it will load: nothing to remark")
    (folder / "x.safetensors.part").write_bytes(b"")
    assert cli.run(argv) == 0
    assert "it will load: 1 warning" in capsys.readouterr().out
    assert cli.run([*argv, "--strict"]) == 1
    # Names of a stranger's file do not reach the terminal as commands.
    change_weights(folder, lambda tensors: tensors.update({"evil\x1b[2J\n": torch.zeros(1)}))
    change_config(folder, architectures=["MambaForCausalLM"])
    assert cli.run(argv) == 1
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "evil\\x1b[2J\\x0a" in out
    assert "error: architectures: model architecture 'MambaForCausalLM' was asked for" in out
    assert out.rstrip().endswith("it will not load: 1 error, 1 warning")
