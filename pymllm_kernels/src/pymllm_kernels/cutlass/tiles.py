"""The shapes in which the int8 product is compiled, and which of them a product runs with. No torch here."""

from __future__ import annotations

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

# Up to so many rows of A, a product runs with this tile; the last of a list takes all that are left.
SM90_TILES: tuple[tuple[int, Sm90Tile], ...] = (
    (64, Sm90Tile(64, 64, 256, 1, 1, pingpong=True)),
    (128, Sm90Tile(64, 128, 128, 1, 1, pingpong=True)),
    (512, Sm90Tile(128, 128, 128, 2, 1, pingpong=True)),
    (1 << 31, Sm90Tile(128, 256, 128, 2, 1, pingpong=False)),
)
# At most 96 KB of shared memory: a block gets 163 KB on SM80 and 87, but 99 KB on SM86 and 89.
SM80_TILES: tuple[tuple[int, Sm80Tile], ...] = (
    (32, Sm80Tile(32, 64, 128, 32, 32, 4)),
    (64, Sm80Tile(64, 128, 128, 32, 64, 3)),
    (256, Sm80Tile(128, 128, 64, 64, 64, 4)),
    (1 << 31, Sm80Tile(128, 256, 64, 64, 64, 4)),
)


def tiles_for(capability: Capability) -> tuple[tuple[int, Tile], ...]:
    """The table of a device: (up to so many rows, tile). Raises ValueError where there is none."""
    if capability == (9, 0):
        return SM90_TILES
    if (8, 0) <= capability <= (8, 9):
        return SM80_TILES
    raise ValueError(
        f"the CUTLASS int8 product is written for compute capability 8.0 to 8.9 and 9.0, "
        f"not for {capability[0]}.{capability[1]}"
    )


def choose_tile(rows: int, capability: Capability) -> Tile:
    """The tile for a product with so many rows of A."""
    return next(tile for limit, tile in tiles_for(capability) if rows <= limit)
