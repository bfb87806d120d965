"""What `pymllm doctor` looks at. Each check is isolated: whatever it raises is its finding."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from pymllm_core.commands.base import human_bytes
from pymllm_core.commands.plugins import failure_line
from pymllm_core.device import DeviceInfo, cpu_flags, describe_cpu, describe_device
from pymllm_core.plugins import Registry
from pymllm_core.specs import AttentionBackendSpec, KernelSpec, Spec, Want

Status = Literal["ok", "info", "warn", "fail"]
OLDEST_PYTHON = (3, 10)
REQUIRED = ("transformers", "tokenizers", "safetensors", "huggingface_hub", "pydantic")
WELL_KNOWN = {
    "triton": ("triton", "Triton kernels on CUDA"),
    "flashinfer": ("flashinfer-python", "FlashInfer attention on CUDA"),
    "xgrammar": ("xgrammar", "answers held to a grammar or schema"),
}
CPU_FEATURES = (
    *("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8"),
    *("asimd", "asimddp", "i8mm", "bf16", "sve"),
)


@dataclass(frozen=True, slots=True)
class Check:
    """One finding. fail: something required is broken; warn: it works, less well than it could."""

    group: str
    name: str
    status: Status
    detail: str
    hint: str = ""


def guarded(group: str, name: str, check: Callable[[], Check]) -> Check:
    """The check's finding, or the failure that it raised."""
    try:
        return check()
    except Exception as error:
        return Check(group, name, "fail", f"{type(error).__name__}: {error}")


def system_checks() -> Iterator[Check]:
    """Python, CPU, memory."""
    old = sys.version_info[:2] < OLDEST_PYTHON
    wanted = ".".join(map(str, OLDEST_PYTHON))
    version = f"{platform.python_version()} ({sys.executable})"
    hint = f"install Python {wanted} or newer" if old else ""
    yield Check("system", "python", "fail" if old else "ok", version, hint)
    cpu = describe_cpu()
    features = ", ".join(flag for flag in CPU_FEATURES if flag in cpu_flags()) or "no vector features known"
    yield Check("system", "cpu", "ok", f"{cpu.name}, {cpu.threads} usable cores; {features}")
    memory = f"{human_bytes(cpu.available_memory)} available of {human_bytes(cpu.total_memory)}"
    yield Check("system", "memory", "ok", memory)
    yield guarded("system", "huge pages", _huge_pages)


def _huge_pages() -> Check:
    path = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not path.is_file():
        return Check("system", "huge pages", "info", "this kernel tells nothing of transparent huge pages")
    text = path.read_text(encoding="ascii")
    mode = text.partition("[")[2].partition("]")[0] or text.strip()
    if mode == "never":
        hint = f"echo madvise > {path} makes reading weights cheaper"
        return Check("system", "huge pages", "warn", "off", hint)
    return Check("system", "huge pages", "ok", mode)


def toolchain_checks() -> Iterator[Check]:
    """Compilers, for kernels that are built at first use."""
    compiler = next((path for name in ("g++", "clang++", "c++") if (path := shutil.which(name))), None)
    if compiler:
        yield Check("compilers", "C++", "ok", f"{compiler}: {_first_line([compiler, '--version'])}")
    else:
        hint = "apt-get install g++, for kernels built at first use"
        yield Check("compilers", "C++", "warn", "none found", hint)
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = os.pathsep.join(str(Path(home) / "bin") for home in homes if home)
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=places)
    if nvcc:
        lines = _output([nvcc, "--version"]).splitlines()
        release = next((line for line in lines if "release" in line), "")
        yield Check("compilers", "nvcc", "ok", f"{nvcc}: {release.strip()}")
    else:
        yield Check("compilers", "nvcc", "info", "none found; only CUDA kernels built at first use need it")


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"cannot be run: {error}"
    return done.stdout or done.stderr


def _first_line(command: list[str]) -> str:
    return (_output(command).splitlines() or ["no answer"])[0].strip()


def torch_checks() -> Iterator[Check]:
    """torch itself, its CUDA, each GPU, and one small product on each device."""
    try:
        import torch
    except Exception as error:
        reason = f"cannot be imported: {type(error).__name__}: {error}"
        yield Check("torch", "torch", "fail", reason, "pip install torch")
        return
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    yield Check("torch", "torch", "ok", f"{torch.__version__} ({build}), {torch.get_num_threads()} threads")
    yield guarded("torch", "product on cpu", partial(_product, "cpu"))
    smi = shutil.which("nvidia-smi")
    driver = _first_line([smi, "--query-gpu=driver_version", "--format=csv,noheader"]) if smi else ""
    if driver:
        yield Check("torch", "driver", "ok", f"NVIDIA {driver}")
    if not torch.cuda.is_available():
        if smi and not torch.version.cuda:
            hint = "install a torch that is built for CUDA (pytorch.org/get-started)"
            yield Check("torch", "cuda", "warn", "there is a driver, but this torch is CPU only", hint)
        elif torch.version.cuda:
            detail = "torch is built for CUDA, but sees no device; everything runs on the CPU"
            yield Check("torch", "cuda", "warn", detail, "check nvidia-smi and CUDA_VISIBLE_DEVICES")
        else:
            yield Check("torch", "cuda", "info", "no GPU; everything runs on the CPU")
        return
    for index in range(torch.cuda.device_count()):
        yield guarded("torch", f"cuda:{index}", partial(_gpu, index))
        yield guarded("torch", f"product on cuda:{index}", partial(_product, f"cuda:{index}"))


