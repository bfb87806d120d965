"""Times the CPU kernels against torch's operators and plain reading; prints one JSON object a line.

Weights are rotated through more than 200 MB, so that every call reads them from memory as a
model's decode step does. Each figure is the best of several rounds in which all candidates take
turns: the machine may be shared, and the best time is the one least disturbed. The candidate
"read only" reads as many bytes and does nothing else: the limit of the machine at that moment.

    python benchmarks/cpu_kernels.py [--threads 2] [--rows 1,8,512] [--rounds 7] [--only w4a16]

Fields: op, candidate, shape, rows, threads, us, gflops, gbps (weight or cache bytes read), and
share: of the stated machine limits, whichever of the two is the closer one.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import json
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from pymllm_core.builtin.cpu_int4 import Int4PackLinear
from pymllm_core.builtin.cpu_int8 import Int8PackLinear, OneDnnInt8Linear
from pymllm_core.nn.memory import zeros_on_demand
from pymllm_core.protocols.kernel import LinearKernel
from pymllm_kernels.cpu import CpuLinear, paged_attention, qk_norm_rope_write
from pymllm_kernels.cpu_library import default_compiler, openmp_link_flags
from pymllm_kernels.cpu_nodes import W4A16Node, W8A8Node, W8A16Node
from pymllm_kernels.jit import load_library
from pymllm_kernels.recipe import Recipe, Toolchain

ROTATED_BYTES = 200 << 20
# Qwen3-0.6B: name, N, K
SHAPES = [
    ("qkv", 4096, 1024),
    ("o", 1024, 2048),
    ("gate_up", 6144, 1024),
    ("down", 1024, 3072),
    ("head", 151936, 1024),
]


READ_SOURCE = """
#include <immintrin.h>
#include <cstdint>
extern "C" void GOMP_parallel(void (*)(void*), void*, unsigned, unsigned);
extern "C" int omp_get_thread_num(void);
struct Job { const char* data; int64_t bytes; int threads; };
static void body(void* p) {
    const Job& job = *static_cast<Job*>(p);
    const int64_t part = job.bytes / job.threads / 256 * 256;
    const char* from = job.data + part * omp_get_thread_num();
    __m512i sum[4] = {};
    for (int64_t i = 0; i < part; i += 256)
        for (int j = 0; j < 4; ++j)
            sum[j] = _mm512_xor_si512(sum[j], _mm512_loadu_si512(from + i + 64 * j));
    for (__m512i& s : sum) asm volatile("" : : "x"(s));
}
extern "C" void read_all(const char* data, int64_t bytes, int threads) {
    Job job{data, bytes, threads};
    GOMP_parallel(body, &job, threads, 0);
}
"""


@functools.cache
def read_all() -> Callable[[int, int, int], None]:
    """A function of (address, bytes, threads) that reads memory and does nothing with it."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "read_all.cpp"
        source.write_text(READ_SOURCE)
        flags = ("-O3", "-mavx512f", "-shared", "-fPIC", *openmp_link_flags())
        recipe = Recipe(
            "read_all", (source,), flags, lambda: Toolchain(default_compiler()), platform.machine()
        )
        library = load_library(recipe)
    function: Callable[[int, int, int], None] = library.read_all
    library.read_all.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
    return function


def best_seconds(candidates: dict[str, Callable[[int], object]], rounds: int) -> dict[str, float]:
    """The shortest time of one call of each candidate, called with a running number."""
    best: dict[str, float] = {}
    for name, call in candidates.items():
        call(0)
        started = time.perf_counter()
        call(1)
        best[name] = time.perf_counter() - started
    number = 0
    for _ in range(rounds):
        for name, call in candidates.items():
            repeats = max(2, min(200, int(0.02 / best[name])))
            started = time.perf_counter()
            for _ in range(repeats):
                number += 1
                call(number)
            best[name] = min(best[name], (time.perf_counter() - started) / repeats)
    return best


def report(row: dict[str, object], seconds: float, flops: float, read: float) -> None:
    """Print one line."""
    gflops, gbps = flops / seconds / 1e9, read / seconds / 1e9
    limit = LIMITS.gflops * LIMITS.threads * (2 if str(row["op"]).startswith("w8a8") else 1)
    share = max(gflops / limit, gbps / LIMITS.gbps)
    row |= {
        "threads": LIMITS.threads,
        "us": round(seconds * 1e6, 1),
        "gflops": round(gflops, 1),
        "gbps": round(gbps, 1),
        "share": round(share, 3),
    }
    print(json.dumps(row), flush=True)


