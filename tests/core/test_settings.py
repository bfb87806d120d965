"""Settings from flags, environment and TOML: precedence, forms of values, and what an error says."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pymllm_core.config import Settings
from pymllm_core.errors import ConfigError
from pymllm_core.flags import BOOLEANS, flags, normalise, partition
from pymllm_core.settings import load_settings, load_settings_or_exit, settings_help

MODEL = ["--server.model_path", "MODEL"]
MANUAL = """
  --server.model_path MODEL --server.tokenizer_path MODEL --server.load_format safetensors
  --server.dtype float16 --quantization.method compressed-tensors --server.host 0.0.0.0
  --server.port 30000 --server.attention_backend auto
  --server.gdn_decode_backend pytorch --server.mem_fraction_static 0.05 --server.max_running_requests 1
  --server.max_total_tokens 256 --server.max_prefill_tokens 128 --server.disable_radix_cache
  --server.disable_cuda_graph --server.log_level debug
""".split()


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings of whoever runs the tests must not matter."""
    for name in list(os.environ):
        if name.startswith("PYMLLM_"):
            monkeypatch.delenv(name)


def test_the_manuals_command_runs_as_written() -> None:
    found = load_settings(MANUAL)
    assert found.quantization.method == "compressed-tensors"
    server = found.server
    assert (server.model_path, server.tokenizer_path, server.dtype) == ("MODEL", "MODEL", "float16")
    assert (server.host, server.port, server.mem_fraction_static) == ("0.0.0.0", 30000, 0.05)
    assert (server.max_running_requests, server.max_total_tokens, server.max_prefill_tokens) == (1, 256, 128)
    assert server.disable_radix_cache is True
    assert server.disable_cuda_graph is True
    assert server.log_level == "debug"


def test_nothing_given_is_the_defaults() -> None:
    assert load_settings(MODEL) == Settings.of("MODEL")
    assert load_settings([], model="MODEL") == Settings.of("MODEL")


def test_the_models_argument_goes_before_its_flag() -> None:
    assert load_settings(MODEL, model="-odd name").server.model_path == "-odd name"


@pytest.mark.parametrize("form", [["--server.port=1"], ["--server.port", "1"]])
def test_values_follow_a_space_or_an_equals_sign(form: list[str]) -> None:
    assert load_settings([*MODEL, *form]).server.port == 1


def test_hyphens_are_underscores_and_the_last_mention_counts() -> None:
    argv = [*MODEL, "--server.max-total-tokens", "1", "--server.max_total_tokens=2"]
    assert load_settings(argv).server.max_total_tokens == 2


@pytest.mark.parametrize("word", [*BOOLEANS, "True", "OFF"])
@pytest.mark.parametrize("joined", [False, True])
def test_booleans_take_an_optional_value(word: str, joined: bool) -> None:
    flag = "--server.disable_radix_cache"
    argv = [f"{flag}={word}"] if joined else [flag, word]
    assert load_settings([*argv, *MODEL]).server.disable_radix_cache is (BOOLEANS[word.lower()] == "true")


def test_a_bare_boolean_is_true_wherever_it_stands() -> None:
    for argv in (["--server.disable_radix_cache", *MODEL], [*MODEL, "--server.disable_radix_cache"]):
        assert load_settings(argv).server.disable_radix_cache is True


@pytest.mark.parametrize("value", [["a", "b"], ["a,b"], ['["a", "b"]']])
def test_lists_take_several_forms(value: list[str]) -> None:
    argv = [*MODEL, "--server.cors_allow_origins", *value]
    assert load_settings(argv).server.cors_allow_origins == ("a", "b")


def test_values_are_taken_literally() -> None:
    argv = ["--server.model_path=a, b=c", "--server.fastapi_root_path=", "--server.api_key", "-k"]
    server = load_settings(argv).server
    assert (server.model_path, server.fastapi_root_path) == ("a, b=c", "")
    assert server.api_key is not None
    assert server.api_key.get_secret_value() == "-k"