def _gpu(index: int) -> Check:
    gpu = describe_device(index)
    assert gpu.capability is not None
    memory = f"{human_bytes(gpu.available_memory)} free of {human_bytes(gpu.total_memory)}"
    shared = ", shared with the CPU" if gpu.unified else ""
    capability = "compute capability {}.{}".format(*gpu.capability)
    return Check("torch", f"cuda:{index}", "ok", f"{gpu.name}, {capability}, {memory}{shared}")


def _product(device: str) -> Check:
    """A product whose result is known exactly: ones, so each entry is the inner size."""
    import torch

    name = f"product on {device}"
    for dtype in (torch.float32, torch.bfloat16):
        ones = torch.ones(64, 64, dtype=dtype, device=device)
        found = (ones @ ones).float()
        if not bool((found == 64).all()):
            detail = f"64 ones give {found[0, 0].item()} in {dtype}"
            return Check("torch", name, "fail", detail, "reinstall torch")
    return Check("torch", name, "ok", "right in float32 and bfloat16")


def dependency_checks(found: Registry) -> Iterator[Check]:
    """Packages: those that are required, and those that some plugin or feature would use."""
    for module in REQUIRED:
        version = _version(module)
        hint = "" if version else f"pip install {module.replace('_', '-')}"
        yield Check("packages", module, "ok" if version else "fail", version or "not installed", hint)
    wanted: dict[str, tuple[str, set[str]]] = {
        module: (requirement, {use}) for module, (requirement, use) in WELL_KNOWN.items()
    }
    for entries in found.specs.values():
        for entry in entries:
            for module, requirement in entry.spec.needs.modules.items():
                known, uses = wanted.get(module, (requirement, set()))
                uses = {use for use in uses if use not in {u for _, u in WELL_KNOWN.values()}}
                wanted[module] = (requirement or known, uses | {f"{entry.spec.key} ({entry.distribution})"})
    for module, (requirement, uses) in sorted(wanted.items()):
        version = _version(module)
        detail = f"{version or 'not installed'}; for {', '.join(sorted(uses))}"
        hint = "" if version else f"pip install '{requirement}'"
        yield Check("packages", module, "ok" if version else "info", detail, hint)


def _version(module: str) -> str | None:
    try:
        if importlib.util.find_spec(module) is None:
            return None
    except (ImportError, ValueError):
        return None
    names = importlib.metadata.packages_distributions().get(module.partition(".")[0], [module])
    try:
        return importlib.metadata.version(names[0])
    except importlib.metadata.PackageNotFoundError:
        return "installed"


def plugin_checks(found: Registry) -> Iterator[Check]:
    """Each plugin, and each failure of one."""
    for plugin in found.distributions:
        hooks = ", ".join(hook.removeprefix("pymllm_") for hook in plugin.hooks) or "no hooks"
        yield Check("plugins", plugin.name, "ok", f"{plugin.version}: {hooks}")
    for failure in found.failures:
        hint = "`pymllm plugins` shows all; PYMLLM_PLUGINS=NAME,... loads only those"
        yield Check("plugins", failure.plugin, "fail", failure_line(failure), hint)


def backend_checks(found: Registry) -> Iterator[Check]:
    """Attention backends and kernels: who fits this machine is imported, and checks itself if it can."""
    devices = _devices()
    checked: dict[str, Check] = {}
    specs: list[Spec] = [entry.spec for entry in found.all(AttentionBackendSpec)]
    specs += [entry.spec for entry in found.all(KernelSpec)]
    for spec in specs:
        dtypes = spec.needs.dtypes or ("float32",)
        reasons = [spec.needs.reason(Want(device, dtype)) for device in devices for dtype in dtypes]
        if all(reasons):
            yield Check("backends", spec.key, "info", f"not for this machine: {reasons[-1]}")
            continue
        module = spec.implementation.partition(":")[0]
        if module not in checked:
            checked[module] = guarded("backends", spec.key, partial(_self_check, spec))
        finding = checked[module]
        yield Check("backends", spec.key, finding.status, finding.detail, finding.hint)


def _devices() -> list[DeviceInfo]:
    devices = [describe_cpu()]
    try:
        import torch

        devices += [describe_device(index) for index in range(torch.cuda.device_count())]
    except ImportError:
        pass  # the check of torch itself says so
    return devices


def _self_check(spec: Spec) -> Check:
    spec.load()
    module = importlib.import_module(spec.implementation.partition(":")[0])
    check = getattr(module, "self_check", None)
    if check is None:
        return Check("backends", spec.key, "ok", "can be imported (it has no self_check)")
    return Check("backends", spec.key, "ok", str(check()))
