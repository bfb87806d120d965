"""What this device can do at best: how fast it reads memory and multiplies matrices, measured once."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pymllm_core.bench.cost import INT8, Work
from pymllm_core.device import DeviceInfo
from pymllm_core.nn.memory import zeros_on_demand

logger = logging.getLogger(__name__)

_READ_BYTES = {"cpu": 512 << 20, "cuda": 2 << 30}  # far more than any cache holds
_MATRIX = {"cpu": 2048, "cuda": 8192}
_IN_A_ROW = 10  # calls between two events of a GPU, which would otherwise wait for the first launch
_SECONDS = 0.5  # at least that long for each figure, of which the best repetition counts


@dataclass(frozen=True, slots=True)
class DeviceLimits:
    """read: bytes a second. matrix: operations a second by kind, a dtype's name or ``int8``. measured: when."""

    read: float
    matrix: Mapping[str, float]
    measured: str

    def seconds(self, work: Work) -> tuple[float, float | None]:
        """(for the bytes, for the arithmetic); the larger is the floor. None where a rate is not known."""
        if not work.flops.keys() <= self.matrix.keys():
            return work.bytes / self.read, None
        return work.bytes / self.read, sum(count / self.matrix[kind] for kind, count in work.flops.items())


def device_limits(device: DeviceInfo, dtype: str, *, again: bool = False) -> DeviceLimits:
    """The limits for computing in `dtype` and int8, from the cache file or, where it lacks them, measured."""
    path = _cache_file(device)
    known: dict[str, Any] = {}
    if not again:
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            logger.warning("%s cannot be read (%s); the limits are measured anew", path, error)
    matrix = dict(known.get("matrix", {}))
    missing = [kind for kind in (dtype, INT8) if kind not in matrix]
    if known.get("read") and not missing:
        return DeviceLimits(known["read"], matrix, known["measured"])
    logger.info("measuring what %s can do at best; kept in %s", device.name, path)
    place = torch.device(device.torch_name)
    with torch.inference_mode():
        read = known.get("read") or measure_read(place)
        for kind in missing:
            rate = measure_matrix(place, kind)
            if rate is not None:
                matrix[kind] = rate
    if place.type == "cuda":
        torch.cuda.empty_cache()  # the model is loaded next
    limits = DeviceLimits(read, matrix, time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
    what = {"device": device.name, "threads": torch.get_num_threads(), "torch": torch.__version__}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.with_suffix(f".{os.getpid()}")
        whole.write_text(json.dumps({**what, **dataclasses.asdict(limits)}, indent=1), encoding="utf-8")
        whole.replace(path)
    except OSError as error:
        logger.warning("%s cannot be written (%s); the limits will be measured again", path, error)
    return limits


def _cache_file(device: DeviceInfo) -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    threads = torch.get_num_threads() if device.type == "cpu" else 0
    key = hashlib.sha256(f"{device.name}\0{threads}\0{torch.__version__}".encode()).hexdigest()[:16]
    return root / "pymllm" / "limits" / f"{key}.json"


def measure_read(device: torch.device) -> float:
    """Bytes a second at which a large buffer is read: the best of a sum, a maximum and a dot product."""
    size = _READ_BYTES[device.type]
    if device.type == "cuda":
        size = min(size, torch.cuda.mem_get_info(device)[0] // 4)
        buffer = torch.empty(size // 4, dtype=torch.float32, device=device)
    else:
        buffer = zeros_on_demand((size // 4,), torch.float32)
    buffer.fill_(1.0)
    wide = buffer.view(torch.int64)
    reads: tuple[Callable[[], Any], ...] = (
        buffer.sum,
        buffer.amax,
        wide.amax,
        lambda: torch.dot(buffer, buffer),
    )
    size = 4 * buffer.numel()
    return size / min(_best(read, device) for read in reads)


def measure_matrix(device: torch.device, kind: str) -> float | None:
    """Operations a second of a large square product of random numbers; None where there is no such product."""
    n = _MATRIX[device.type]
    if kind == INT8:
        a = torch.randint(-127, 128, (n, n), dtype=torch.int8, device=device)
        b = torch.randint(-127, 128, (n, n), dtype=torch.int8, device=device).t()

        def product() -> Any:
            return torch._int_mm(a, b)
    else:
        dtype = getattr(torch, kind)
        x = torch.randn((n, n), device=device).to(dtype)
        y = torch.randn((n, n), device=device).to(dtype)
        out = torch.empty_like(x)

        def product() -> Any:
            return torch.mm(x, y, out=out)

    try:
        return 2 * n**3 / _best(product, device)
    except RuntimeError as error:  # torch's word for an operator or a type that is not there
        logger.warning("the rate of %s products is not known here: %s", kind, error)
        return None


def _best(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the fastest repetition, by the device's own clock where it has one."""
    call()
    best, until = float("inf"), time.perf_counter() + _SECONDS
    while True:
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(_IN_A_ROW):
                call()
            end.record()
            end.synchronize()
            seconds = float(start.elapsed_time(end)) / 1e3 / _IN_A_ROW
        else:
            begin = time.perf_counter()
            call()
            seconds = time.perf_counter() - begin
        best = min(best, seconds)
        if time.perf_counter() > until:
            return best
