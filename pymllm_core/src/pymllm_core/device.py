"""What the machine is. The description is plain data; torch is imported only to look at a GPU."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """One device. Memory in bytes; `unified` means that CPU and GPU share it (Jetson).

    capability: CUDA compute capability, None on a CPU. cpu_flags: as in /proc/cpuinfo.
    """

    type: str
    name: str
    total_memory: int
    available_memory: int
    index: int = 0
    capability: tuple[int, int] | None = None
    unified: bool = False
    cpu_flags: frozenset[str] = frozenset()
    threads: int = 1

    @property
    def torch_name(self) -> str:
        """The name that `torch.device` understands."""
        return "cpu" if self.type == "cpu" else f"{self.type}:{self.index}"


@functools.cache
def cpu_flags() -> frozenset[str]:
    """Feature flags of this CPU (Linux); empty where /proc/cpuinfo has none."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    for line in text.splitlines():
        if line.startswith(("flags", "Features")):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


def memory_info() -> tuple[int, int]:
    """(MemTotal, MemAvailable) in bytes, lowered to this process's cgroup limit where one is set."""
    fields: dict[str, int] = {}
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            name, _, rest = line.partition(":")
            fields[name] = int(rest.split()[0]) * 1024
    except OSError:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return total, total
    total, available = fields["MemTotal"], fields["MemAvailable"]
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii"))
        used = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return total, available
    return min(total, limit), min(available, max(limit - used, 0))


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


# NVIDIA's driver, the one of Jetson, and that of the Windows Subsystem for Linux.
_CUDA_DEVICES = ("/dev/nvidiactl", "/dev/nvmap", "/dev/dxg")


def cuda_is_likely() -> bool:
    """Whether there seems to be a CUDA device, told without torch; `describe_device` knows it."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return False
    return any(Path(name).exists() for name in _CUDA_DEVICES)


def open_cuda(index: int) -> None:
    """Have the driver make device `index`'s context, which takes no part of Python's lock; the CUDA runtime finds it.

    (CUDA Runtime API, "Interactions with the CUDA Driver API": a primary context that is there is used.) Without effect
    where there is no driver or no such device; `describe_device` says so.
    """
    import ctypes

    # As torch sets it, too late for this: before CUDA 12.2 the driver would load every kernel at once.
    os.environ.setdefault("CUDA_MODULE_LOADING", "LAZY")
    with contextlib.suppress(OSError):
        driver = ctypes.CDLL("libcuda.so.1")
        device, context = ctypes.c_int(), ctypes.c_void_p()
        if driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(device), index) == 0:
            driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)


def describe_cpu() -> DeviceInfo:
    """The CPU as a device; `threads` is how many cores this process may run on."""
    total, available = memory_info()
    return DeviceInfo(
        type="cpu",
        name=_cpu_name(),
        total_memory=total,
        available_memory=available,
        unified=True,
        cpu_flags=cpu_flags(),
        threads=len(os.sched_getaffinity(0)),
    )


def describe_device(index: int = 0, *, force: str | None = None) -> DeviceInfo:
    """The device to run on: CUDA device `index` where torch sees one, else the CPU.

    force: ``cpu`` or ``cuda``. Raises ConfigError where the forced device is not there.
    """
    from pymllm_core.errors import ConfigError

    if force == "cpu":
        return describe_cpu()
    import torch

    if not torch.cuda.is_available():
        if force == "cuda":
            raise ConfigError("device cuda was asked for, but torch sees no CUDA device; run `pymllm doctor`")
        return describe_cpu()
    if index >= torch.cuda.device_count():
        raise ConfigError(
            f"base_gpu_id={index} was asked for, but torch sees {torch.cuda.device_count()} CUDA device(s)"
        )
    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    unified = bool(properties.is_integrated)
    return DeviceInfo(
        type="cuda",
        name=properties.name,
        total_memory=total,
        # On unified memory CUDA's "free" leaves out what the page cache would give back.
        available_memory=memory_info()[1] if unified else free,
        index=index,
        capability=(properties.major, properties.minor),
        unified=unified,
        cpu_flags=cpu_flags(),
        threads=len(os.sched_getaffinity(0)),
    )
