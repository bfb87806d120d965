"""The project's tasks. `nox` runs all checks; `nox -s demo` serves the demo model; `nox -l` lists them.

Every session gets an environment of its own with exactly the packages that its name says, installed
from wheels built of this tree. Only torch and transformers, which take most of the time and of the
disk, are installed once for all sessions: in a base environment that a .pth file lets the others see.
It holds nothing of ours, so what a session lacks stays missing. Another Python: ``nox -P 3.12``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nox

ROOT = Path(__file__).resolve().parent
CACHE = ROOT / ".nox" / "_shared"
REPORTS = ROOT / ".nox" / "_reports"
TOOLS = nox.project.load_toml(ROOT / "pyproject.toml")
CONSTRAINTS = ROOT / "constraints.txt"
BASE = ("torch>=2.4", "transformers>=5")

PACKAGES = (
    "pymllm_core", "pymllm_qwen3", "pymllm_quant_ct", "pymllm_kernels", "pymllm_server", "pymllm_demo",
    "pymllm",
)  # fmt: skip
COMBINATIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...], str]] = {
    "core": (("pymllm_core",), ("tests/core",), "test"),
    "core+qwen3": (("pymllm_core", "pymllm_qwen3"), ("tests/qwen3",), "test"),
    "core+qwen3+quant_ct": (
        ("pymllm_core", "pymllm_qwen3", "pymllm_quant_ct"),
        ("tests/quant_ct",),
        "test-quant",
    ),
    "core+kernels": (("pymllm_core", "pymllm_kernels"), ("tests/kernels",), "test-kernels"),
    "core+server": (("pymllm_core", "pymllm_server"), ("tests/server",), "test-server"),
    # Not tests/kernels, whose numbers do not depend on what else is installed.
    "everything": (
        PACKAGES,
        ("tests/core", "tests/qwen3", "tests/quant_ct", "tests/server", "tests/end_to_end"),
        "test-all",
    ),
}
"""Session: the packages that are installed, the tests that run, and the group of test tools."""

nox.needs_version = ">=2024.10.9"
nox.options.default_venv_backend = "virtualenv"
nox.options.sessions = ["lint", "types", *COMBINATIONS, "cuda-build"]


# ---- environments ----


def group(name: str) -> list[str]:
    """The requirements of one dependency group of the root pyproject.toml."""
    return list(nox.project.dependency_groups(TOOLS, name))


def table(package: str, name: str) -> dict[str, Any]:
    """A table of the package's pyproject.toml."""
    found: dict[str, Any] = nox.project.load_toml(ROOT / package / "pyproject.toml")[name]
    return found


def ask(session: nox.Session, code: str) -> str:
    """What `code` prints in the session's environment."""
    return str(session.run("python", "-c", code, silent=True)).strip()


@contextlib.contextmanager
def built_once(folder: Path, key: str) -> Iterator[bool]:
    """Yield whether `folder` must be filled, because it is not complete for `key`."""
    stamp = folder / "complete"
    if stamp.is_file() and stamp.read_text() == key:
        yield False
        return
    shutil.rmtree(folder, ignore_errors=True)
    yield True
    stamp.write_text(key)


def see_base(session: nox.Session) -> None:
    """Let the session's environment see torch and transformers of the base environment."""
    version = ask(session, "import sys; print(sys.version)")
    folder = CACHE / f"base-{version.split()[0]}"
    key = hashlib.sha256(f"{version}\n{BASE}\n{CONSTRAINTS.read_text()}".encode()).hexdigest()
    paths = "import sysconfig; print(sysconfig.get_path('purelib')); print(sysconfig.get_path('platlib'))"
    with built_once(folder, key) as missing:
        if missing:
            session.log(f"installing {' and '.join(BASE)} once for all sessions, in {folder}")
            session.run("python", "-m", "venv", str(folder), silent=True)
            python = str(folder / "bin" / "python")
            session.run(
                python, "-m", "pip", "install", "--quiet", "-c", str(CONSTRAINTS), *BASE, external=True
            )
    base = subprocess.run(
        [folder / "bin" / "python", "-c", paths], check=True, capture_output=True, text=True
    ).stdout
    own = Path(ask(session, paths).splitlines()[0])
    (own / "_base.pth").write_text("".join(f"{line}\n" for line in dict.fromkeys(base.splitlines())))


