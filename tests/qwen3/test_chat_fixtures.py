"""Qwen's own tokenizer and chat template, through the processor, against reference renderings and ids."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pymllm_core import SamplingParams
from pymllm_core.config import ServerSettings
from pymllm_core.engine.engine import Engine
from pymllm_core.engine.processor import load_tokenizer
from pymllm_core.errors import RequestError
from pymllm_core.testing.engines import make_engine, run
from pymllm_qwen3 import plugin

QWEN3 = "pymllm_qwen3.plugin"


@pytest.fixture(scope="module")
def engine(shared_qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """A narrow model with the vocabulary, configs and tokenizer of Qwen3-0.6B."""
    folder = tmp_path_factory.mktemp("qwen3")
    for source in (shared_qwen / "tokenizer", shared_qwen / "configs" / "Qwen3-0.6B"):
        shutil.copytree(source, folder, dirs_exist_ok=True, copy_function=shutil.copyfile)
        folder.chmod(0o755)
    config = json.loads((folder / "config.json").read_text())
    narrow = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    narrow |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    (folder / "config.json").write_text(json.dumps({**config, **narrow}))
    return make_engine(folder, QWEN3, load_format="dummy", max_total_tokens=4096)


def fixture(shared_qwen: Path, name: str) -> list[dict[str, Any]]:
    cases: list[dict[str, Any]] = json.loads((shared_qwen / "fixtures" / name).read_text())
    assert cases
    return cases


def test_every_chat_of_the_fixtures(engine: Engine, shared_qwen: Path) -> None:
    for case in fixture(shared_qwen, "chat_qwen3.json"):
        thinking = case["enable_thinking"]
        chat = engine.processor.from_chat(
            case["messages"],
            tools=case["tools"],
            template_kwargs=None if thinking is None else {"enable_thinking": thinking},
        )
        assert chat.request.token_ids == tuple(case["ids"]), case["name"]
        assert case["text"].endswith(chat.prompt_tail)
        assert len(chat.prompt_tail) == min(len(case["text"]), 256)
        assert engine.processor.decode(case["ids"], skip_special_tokens=False) == case["text"]


def test_every_encoding_of_the_fixtures(engine: Engine, shared_qwen: Path) -> None:
    for case in fixture(shared_qwen, "encodings.json"):
        assert engine.processor.from_text(case["text"]).token_ids == tuple(case["ids"]), case["text"]


def test_the_familys_class_reads_what_autotokenizer_does(
    shared_qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it alone is asked where the folder names it, else AutoTokenizer."""
    (known,) = {spec.tokenizer for spec in plugin.pymllm_models()}
    folder = shared_qwen / "tokenizer"
    settings = ServerSettings(model_path=str(folder))
    expected = load_tokenizer(folder, settings)
    asked: list[str] = []

    class Auto:
        @staticmethod
        def from_pretrained(name: str, **options: object) -> object:
            asked.append(name)
            return expected

    # By its name: transformers replaces itself when a model's module is imported.
    monkeypatch.setattr("transformers.AutoTokenizer", Auto)
    found = load_tokenizer(folder, settings, known)
    assert not asked
    assert found is not None
    assert type(found) is type(expected)
    assert found._tokenizer.to_str() == expected._tokenizer.to_str()
    differ = {
        k for k in vars(found) | vars(expected) if str(vars(found).get(k)) != str(vars(expected).get(k))
    }
    assert not differ
    stored = json.loads((folder / "tokenizer_config.json").read_text())
    for change in (
        {"tokenizer_class": "LlamaTokenizer"},
        {"auto_map": {"AutoTokenizer": ["a.B", None]}},
    ):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**stored, **change}))
        assert load_tokenizer(tmp_path, settings, known) is expected
    assert asked == [str(tmp_path)] * 2


@pytest.mark.parametrize("name", ["TokenizersBackend", "PreTrainedTokenizerFast"])
def test_the_general_class_reads_what_autotokenizer_does(
    shared_qwen: Path, tmp_path: Path, name: str
) -> None:
    """The name that transformers 5 writes, or that before it."""
    (known,) = {spec.tokenizer for spec in plugin.pymllm_models()}
    stored = json.loads((shared_qwen / "tokenizer" / "tokenizer_config.json").read_text())
    shutil.copy(shared_qwen / "tokenizer" / "tokenizer.json", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**stored, "tokenizer_class": name}))
    settings = ServerSettings(model_path=str(tmp_path))
    found, expected = load_tokenizer(tmp_path, settings, known), load_tokenizer(tmp_path, settings)
    assert found is not None
    assert type(found) is type(expected)
    assert found._tokenizer.to_str() == expected._tokenizer.to_str()


def test_no_model_is_imported_for_the_general_class(shared_qwen: Path, tmp_path: Path) -> None:
    """Which ``AutoTokenizer`` does: four seconds of a start on the machine where it was found."""
    (known,) = {spec.tokenizer for spec in plugin.pymllm_models()}
    shutil.copy(shared_qwen / "tokenizer" / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "TokenizersBackend"}')
    script = f"""if True:
        import sys
        from pathlib import Path
        from pymllm_core.config import ServerSettings
        from pymllm_core.engine.processor import load_tokenizer
        load_tokenizer(Path({str(tmp_path)!r}), ServerSettings(model_path="x"), {known!r})
        assert "transformers.models.auto.auto_factory" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", script], check=True)


def test_text_parts_are_joined(engine: Engine) -> None:
    whole = engine.processor.from_chat([{"role": "user", "content": "Hi there"}])
    parts = [{"type": "text", "text": "Hi "}, {"type": "text", "text": "there"}]
    assert (
        engine.processor.from_chat([{"role": "user", "content": parts}]).request.token_ids
        == whole.request.token_ids
    )


def test_messages_that_the_template_refuses(engine: Engine) -> None:
    with pytest.raises(RequestError, match="the chat template cannot render these messages") as caught:
        engine.processor.from_chat([])
    assert caught.value.param == "messages"


def test_defaults_of_the_checkpoint(engine: Engine) -> None:
    assert engine.processor.sampling() == SamplingParams(temperature=0.6, top_k=20, top_p=0.95)
    assert engine.processor.eos_token_ids == {151645, 151643}
    assert engine.processor.vocab_size == 151669
    assert engine.plan.vocab_size == 151936


def test_answers_are_text_and_made_of_known_tokens(engine: Engine) -> None:
    """A model that knows nothing says anything: tokens of all kinds come out as text, and none is unknown."""
    params = SamplingParams(
        max_tokens=60, temperature=100.0, ignore_eos=True, seed=1, skip_special_tokens=False
    )
    request = engine.processor.from_text("Hi", params, request_id="r")
    answer = run(engine, [request])["r"]
    assert max(answer.token_ids) < 151669
    whole = engine.processor.decode(answer.token_ids, skip_special_tokens=False)
    assert whole.startswith(answer.text)
    assert set(whole[len(answer.text) :]) <= {"\ufffd"}
    answer.text.encode()


def test_the_parsers_of_the_family_are_chosen(engine: Engine) -> None:
    chosen = {kind: choice.spec.name for kind, choice in engine.plan.parsers.items() if choice is not None}
    assert chosen == {"reasoning": "qwen3", "tool_calls": "hermes"}