def test_flags_before_environment_before_file_before_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(
        '[server]\nmodel_path = "F"\nport = 1\nhost = "file"\nlog_level = "error"\n'
        '[quantization]\nkv_cache_dtype = "float16"\n'
    )
    monkeypatch.setenv("PYMLLM_CONFIG", str(file))
    monkeypatch.setenv("PYMLLM_SERVER__PORT", "2")
    monkeypatch.setenv("PYMLLM_SERVER__HOST", "environment")
    monkeypatch.setenv("PYMLLM_SERVER__ENABLE_METRICS", "on")
    found = load_settings(["--server.port", "3"])
    server = found.server
    assert (server.port, server.host, server.log_level) == (3, "environment", "error")
    assert (server.model_path, server.enable_metrics, server.decode_log_interval) == ("F", True, 40)
    assert found.quantization.kv_cache_dtype == "float16"
    other = tmp_path / "other.toml"
    other.write_text('[server]\nmodel_path = "O"\n')
    assert load_settings(["--config", str(other)]).server.model_path == "O"


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--server.prot", "1"], ["no flag --server.prot", "did you mean --server.port"]),
        (["--port", "1"], ["no flag --port", "did you mean --server.port?"]),
        (["--server.zzzzzz", "1"], ["no flag --server.zzzzzz", "--help lists all flags"]),
        (
            ["--server.port", "x"],
            ["--server.port", "found 'x'", "whole number of at least 1 and at most 65535"],
        ),
        (["--server.port", "0"], ["--server.port", "found '0'", "at least 1 and at most 65535"]),
        (["--server.mem_fraction_static", "1"], ["--server.mem_fraction_static", "above 0 and below 1"]),
        (["--server.schedule_conservativeness", "0"], ["--server.schedule_conservativeness", "above 0"]),
        (["--server.context_length", "-1"], ["--server.context_length", "found '-1'", "at least 1"]),
        (["--server.dtype", "f16"], ["--server.dtype", "found 'f16'", "auto, float16, bfloat16, float32"]),
        (
            ["--server.disable_radix_cache", "maybe"],
            ["--server.disable_radix_cache", "found 'maybe'", "true"],
        ),
        (["--server.port"], ["--server.port needs a value"]),
        (["--server.port", "--server.host", "x"], ["--server.port needs a value"]),
        (["--server.extra_options", "{x"], ["--server.extra_options", "found '{x'", "a JSON object"]),
        (["--server.enable_torch_compile"], ["--server.enable_torch_compile is refused", "remove it"]),
        (["--server.sleep_on_idle", "false"], ["--server.sleep_on_idle=false is refused"]),
        (["stray"], ["unexpected argument 'stray'"]),
        (["--config"], ["--config needs the path"]),
        (["--config", "/no/such/file"], ["/no/such/file cannot be read", "No such file"]),
    ],
)
def test_an_error_names_flag_finding_and_what_is_allowed(argv: list[str], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings([*MODEL, *argv])
    for part in parts:
        assert part in str(caught.value)


def test_a_missing_model_says_how_to_name_one() -> None:
    for argv in ([], ["--server.port", "1"]):
        with pytest.raises(ConfigError, match=r"no model was named: give --server\.model_path"):
            load_settings(argv)


def test_several_errors_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings([*MODEL, "--server.port", "0", "--server.dtype", "x"])
    assert "--server.port" in str(caught.value)
    assert "--server.dtype" in str(caught.value)


def test_secrets_are_not_repeated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "s.toml"
    file.write_text("[server]\napi_key = 123456\n")
    with pytest.raises(ConfigError, match="found a secret") as caught:
        load_settings([*MODEL, "--config", str(file)])
    assert "123456" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "parts"),
    [
        ("PYMLLM_SERVER__PORT", "0", ["PYMLLM_SERVER__PORT: found '0'"]),
        ("PYMLLM_SERVER__PROT", "1", ["PYMLLM_SERVER__PROT", "no such setting", "server.port"]),
        ("PYMLLM_SERVER", "x", ["PYMLLM_SERVER: found 'x', allowed: a JSON object"]),
        (
            "PYMLLM_SERVER__CORS_ALLOW_ORIGINS",
            "x",
            ["PYMLLM_SERVER__CORS_ALLOW_ORIGINS: found 'x'", "JSON list"],
        ),
    ],
)
def test_an_error_in_the_environment_names_the_variable(
    name: str, value: str, parts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as caught:
        load_settings(MODEL)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('[server]\nport = "a"\n', ["s.toml: server.port: found 'a'", "whole number"]),
        ("[server]\nprot = 1\n", ["s.toml: server.prot", "no such setting", "server.port"]),
        ("[sever]\nport = 1\n", ["s.toml: sever", "no such setting", "did you mean server?"]),
        ("[server\n", ["s.toml is no valid TOML", "line 1"]),
        ("server = 3\n", ["s.toml: server: found 3", "a table, [server]"]),
    ],
)
def test_an_error_in_the_file_names_file_and_key(text: str, parts: list[str], tmp_path: Path) -> None:
    file = tmp_path / "s.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_settings([*MODEL, "--config", str(file)])
    for part in parts:
        assert part in str(caught.value)


