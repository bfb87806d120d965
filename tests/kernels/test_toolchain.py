"""Which compiler, which headers and which tile are taken, and what is said where there are none."""

from __future__ import annotations

import itertools
import json
import site
from pathlib import Path

import pytest
import torch

from pymllm_core.device import DeviceInfo
from pymllm_core.specs import KernelSpec, Needs, Want
from pymllm_kernels import bundle, plugin
from pymllm_kernels.bundle import BUNDLE_ENV, MANIFEST, write_bundle
from pymllm_kernels.cutlass import library, toolchain
from pymllm_kernels.cutlass.tiles import SM90_TILES, choose_tile, tile_named, tiles_for
from pymllm_kernels.cutlass.toolchain import CUTLASS_ENV, cutlass_toolchain, find_cutlass, find_nvcc
from pymllm_kernels.recipe import CACHE_ENV, KernelBuildError


class Machine:
    """A machine whose folders are made up: nothing is installed on it until a test says so."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.monkeypatch = root, monkeypatch
        for name in ("CUDACXX", "CUDA_HOME", CUTLASS_ENV, BUNDLE_ENV):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("PATH", str(root / "bin"))
        monkeypatch.setenv(CACHE_ENV, str(root / "cache"))
        monkeypatch.setattr(site, "getsitepackages", lambda: [str(root / "site")])
        monkeypatch.setattr(site, "getusersitepackages", lambda: str(root / "user"))
        monkeypatch.setattr(toolchain, "SYSTEM_CUDA", root / "system" / "cuda")
        monkeypatch.setattr(toolchain, "SYSTEM_INCLUDES", tuple(root / "system" / n for n in ("one", "two")))
        self.packages: dict[str, Path] = {}
        monkeypatch.setattr(toolchain, "package_folder", self.packages.get)

    def nvcc(self, *parts: str) -> Path:
        path = self.root.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("#!/bin/sh\necho nvcc of a test\n")
        path.chmod(0o755)
        return path

    def cutlass(self, *parts: str, version: tuple[int, int] | None = (4, 2)) -> Path:
        folder = self.root.joinpath(*parts)
        (folder / "cutlass").mkdir(parents=True)
        (folder / "cutlass" / "cutlass.h").touch()
        if version is not None:
            text = f"#define CUTLASS_MAJOR {version[0]}\n#define CUTLASS_MINOR {version[1]}\n"
            (folder / "cutlass" / "version.h").write_text(text)
        return folder

    def set(self, name: str, value: Path) -> None:
        self.monkeypatch.setenv(name, str(value))


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    library.why_not_here.cache_clear()
    return Machine(tmp_path, monkeypatch)


def test_nvcc_is_searched_in_this_order(machine: Machine) -> None:
    order = [
        machine.nvcc("site", "nvidia", "cu12", "bin", "nvcc"),
        machine.nvcc("site", "nvidia", "cu13", "bin", "nvcc"),
        machine.nvcc("system", "cuda", "bin", "nvcc"),
        machine.nvcc("bin", "nvcc"),
        machine.nvcc("home", "bin", "nvcc"),
        machine.nvcc("named", "my-nvcc"),
    ]
    machine.set("CUDA_HOME", machine.root / "home")
    machine.set("CUDACXX", order[-1])
    for path in reversed(order):
        assert find_nvcc() == path
        path.unlink()
    with pytest.raises(KernelBuildError, match=r"pip install nvidia-cuda-nvcc.*pymllm kernels build"):
        find_nvcc()


def test_cudacxx_may_be_a_programs_name(machine: Machine) -> None:
    path = machine.nvcc("bin", "nvcc-13")
    machine.monkeypatch.setenv("CUDACXX", "nvcc-13")
    assert find_nvcc() == path


def test_cutlass_is_searched_in_this_order(machine: Machine) -> None:
    parts = ("system/two", "system/one", "wheel/source/include", "flashinfer/data/cutlass/include")
    order = [machine.cutlass(*path.split("/")) for path in parts]
    named = machine.cutlass("checkout", "include")
    machine.set(CUTLASS_ENV, machine.root / "checkout")
    machine.packages.update(flashinfer=machine.root / "flashinfer", cutlass_library=machine.root / "wheel")
    assert find_cutlass() == named
    machine.monkeypatch.delenv(CUTLASS_ENV)
    for path in reversed(order):
        assert find_cutlass() == path
        (path / "cutlass" / "cutlass.h").unlink()
    with pytest.raises(KernelBuildError, match=r"pip install flashinfer-python.*CUTLASS_HOME"):
        find_cutlass()


def test_named_folder_without_cutlass_is_an_error(machine: Machine) -> None:
    machine.cutlass("system", "one")
    machine.set(CUTLASS_ENV, machine.root / "empty")
    with pytest.raises(KernelBuildError, match=r"CUTLASS_HOME=.*empty holds no CUTLASS"):
        find_cutlass()


@pytest.mark.parametrize(
    ("version", "message"), [((3, 4), r"CUTLASS 3\.4 in .* is older than 3\.5"), (None, "says no version")]
)
def test_unfit_headers_are_named(machine: Machine, version: tuple[int, int] | None, message: str) -> None:
    machine.nvcc("bin", "nvcc")
    machine.cutlass("system", "one", version=version)
    with pytest.raises(KernelBuildError, match=message):
        cutlass_toolchain()


def test_flags_name_headers_of_wheels_and_utilities(machine: Machine) -> None:
    machine.nvcc("site", "nvidia", "cu13", "bin", "nvcc")
    include = machine.cutlass("checkout", "include")
    utilities = machine.root / "checkout" / "tools" / "util" / "include"
    utilities.mkdir(parents=True)
    machine.set(CUTLASS_ENV, machine.root / "checkout")
    root = machine.root / "site" / "nvidia" / "cu13"
    expected = [include, utilities, root / "include", root / "include" / "cccl"]
    search = cutlass_toolchain().search
    assert search == (*(f"-I{folder}" for folder in expected), f"-L{root / 'lib'}")


# ---- the choice ----


def spec(name: str) -> KernelSpec:
    return next(s for s in plugin.pymllm_kernels() if s.key == f"w8a8_linear/{name}")


def want(capability: tuple[int, int] = (8, 7), dtype: str = "bfloat16", **shape: int) -> Want:
    device = DeviceInfo("cuda", "a GPU", 1 << 34, 1 << 34, capability=capability)
    return Want(device, dtype, shape)


def needs(name: str = "cutlass") -> Needs:
    """Without Triton, which is another reason."""
    pytest.importorskip("triton", reason="Triton is not installed; it has wheels for Linux only")
    return spec(name).needs


def test_refused_without_compiler_and_bundle(machine: Machine) -> None:
    reason = needs().reason(want())
    assert reason is not None
    assert reason.startswith("no bundle holds int8_gemm_sm_87_")
    assert "no CUDA compiler found" in reason
    machine.nvcc("bin", "nvcc")
    library.why_not_here.cache_clear()
    assert "no CUTLASS headers found" in (needs().reason(want()) or "")
    machine.cutlass("system", "one")
    library.why_not_here.cache_clear()
    assert needs().reason(want()) is None


def test_bundle_serves_without_a_compiler_and_a_damaged_one_is_no_reason(machine: Machine) -> None:
    recipes = library.recipes((8, 7), [torch.bfloat16])
    file = machine.root / "lib.so"
    file.write_bytes(b"a library")
    machine.set(BUNDLE_ENV, write_bundle(machine.root / "bundle", [(r, file) for r in recipes[:1]]))
    assert (needs().reason(want()) or "").startswith(f"no bundle holds {recipes[1].name}")
    write_bundle(machine.root / "bundle", [(r, file) for r in recipes])
    library.why_not_here.cache_clear()
    assert needs().reason(want()) is None
    assert needs("cutlass-float16").reason(want(dtype="float16")) is not None
    damaged = json.loads((machine.root / "bundle" / MANIFEST).read_text())["kernels"][0]["file"]
    (machine.root / "bundle" / damaged).unlink()
    bundle._checked.cache_clear()  # as in another process
    library.why_not_here.cache_clear()
    assert needs().reason(want()) is None  # chosen, so that loading it names the damage
    with pytest.raises(KernelBuildError, match="is missing; copy the bundle again"):
        library.load_gemms(torch.bfloat16, (8, 7))


@pytest.mark.parametrize(
    ("situation", "reason"),
    [
        (want((7, 5)), "needs compute capability 8.0"),
        (want((10, 0)), "supports compute capability up to 9.0"),
        (want(dtype="float16"), "computes in bfloat16"),
        (want(K=1000), "K=1000 is no multiple of 16"),
        (want(K=1 << 17), "K=131072 is over 65536"),
        (want(N=24), "N=24 is no multiple of 16"),
    ],
)
def test_situations_that_it_is_not_for(machine: Machine, situation: Want, reason: str) -> None:
    assert (needs().reason(situation) or "").startswith(reason)


def test_it_is_before_tritons() -> None:
    assert spec("cutlass").priority > spec("triton").priority


# ---- tiles ----

# Microseconds of benchmarks/gpu_int8.py on an H200: N, M, then the tiles of SM90_TILES in their order.
H200 = [
    (6144, 64, 10.87, 12.14, 17.18),  # K = 4096
    (6144, 256, 17.47, 17.07, 17.49),  # K = 4096
    (6144, 2048, 145.54, 86.16, 74.97),  # K = 4096
    (6144, 8192, 609.05, 475.78, 291.47),  # K = 4096
    (4096, 64, 9.34, 11.61, 17.94),  # K = 4096
    (4096, 256, 13.25, 11.19, 16.64),  # K = 4096
    (4096, 2048, 94.66, 78.16, 53.47),  # K = 4096
    (4096, 8192, 409.66, 320.95, 192.89),  # K = 4096
    (24576, 64, 29.96, 32.54, 44.14),  # K = 4096
    (24576, 256, 59.43, 46.16, 42.46),  # K = 4096
    (24576, 2048, 623.72, 394.92, 271.04),  # K = 4096
    (24576, 8192, 2458.3, 1727.94, 1157.29),  # K = 4096
    (4096, 64, 19.56, 24.79, 38.45),  # K = 12288
    (4096, 256, 31.79, 24.54, 35.83),  # K = 12288
    (4096, 2048, 306.7, 237.85, 142.78),  # K = 12288
    (4096, 8192, 1425.91, 1009.76, 612.3),  # K = 12288
    (6144, 64, 5.93, 6.61, 10.09),  # K = 1024
    (6144, 256, 8.66, 8.76, 9.81),  # K = 1024
    (6144, 2048, 47.56, 34.21, 32.18),  # K = 1024
    (6144, 8192, 192.19, 135.39, 119.94),  # K = 1024
    (1024, 64, 6.84, 8.29, 12.7),  # K = 3072
    (1024, 256, 6.88, 8.43, 13.15),  # K = 3072
    (1024, 2048, 20.08, 13.81, 14.29),  # K = 3072
    (1024, 8192, 75.12, 52.63, 41.38),  # K = 3072
]


def test_chosen_tiles_are_within_a_tenth_of_the_best() -> None:
    """Of these three; and on average within two hundredths."""
    losses = []
    for n, m, *times in H200:
        tile = choose_tile(m, n, 132, (9, 0))
        index = [t for t, _ in SM90_TILES].index(tile)  # type: ignore[arg-type]
        losses.append(times[index] / min(times))
    assert max(losses) < 1.1
    assert sum(losses) / len(losses) < 1.02


def test_orin_and_ada_use_large_tiles_only_for_many_rows() -> None:
    small, large = (tile for tile, _ in tiles_for((8, 7)))
    for n, sms in itertools.product((1024, 4096, 24576), (16, 128)):
        assert choose_tile(17, n, sms, (8, 7)) == small
        assert choose_tile(8192, n, sms, (8, 9)) == large


def test_tiles_by_name() -> None:
    for capability in ((8, 0), (9, 0)):
        for tile, _ in tiles_for(capability):
            assert tile_named(tile.name, capability) == tile
    with pytest.raises(ValueError, match="names no tile of this device; the form is 128x256x64-64x64-4"):
        tile_named("128x128x128-1x1-pingpong", (8, 7))
    with pytest.raises(ValueError, match=r"not for 7\.5"):
        tiles_for((7, 5))