def bench_linear(name: str, n: int, k: int, row_counts: list[int], rounds: int) -> None:
    """One weight shape: ours, F.linear, and oneDNN with a prepacked weight."""
    copies = max(2, ROTATED_BYTES // (2 * n * k))
    weights = [torch.randn(n, k).to(torch.bfloat16) for _ in range(copies)]
    buffer = zeros_on_demand((copies * 2 * n * k,), torch.uint8)
    buffer.fill_(1)
    linear = CpuLinear()
    ours = [linear.pack(w) for w in weights]
    for rows in row_counts:
        x = torch.randn(rows, k).to(torch.bfloat16)
        mkldnn = [torch.ops.mkldnn._reorder_linear_weight(w, rows) for w in weights]

        def onednn(i: int, x: Tensor = x, w: list[Tensor] = mkldnn) -> Tensor:
            y: Tensor = torch.ops.mkldnn._linear_pointwise(x, w[i % copies], None, "none", [], "")
            return y

        def ours_call(i: int, x: Tensor = x) -> Tensor:
            return linear.apply(x, ours[i % copies])

        def torch_call(i: int, x: Tensor = x) -> Tensor:
            return F.linear(x, weights[i % copies])

        times = best_seconds(
            {
                "read only": lambda i: read_all()(
                    buffer.data_ptr() + i % copies * 2 * n * k, 2 * n * k, LIMITS.threads
                ),
                "pymllm": ours_call,
                "F.linear": torch_call,
                "onednn prepacked": onednn,
            },
            rounds,
        )
        for candidate, seconds in times.items():
            row = {"op": f"linear {name}", "candidate": candidate, "shape": [n, k], "rows": rows}
            flops = 0.0 if candidate == "read only" else 2.0 * rows * n * k
            report(row, seconds, flops, 2.0 * n * k)


def w4a16_tensors(n: int, k: int) -> dict[str, Tensor]:
    """Groups of 128."""
    return {
        "weight": torch.randint(0, 256, (n, k // 2), dtype=torch.uint8),
        "scale": torch.rand(n, k // 128).to(torch.bfloat16),
    }


def w8a16_tensors(n: int, k: int) -> dict[str, Tensor]:
    """One scale a row."""
    weight = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    return {"weight": weight, "scale": torch.rand(n, 1).to(torch.bfloat16)}


def w8a8_tensors(n: int, k: int) -> dict[str, Tensor]:
    """Dynamic symmetric activations."""
    weight = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    return {"weight": weight, "weight_scale": torch.rand(n)}


# Operation: bits of a weight with its scales, tensors, our kernel, torch's operator.
QUANTISED: dict[str, tuple[float, Callable[[int, int], dict[str, Tensor]], LinearKernel, LinearKernel]] = {
    "w4a16": (4 + 16 / 128, w4a16_tensors, W4A16Node(), Int4PackLinear()),
    "w8a16": (8, w8a16_tensors, W8A16Node(), Int8PackLinear()),
    "w8a8": (8, w8a8_tensors, W8A8Node(), OneDnnInt8Linear()),
}


def bench_quantised(operation: str, name: str, n: int, k: int, row_counts: list[int], rounds: int) -> None:
    """One weight shape and format: ours and torch's operator."""
    bits, make, ours, theirs = QUANTISED[operation]
    size = int(n * k * bits / 8)
    copies = max(2, ROTATED_BYTES // size)
    buffer = zeros_on_demand((copies * size,), torch.uint8)
    buffer.fill_(1)
    tensors = make(n, k)
    packed = [[kernel.pack(dict(tensors), act=None) for _ in range(copies)] for kernel in (ours, theirs)]
    for rows in row_counts:
        x = torch.randn(rows, k).to(torch.bfloat16)
        times = best_seconds(
            {
                "read only": lambda i: read_all()(
                    buffer.data_ptr() + i % copies * size, size, LIMITS.threads
                ),
                "pymllm": lambda i, x=x: ours.apply(x, packed[0][i % copies]),
                "torch": lambda i, x=x: theirs.apply(x, packed[1][i % copies]),
            },
            rounds,
        )
        for candidate, seconds in times.items():
            row = {"op": f"{operation} {name}", "candidate": candidate, "shape": [n, k], "rows": rows}
            report(row, seconds, 0.0 if candidate == "read only" else 2.0 * rows * n * k, float(size))


def bench_attention(batch: int, queries: int, keys: int, rounds: int) -> None:
    """Paged attention at Qwen3-0.6B's heads, over rotated caches."""
    heads, kv_heads, dim, page = 16, 8, 128, 16
    pages = -(-keys // page)
    slots = batch * pages * page
    copies = max(2, ROTATED_BYTES // (4 * slots * kv_heads * dim))
    caches = [zeros_on_demand((2, slots, kv_heads, dim), torch.bfloat16).normal_() for _ in range(copies)]
    table = torch.randperm(batch * pages).to(torch.int32).view(batch, pages)
    q = torch.randn(batch * queries, heads, dim).to(torch.bfloat16)
    starts = torch.arange(0, batch * queries + 1, queries, dtype=torch.int32)
    lengths = torch.full((batch,), keys, dtype=torch.int32)

    def ours(i: int) -> Tensor:
        k, v = caches[i % copies]
        return paged_attention(q, k, v, table, starts, lengths, page, dim**-0.5)

    def sdpa(i: int) -> Tensor:
        """Over contiguous caches, which spares it the page table."""
        k, v = (c.view(batch, -1, kv_heads, dim)[:, :keys].transpose(1, 2) for c in caches[i % copies])
        return F.scaled_dot_product_attention(
            q.view(batch, queries, heads, dim).transpose(1, 2),
            k,
            v,
            is_causal=queries > 1 and queries == keys,
            enable_gqa=True,
        )

    times = best_seconds({"pymllm": ours, "sdpa": sdpa}, rounds)
    seen = sum(keys - queries + i + 1 for i in range(queries))  # keys of all queries of a sequence
    for candidate, seconds in times.items():
        shape = [batch, queries, keys]
        row = {"op": "attention", "candidate": candidate, "shape": shape, "rows": batch * queries}
        report(row, seconds, 4.0 * batch * heads * dim * seen, 4.0 * batch * keys * kv_heads * dim)


def bench_overhead(rounds: int) -> None:
    """Calls so small that what remains is the cost of the call."""
    linear = CpuLinear()
    packed = linear.pack(torch.randn(64, 32).to(torch.bfloat16))
    x = torch.randn(1, 32).to(torch.bfloat16)
    norm = (torch.ones(32).to(torch.bfloat16), 1e-6)
    residual = torch.zeros(1, 64).to(torch.bfloat16)
    heads, kv_heads, dim = 16, 8, 128
    cache = torch.zeros(2, 64, kv_heads, dim).to(torch.bfloat16)
    qkv = torch.randn(1, (heads + 2 * kv_heads) * dim).to(torch.bfloat16)
    zero, table = torch.zeros(1, dtype=torch.int64), torch.zeros(8, dim)
    weight = torch.ones(dim).to(torch.bfloat16)
    q = torch.randn(1, heads, dim).to(torch.bfloat16)
    pages, starts, lengths = (torch.tensor(v, dtype=torch.int32) for v in ([[0]], [0, 1], [1]))
    times = best_seconds(
        {
            "linear [1,32]x[64,32]": lambda i: linear.apply(x, packed),
            "linear, norm+residual": lambda i: linear.apply(
                x, packed, norm=norm, residual=residual
            ),
            "qk_norm_rope_write, 1 token": lambda i: qk_norm_rope_write(
                qkv, zero, table, weight, weight, 1e-6, zero, cache[0], cache[1],
                heads, kv_heads, dim,
            ),
            "attention, 1 token, 1 key": lambda i: paged_attention(
                q, cache[0], cache[1], pages, starts, lengths, 16, 1.0
            ),
        },
        rounds,
    )  # fmt: skip
    for name, seconds in times.items():
        report({"op": f"overhead {name}", "candidate": "pymllm"}, seconds, 0.0, 0.0)


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--threads", type=int, default=torch.get_num_threads())
parser.add_argument("--rows", default="1,8,512", help="row counts of the linear layers")
parser.add_argument("--only", default="", help="run only operations whose name contains this")
parser.add_argument("--rounds", type=int, default=7)
parser.add_argument("--gflops", type=float, default=411.0, help="bf16 limit of one core; twice that for w8a8")
parser.add_argument("--gbps", type=float, default=110.0, help="read bandwidth of the machine")
LIMITS = parser.parse_args()

if __name__ == "__main__":
    torch.set_num_threads(LIMITS.threads)
    torch.manual_seed(0)
    with torch.inference_mode():
        for shape_name, columns, inner in SHAPES:
            if LIMITS.only in f"linear {shape_name}":
                counts = [int(r) for r in LIMITS.rows.split(",")]
                bench_linear(shape_name, columns, inner, counts, LIMITS.rounds)
            for format_name in QUANTISED:
                if LIMITS.only in f"{format_name} {shape_name}":
                    counts = [int(r) for r in LIMITS.rows.split(",")]
                    bench_quantised(format_name, shape_name, columns, inner, counts, LIMITS.rounds)
        if LIMITS.only in "attention":
            for sizes in [(1, 1, 512), (1, 1, 8192), (8, 1, 1024), (1, 512, 512), (1, 512, 4096)]:
                bench_attention(*sizes, LIMITS.rounds)
        if LIMITS.only in "overhead":
            bench_overhead(LIMITS.rounds)