def wheels(session: nox.Session) -> dict[str, str]:
    """Every package's wheel, built once for each state of the tree."""
    skip = {"__pycache__", ".pytest_cache", ".mypy_cache", ".ruff_cache", "dist", "build"}
    digest = hashlib.sha256()
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*")):
            if path.is_file() and not skip & set(path.parts):
                digest.update(f"{path.relative_to(ROOT)}\0{path.stat().st_mode}\0".encode())
                digest.update(path.read_bytes())
    folder = CACHE / "wheels"
    with built_once(folder, digest.hexdigest()) as missing:
        if missing:
            # One environment with the build tools of all packages, instead of an isolated one for each.
            builder = CACHE / "builder"
            python = str(builder / "bin" / "python")
            backends = sorted(
                {need for package in PACKAGES for need in table(package, "build-system")["requires"]}
            )
            with built_once(builder, repr(backends)) as absent:
                if absent:
                    session.run(sys.executable, "-m", "venv", str(builder), external=True)
                    session.run(python, "-m", "pip", "install", "--quiet", *backends, external=True)
            pip_wheel = (python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation")
            folders = [str(ROOT / package) for package in PACKAGES]
            session.run(*pip_wheel, "--wheel-dir", str(folder), *folders, external=True)
    return {path.name.partition("-")[0]: str(path) for path in folder.glob("*.whl")}


def install(session: nox.Session, packages: tuple[str, ...], *requirements: str) -> None:
    """Install these packages of ours, and nothing else of ours, with what they need."""
    see_base(session)
    built = wheels(session)
    session.install("-c", str(CONSTRAINTS), *(built[package] for package in packages), *requirements)
    found = ask(
        session,
        "import importlib.metadata as m; "
        "print(*sorted(d.name for d in m.distributions() if d.name.startswith('pymllm')))",
    ).split()
    wanted = sorted(package.replace("_", "-") for package in packages)
    if found != wanted:
        session.error(f"expected the packages {wanted} in this environment, found {found}")


def tests(name: str) -> Callable[[nox.Session], None]:
    """A session that runs the tests of one combination of packages."""
    packages, folders, tools = COMBINATIONS[name]

    def run(session: nox.Session) -> None:
        install(session, packages, *group(tools))
        report = REPORTS / f"{name}.xml"
        # `pytest`, not `python -m pytest`: the repository's root must not be importable, because its
        # folders have the packages' names. PYTHONPATH is dropped for the same reason.
        session.run(
            "pytest", "--timeout=300", f"--junitxml={report}", *(session.posargs or folders),
            # One thread: on a busy machine two threads wait for each other longer than small products take.
            env={
                "PYTHONPATH": None, "PYTHONSAFEPATH": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1",
            },
        )  # fmt: skip

    run.__doc__ = f"Tests of {' '.join(folders)} with {', '.join(packages)} installed, nothing else of ours."
    return run


# ---- checks ----


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff (rules and format), and the contract of who may import whom."""
    session.install(*group("lint"))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    sources = os.pathsep.join(str(ROOT / package / "src") for package in PACKAGES)
    session.run("lint-imports", "--no-cache", env={"PYTHONPATH": sources})


@nox.session
def types(session: nox.Session) -> None:
    """Mypy in strict mode over the sources of all packages."""
    see_base(session)
    needed: set[str] = set()
    for package in PACKAGES:
        wanted = table(package, "project").get("dependencies", ())
        needed.update(need for need in wanted if not need.startswith("pymllm"))
    session.install("-c", str(CONSTRAINTS), *sorted(needed), *group("types"))
    session.run("mypy", *(f"{package}/src" for package in PACKAGES), env={"PYTHONPATH": None})


for _name in COMBINATIONS:
    nox.session(name=_name)(tests(_name))


@nox.session(name="cuda-build")
def cuda_build(session: nox.Session) -> None:
    """Compile the CUDA sources without a GPU: the fastest tile of each (`-- all`: every tile, for minutes)."""
    if sys.platform != "linux":
        session.skip("NVIDIA's wheels of nvcc are for Linux")
    if unknown := set(session.posargs) - {"all"}:
        session.error(f"unknown arguments {sorted(unknown)}; the session knows all")
    install(session, ("pymllm_core", "pymllm_kernels"), *group("test"), *group("cuda-build"))
    # Its headers of CUTLASS are wanted, not what its Python part requires.
    session.install("--no-deps", "nvidia-cutlass==4.2.0.0")
    packages = Path(ask(session, "import sysconfig; print(sysconfig.get_path('purelib'))"))
    session.run(
        "pytest", f"--junitxml={REPORTS / 'cuda-build.xml'}", "tests/kernels/test_cuda_build.py",
        "tests/kernels/test_cuda_order.py",
        env={
            "PYTHONPATH": None, "PYTHONSAFEPATH": "1", "PYMLLM_CUDA_BUILD": "all" if session.posargs else "smallest",
            # These, whatever else the machine has.
            "CUDACXX": str(packages / "nvidia" / "cu13" / "bin" / "nvcc"),
            "CUTLASS_HOME": str(packages / "cutlass_library" / "source"),
            "PYMLLM_KERNELS_CACHE": session.create_tmp(), "PYMLLM_KERNELS_BUNDLE": None,
        },
    )  # fmt: skip


@nox.session(venv_backend="none")
def gpu(session: nox.Session) -> None:
    """Tests marked `gpu`, with the Python and the torch of this machine; nothing is installed into it."""
    probe = subprocess.run(
        [sys.executable, "-c", "import torch; print(torch.cuda.is_available())"],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    if probe.stdout.strip() != "True":
        session.error(
            f"{sys.executable} has no torch that sees a CUDA device: {probe.stderr or probe.stdout}"
        )
    folder = CACHE / "gpu"
    shutil.rmtree(folder, ignore_errors=True)
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder))
    session.run(*pip, *wheels(session).values())
    report = f"--junitxml={REPORTS / 'gpu.xml'}"
    pytest = (sys.executable, "-P", "-m", "pytest", "-m", "gpu", report)
    # Only the files that hold such tests: the others import tools that the machine need not have.
    files = [
        path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "pytest.mark.gpu" in path.read_text()
    ]
    # FlashInfer's last, whose kernels compile for one or two minutes.
    files.sort(key=lambda path: "flashinfer" in path.name)
    session.run(*pytest, *(session.posargs or map(str, files)), env={"PYTHONPATH": str(folder)})


# ---- demo ----

QUESTION = {
    "model": "default",
    "messages": [{"role": "user", "content": "你好,只回复:ok"}],
    "max_tokens": 8,
    "temperature": 0.0,
    "stream": False,
}
START_LIMIT_S = 300


def free_port(wanted: int) -> int:
    """`wanted` if nothing listens there, else a port that is free."""
    for port in (wanted, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise OSError("no free port on 127.0.0.1")


def fetch(url: str, body: object = None) -> bytes:
    """GET, or POST of `body` as JSON, past any proxy."""
    data = None if body is None else json.dumps(body, ensure_ascii=False).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=120) as answer:
        return bytes(answer.read())


def wait_until_healthy(session: nox.Session, server: subprocess.Popen[bytes], url: str) -> None:
    """Return once /health answers 200; say every few seconds that the wait goes on."""
    start = time.monotonic()
    said = 0.0
    while (elapsed := time.monotonic() - start) < START_LIMIT_S:
        if server.poll() is not None:
            session.error(
                f"the server stopped with exit code {server.returncode}; its reason is printed above"
            )
        doing = "starting"
        try:
            fetch(f"{url}/health")
        except urllib.error.HTTPError as error:
            with error, contextlib.suppress(ValueError, KeyError, TypeError):
                progress = json.load(error)["progress"]
                doing = f"{progress['stage']}, {progress['fraction']:.0%}"
        except OSError:
            pass
        else:
            session.log(f"the server is healthy after {elapsed:.1f} s")
            return
        if elapsed - said >= 3:
            said = elapsed
            session.log(f"waiting for {url}/health since {elapsed:.0f} s: {doing}")
        time.sleep(0.5)
    session.error(f"the server did not become healthy in {START_LIMIT_S} s")


@nox.session
def demo(session: nox.Session) -> None:
    """Serve the demo model, ask it once, go on serving until Ctrl-C (`-- --once`: stop after the answer)."""
    unknown = set(session.posargs) - {"--once"}
    if unknown:
        session.error(f"unknown arguments {sorted(unknown)}; the demo knows --once")
    install(session, PACKAGES)
    port = free_port(30000)
    if port != 30000:
        session.log(f"port 30000 is in use, serving on port {port}")
    url = f"http://127.0.0.1:{port}"
    command = [
        str(Path(session.bin) / "python"), "-m", "pymllm.server.launch",
        "--server.model_path", "demo", "--server.host", "127.0.0.1", "--server.port", str(port),
    ]  # fmt: skip
    session.log(" ".join(command))
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    # From a folder where no folder has a package's name.
    server = subprocess.Popen(command, cwd=CACHE, env=variables, stdin=subprocess.DEVNULL)
    try:
        wait_until_healthy(session, server, url)
        try:
            answer = json.loads(fetch(f"{url}/v1/chat/completions", QUESTION))
        except urllib.error.HTTPError as error:
            session.error(f"the server answered {error.code}: {error.read().decode(errors='replace')}")
        session.log(json.dumps(answer, ensure_ascii=False, indent=2))
        content = answer["choices"][0]["message"]["content"]
        if not (content or "").strip():
            session.error("the answer is empty")
        session.log(f"question: {QUESTION['messages'][0]['content']}")  # type: ignore[index]
        session.log(f"answer:   {content}")
        if "--once" not in session.posargs:
            session.log(f"the API is at {url}/v1, its description at {url}/docs; Ctrl-C stops it")
            server.wait()
            session.error(f"the server stopped with exit code {server.returncode}")
    except KeyboardInterrupt:
        session.log("stopping")
    finally:
        server.terminate()
        try:
            server.wait(timeout=20)
        except subprocess.TimeoutExpired:
            server.kill()
