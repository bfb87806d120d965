"""The shapes in which the int8 product is compiled, and which of them a product runs with. No torch here."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import ClassVar

Capability = tuple[int, int]
"""CUDA compute capability, e.g. (8, 7)."""


@dataclass(frozen=True, slots=True)
class Sm90Tile:
    """For Hopper. m, n, k: of the block; k in bytes of a row, 128 is one swizzled line of shared memory.

    cluster_m, cluster_n: blocks that share what they load. pingpong: two groups of warps compute a tile
    each, so that one multiplies while the other finishes; otherwise they share one tile.
    """

    m: int
    n: int
    k: int
    cluster_m: int
    cluster_n: int
    pingpong: bool

    source: ClassVar[str] = "int8_gemm_sm90.cu"

    @property
    def name(self) -> str:
        schedule = "pingpong" if self.pingpong else "cooperative"
        return f"{self.m}x{self.n}x{self.k}-{self.cluster_m}x{self.cluster_n}-{schedule}"

    @property
    def macros(self) -> dict[str, int]:
        """What the source is compiled with."""
        return {
            "PYMLLM_TILE_M": self.m,
            "PYMLLM_TILE_N": self.n,
            "PYMLLM_TILE_K": self.k,
            "PYMLLM_CLUSTER_M": self.cluster_m,
            "PYMLLM_CLUSTER_N": self.cluster_n,
            "PYMLLM_PINGPONG": int(self.pingpong),
        }


@dataclass(frozen=True, slots=True)
class Sm80Tile:
    """For Ampere, Orin and Ada. m, n, k: of the block; warp_m, warp_n: of a warp; stages: of the pipeline."""

    m: int
    n: int
    k: int
    warp_m: int
    warp_n: int
    stages: int

    source: ClassVar[str] = "int8_gemm_sm80.cu"

    @property
    def name(self) -> str:
        return f"{self.m}x{self.n}x{self.k}-{self.warp_m}x{self.warp_n}-{self.stages}"

    @property
    def macros(self) -> dict[str, int]:
        """What the source is compiled with."""
        return {
            "PYMLLM_TILE_M": self.m,
            "PYMLLM_TILE_N": self.n,
            "PYMLLM_TILE_K": self.k,
            "PYMLLM_WARP_M": self.warp_m,
            "PYMLLM_WARP_N": self.warp_n,
            "PYMLLM_STAGES": self.stages,
        }

    @property
    def shared_memory(self) -> int:
        """Bytes a block: the stages of both operands."""
        return (self.m + self.n) * self.k * self.stages


Tile = Sm80Tile | Sm90Tile

# Each with a rate: int8 operations a second of one multiprocessor with such tiles, in any unit. Measured on an
# H200 (benchmarks/gpu_int8.py): of ten tiles these three, chosen by `choose_tile`, are on average 2 % slower
# than the best of the ten for each of 24 shapes, and 11 % at worst. Every further tile compiles for 50 s.
SM90_TILES: tuple[tuple[Sm90Tile, int], ...] = (
    (Sm90Tile(64, 64, 256, 1, 1, pingpong=True), 1100),
    (Sm90Tile(64, 128, 128, 1, 1, pingpong=True), 1150),
    (Sm90Tile(128, 128, 128, 1, 1, pingpong=True), 1450),
)
# At most 96 KB of shared memory: a block gets 163 KB on SM80 and 87, but 99 KB on SM86 and 89. The rates are
# those of SM80's instructions on an H200.
SM80_TILES: tuple[tuple[Sm80Tile, int], ...] = (
    (Sm80Tile(64, 128, 128, 32, 64, 3), 700),
    (Sm80Tile(128, 256, 64, 64, 64, 4), 850),
)


def tiles_for(capability: Capability) -> tuple[tuple[Tile, int], ...]:
    """The tiles of a device with their rates. Raises ValueError where there are none."""
    if capability == (9, 0):
        return SM90_TILES
    if (8, 0) <= capability <= (8, 9):
        return SM80_TILES
    raise ValueError(
        f"the CUTLASS int8 product is written for compute capability 8.0 to 8.9 and 9.0, "
        f"not for {capability[0]}.{capability[1]}"
    )


@functools.lru_cache(maxsize=4096)
def choose_tile(m: int, n: int, sms: int, capability: Capability) -> Tile:
    """The tile for a product [m, n] on a device with so many multiprocessors.

    Tiles are computed in waves, one tile a multiprocessor: the time is that of a tile, its area by its rate,
    for each wave. Small tiles fill a wave of few rows, large ones read less for each result.
    """

    def time(item: tuple[Tile, int]) -> float:
        tile, rate = item
        waves = -(-(-(-m // tile.m) * -(-n // tile.n)) // sms)
        return waves * tile.m * tile.n / rate

    return min(tiles_for(capability), key=time)[0]


def tile_named(name: str, capability: Capability) -> Tile:
    """A tile of any shape by its `name`, for measurements. Raises ValueError where it is no such name."""
    hopper = capability == (9, 0)
    pattern = r"(\d+)x(\d+)x(\d+)-(\d+)x(\d+)-" + ("(pingpong|cooperative)" if hopper else r"(\d+)")
    found = re.fullmatch(pattern, name)
    if found is None:
        form = "128x128x128-2x1-pingpong" if hopper else "128x256x64-64x64-4"
        raise ValueError(f"{name!r} names no tile of this device; the form is {form}")
    *sizes, last = found.groups()
    m, n, k, p, q = map(int, sizes)
    return Sm90Tile(m, n, k, p, q, last == "pingpong") if hopper else Sm80Tile(m, n, k, p, q, int(last))
