"""``pymllm kernels``: what is compiled, and compiling it before it is needed, here or for another device."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from pymllm_core.commands.base import console, human_bytes, json_option, print_json
from pymllm_core.errors import ConfigError

if TYPE_CHECKING:
    from pymllm_kernels.cutlass.tiles import Capability

DTYPES = ("bfloat16", "float16", "float32")

arch_option = click.option(
    "--arch",
    multiple=True,
    metavar="X.Y[,X.Y...]",
    help="Compute capability, e.g. 8.7 for Jetson Orin; may be repeated. Default: that of this machine's GPU.",
)
dtype_option = click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    multiple=True,
    default=("bfloat16", "float16"),
    help="Type of the results; may be repeated. Default: bfloat16 and float16.",
)


@click.group("kernels")
def command() -> None:
    """List the compiled kernels, or compile them before they are needed."""


@command.command("list")
@arch_option
@dtype_option
@json_option
def list_kernels(arch: tuple[str, ...], dtype: tuple[str, ...], as_json: bool) -> None:
    """Each compiled library: what it runs on, its state, size and path.

    Without --arch, those of this machine; where it has no GPU, those of every device.
    """
    from pymllm_kernels.catalogue import CAPABILITIES, all_recipes, state_of, this_capability

    capabilities = parse_archs(arch)
    if not arch:
        here = this_capability()
        capabilities = list(CAPABILITIES) if here is None else [here] if here in CAPABILITIES else []
    states = [state_of(recipe) for recipe in all_recipes(capabilities, dtype, cpu=True)]
    if as_json:
        print_json(
            [
                {
                    "name": state.recipe.name,
                    "arch": state.recipe.arch,
                    "state": state.word,
                    "bytes": state.size,
                    "path": state.path,
                    "note": state.note,
                }
                for state in states
            ]
        )
        return
    from rich.table import Table

    table = Table("kernel", "arch", "state", "size", box=None, pad_edge=False)
    for state in states:
        size = "" if state.size is None else human_bytes(state.size)
        table.add_row(state.recipe.name, state.recipe.arch, state.word, size)
    out = console()
    out.print(table)
    for note in dict.fromkeys(state.note for state in states if state.note):
        words = sorted({state.word for state in states if state.note == note})
        out.print(f"{' and '.join(words)}: {note}")
    for path in dict.fromkeys(state.path.parents[2] for state in states if state.path):
        out.print(f"folder: {path}")


@command.command("build")
@arch_option
@dtype_option
@click.option(
    "--out", type=click.Path(path_type=Path), help="Write a bundle: a folder, or a .tar or .tar.gz file."
)
@click.option(
    "--jobs", type=click.IntRange(min=1), help="Compilations at once. Default: by cores and free memory."
)
@click.option("--force", is_flag=True, help="Compile what is already there, too.")
def build(
    arch: tuple[str, ...], dtype: tuple[str, ...], out: Path | None, jobs: int | None, force: bool
) -> None:
    """Compile kernels now, into the cache of this machine or as a bundle for devices without a compiler.

    Without --arch and --out, all that this machine uses: its CPU's kernels and its GPU's. A bundle holds CUDA
    libraries only, for machines with this one's processor type; PYMLLM_KERNELS_BUNDLE names its folder there.
    """
    from pymllm_kernels.bundle import write_bundle
    from pymllm_kernels.catalogue import CAPABILITIES, all_recipes, this_capability
    from pymllm_kernels.parallel import build_all

    capabilities = parse_archs(arch)
    here = this_capability()
    if not arch and here in CAPABILITIES:
        capabilities = [here]
    if out is not None and not capabilities:
        raise ConfigError(
            "--out was given, but torch sees no GPU here that CUDA kernels could be built for; "
            "name the target's compute capability, e.g. --arch 8.7 for Jetson Orin"
        )
    recipes = all_recipes(capabilities, dtype, cpu=out is None and not arch)
    if not recipes:
        raise ConfigError(
            "there is nothing to build for this machine: its CPU lacks AVX512-BF16 and torch sees no GPU that "
            "has kernels; name another device with --arch"
        )
    libraries = build_all(
        recipes, jobs=jobs, anew=force, done=lambda recipe, _: click.echo(f"compiled {recipe.name}")
    )
    click.echo(f"{len(libraries)} libraries are ready")
    if out is None:
        return
    target = write_bundle(out, zip(recipes, libraries, strict=True))
    click.echo(f"bundle: {target}")
    if target.is_file():
        click.echo(f"on the target: mkdir kernels && tar xf {target.name} -C kernels")
    folder = "kernels" if target.is_file() else target
    click.echo(f"on the target: export PYMLLM_KERNELS_BUNDLE={folder}")


def parse_archs(values: tuple[str, ...]) -> list[Capability]:
    """``("8.7,9.0",)`` as capabilities, each once. Raises ConfigError for others than the supported ones."""
    from pymllm_kernels.catalogue import CAPABILITIES

    known = {f"{major}.{minor}": (major, minor) for major, minor in CAPABILITIES}
    found: list[Capability] = []
    for value in (part.strip() for text in values for part in text.split(",")):
        if value not in known:
            raise ConfigError(
                f"--arch {value} was asked for, but there are CUDA kernels for {', '.join(known)} only"
            )
        found.append(known[value])
    return list(dict.fromkeys(found))