def test_or_exit_prints_and_leaves_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load_settings_or_exit([*MODEL, "--server.port", "0"])
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: --server.port: found '0'")
    assert "Traceback" not in captured.err


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_leaves_with_0(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load_settings([flag])
    assert caught.value.code == 0
    assert "--server.port INT" in capsys.readouterr().out


def test_help_has_every_flag_with_default_and_description() -> None:
    text = "".join(settings_help().split())  # lines break at blanks and hyphens
    for flag in flags().values():
        assert flag.name in text
        assert flag.description, f"{flag.name} has no description"
        assert "".join(flag.description.split()) in text
    assert "porttolistenon[default:30000]" in text
    assert "\x1b" not in text


def test_partition_leaves_a_programs_own_flags_alone() -> None:
    argv = [*MANUAL, "--run-name", "NAME", "--batch-size", "1", "--input-len", "256", "512", "--config=x"]
    settings, rest = partition(argv)
    assert rest == ["--run-name", "NAME", "--batch-size", "1", "--input-len", "256", "512"]
    assert settings == [*MANUAL, "--config=x"]
    assert partition(["--server.disable_radix_cache", "MODEL"]) == (
        ["--server.disable_radix_cache"],
        ["MODEL"],
    )
    assert partition(["--", "--server.port", "1"]) == ([], ["--", "--server.port", "1"])


@given(st.lists(st.text(min_size=0, max_size=12), max_size=6))
def test_any_command_line_gives_settings_or_a_message(argv: list[str]) -> None:
    if any(token in ("-h", "--help") for token in argv):
        return
    with contextlib.suppress(ConfigError):
        assert load_settings(argv, model="M").server.model_path == "M"


@given(st.sampled_from(sorted(flags())), st.text(max_size=20))
def test_any_value_gives_settings_or_a_message(flag: str, value: str) -> None:
    with contextlib.suppress(ConfigError):
        assert load_settings([f"{flag}={value}"], model="M").server.model_path == "M"


@given(st.lists(st.sampled_from([*sorted(flags()), "true", "1", "x", "--batch-size", "a,b"]), max_size=8))
def test_normalised_flags_are_stable(argv: list[str]) -> None:
    try:
        once, _ = normalise(partition(argv)[0])
    except ConfigError:
        return
    assert normalise(once)[0] == once


def test_importing_it_imports_no_heavy_library() -> None:
    code = (
        "import sys, pymllm_core.settings; "
        "print([m for m in ('torch', 'transformers', 'pydantic_settings', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
