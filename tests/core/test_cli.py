"""The ``pymllm`` program: listing and loading commands, exit codes, and what a person or a script sees."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import click
import pytest

from pymllm_core import cli
from pymllm_core.commands.base import human_bytes
from pymllm_core.errors import ConfigError, EngineError
from pymllm_core.hookspecs import hookimpl
from pymllm_core.plugins import Registry, build_registry, module_candidate
from pymllm_core.specs import CONTRACT, CommandSpec, Needs

HERE = __name__


@click.command("greet")
@click.option("--loud", is_flag=True)
def greet(loud: bool) -> None:
    """Say hello."""
    click.echo("HELLO" if loud else "hello")


def failing(error: BaseException) -> click.Command:
    def callback() -> None:
        raise error

    return click.Command("fail", callback=callback)


config_error = failing(ConfigError("--server.port: found 0"))
engine_error = failing(EngineError("it stopped"))
interrupted = failing(KeyboardInterrupt())
no_command = 3


def registry_of(*specs: CommandSpec, twice: bool = False, broken: bool = False) -> Registry:
    @hookimpl
    def pymllm_commands() -> list[CommandSpec]:
        return list(specs)

    plugin = SimpleNamespace(CONTRACT=CONTRACT, pymllm_commands=pymllm_commands)
    candidates = [module_candidate(plugin, "one")]
    if twice:
        candidates.append(module_candidate(plugin, "two"))
    if broken:
        candidates.append(module_candidate(SimpleNamespace(CONTRACT="9.0"), "broken"))
    return build_registry(candidates)


@pytest.fixture(autouse=True)
def commands_are_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cli_test_commands", sys.modules[HERE])
    monkeypatch.delenv("PYMLLM_TRACEBACK", raising=False)


def spec(name: str, attribute: str, **fields: Any) -> CommandSpec:
    return CommandSpec(name=name, implementation=f"cli_test_commands:{attribute}", **fields)


def test_a_command_runs_with_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["greet", "--loud"], registry_of(spec("greet", "greet"))) == 0
    assert capsys.readouterr().out == "HELLO\n"


def test_listing_imports_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    absent = CommandSpec(name="absent", implementation="no_such_module:x", help="does things")
    assert cli.run(["--help"], registry_of(absent)) == 0
    out = capsys.readouterr().out
    assert "absent" in out
    assert "does things" in out


def test_help_mentions_failed_plugins(capsys: pytest.CaptureFixture[str]) -> None:
    cli.run(["--help"], registry_of(broken=True))
    assert "1 plugin failure(s); see `pymllm plugins`" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("specs", "options", "argv", "code", "message"),
    [
        ([spec("greet", "greet")], {}, ["gret"], 2, "there is no command 'gret'; did you mean greet?"),
        ([], {"broken": True}, ["gone"], 2, "plugin broken (broken): it was built for hook contract 9.0"),
        ([spec("x", "greet")], {"twice": True}, ["x"], 2, "the command 'x' is claimed by one and two"),
        ([spec("x", "no_command")], {}, ["x"], 1, "is a int, not a click.Command"),
        ([spec("x", "missing")], {}, ["x"], 1, "'cli_test_commands:missing' cannot be imported"),
        (
            [spec("x", "greet", needs=Needs(modules={"no_such_module": "nowhere>=1"}))],
            {},
            ["x"],
            1,
            "needs the package nowhere>=1, which is not installed: pip install 'nowhere>=1'",
        ),
        ([spec("x", "config_error")], {}, ["x"], 2, "error: --server.port: found 0"),
        ([spec("x", "engine_error")], {}, ["x"], 1, "error: it stopped"),
        ([spec("greet", "greet")], {}, ["greet", "--lout"], 2, "--loud"),
    ],
)
def test_errors_are_a_message_and_a_code(
    specs: list[CommandSpec],
    options: dict[str, bool],
    argv: list[str],
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.run(argv, registry_of(*specs, **options)) == code
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""
    assert "Traceback" not in captured.err


def test_a_traceback_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYMLLM_TRACEBACK", "1")
    with pytest.raises(EngineError):
        cli.run(["x"], registry_of(spec("x", "engine_error")))


def test_ctrl_c_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["x"], registry_of(spec("x", "interrupted"))) == 130
    captured = capsys.readouterr()
    assert captured.out.strip() == ""
    assert captured.err.strip() == ""


# The installed program, in a process of its own


def pymllm(*argv: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pymllm_core", *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)


def test_plugins_is_quick_and_imports_no_torch() -> None:
    code = "import sys; from pymllm_core import cli; cli.run(['plugins']); print('torch' in sys.modules)"
    times = []
    for _ in range(5):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        times.append(time.perf_counter() - start)
    lines = done.stdout.splitlines()
    assert lines[0].startswith("pymllm-core ")
    assert "  commands: plugins, plan, lint-checkpoint, doctor, generate, chat, bench, version" in lines
    assert lines[-1] == "False"
    # 0.2 s alone on the machine; the bound leaves room for what else runs there.
    assert min(times) < 0.5


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        ["plan", "--help"],
        ["lint-checkpoint", "--help"],
        ["generate", "--help"],
        ["version"],
        ["chat", "-h"],
        ["bench", "one-batch", "-h"],
    ],
)
def test_help_and_version_import_no_torch(argv: list[str]) -> None:
    code = f"import sys; from pymllm_core import cli; cli.run({argv!r}); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_plugins_as_json() -> None:
    done = pymllm("plugins", "--json")
    found = json.loads(done.stdout)
    core = found["plugins"][0]
    assert core["distribution"] == "pymllm-core"
    names = [entry["name"] for entry in core["hooks"]["pymllm_commands"]]
    assert names == [
        *("plugins", "plan", "lint-checkpoint", "doctor", "generate", "chat", "bench", "version"),
    ]
    assert found["contract"] == CONTRACT


def test_plugins_strict_fails_on_failures() -> None:
    import os

    environment = {**os.environ, "PYMLLM_PLUGINS": "no-such-plugin"}
    done = pymllm("plugins", env=environment)
    assert done.returncode == 0
    assert "PYMLLM_PLUGINS names 'no-such-plugin'" in done.stdout
    assert pymllm("plugins", "--strict", env=environment).returncode == 1


def test_version() -> None:
    assert pymllm("--version").stdout.startswith("pymllm ")
    found = json.loads(pymllm("version", "--json").stdout)
    assert {"pymllm-core", "torch", "python"} <= set(found)
    assert "pymllm-core" in pymllm("version").stdout


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["plan"], 2, "Missing argument 'MODEL'"),
        (["plan", "x", "--port", "1"], 2, "there is no option --port; did you mean --server.port?"),
        (["plan", "x", "--jsn"], 2, "there is no option --jsn; did you mean --json?"),
        (["plan", "x", "--server.port", "0"], 2, "error: --server.port: found '0'"),
        (["plan", "./no/such/folder"], 1, "error: there is no model './no/such/folder'"),
        (["generate", "x", "-", "--max-tokens", "0"], 2, "0 is not in the range x>=1"),
        (["generate", "x"], 2, "standard input was empty"),
    ],
)
def test_mistakes_of_a_person(argv: list[str], code: int, message: str) -> None:
    done = pymllm(*argv, stdin=subprocess.DEVNULL)
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_closed_pipe_is_no_traceback() -> None:
    command = f"{sys.executable} -m pymllm_core plugins --json | head -c 1"
    done = subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True, check=False)
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 << 30, "3.0 GiB"), (5 << 40, "5.0 TiB")],
)
def test_human_bytes(count: int, text: str) -> None:
    assert human_bytes(count) == text
