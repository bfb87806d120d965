"""The programs that are asked: a tiny model with random weights and Qwen3's tokenizer, and the demo model.

Each is skipped, by name, where what it needs is not there.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # pytest's importlib mode leaves siblings unimportable

from served_program import Program, require, tiny_flags

TINY = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "attention_bias": False,
    "torch_dtype": "float32",
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory, shared_qwen):
    require("pymllm", "pymllm_qwen3")
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "config.json").write_text(json.dumps(TINY))
    for file in (shared_qwen / "tokenizer").iterdir():
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def tiny(tiny_folder, tmp_path_factory):
    program = Program(tmp_path_factory.mktemp("log") / "log", *tiny_flags(tiny_folder))
    program.wait(200)
    yield program
    program.close()


@pytest.fixture(scope="module")
def apart(tiny_folder, tmp_path_factory):
    """The same with the engine in a process of its own."""
    flags = (*tiny_flags(tiny_folder), "--server.engine_process", "on", "--server.enable_metrics")
    program = Program(tmp_path_factory.mktemp("log") / "log", *flags)
    program.wait(200)
    yield program
    program.close()


@pytest.fixture(params=["tiny", "apart"])
def either(request):
    """The tiny model's server, the engine on a thread or in a process."""
    return request.getfixturevalue(request.param)


@pytest.fixture(params=["off", "on"])
def own_process(request):
    """Flags that decide where the engine runs."""
    return ("--server.engine_process", request.param)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    require("pymllm", "pymllm_qwen3", "pymllm_demo")
    folder = Path(importlib.util.find_spec("pymllm_demo").origin).parent / "model"
    if not list(folder.glob("*.safetensors")):
        pytest.skip(f"the demo model has no weights in {folder}")
    program = Program(tmp_path_factory.mktemp("log") / "log", "--server.model_path", "demo")
    program.wait(200)
    yield program
    program.close()
