"""``pymllm quantize MODEL OUT``: a model's weights in fewer bits, on disk."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pymllm_core.commands.base import console, human_bytes, json_option, print_json, progress_bar
from pymllm_core.plugins import registry
from pymllm_core.protocols.source import SourceOptions
from pymllm_quant_ct.quantize.scheme import DEFAULT_GROUP_SIZE, GROUP_SIZES, SCHEMES, Request

if TYPE_CHECKING:
    from pymllm_quant_ct.quantize.run import Summary

WORST = 5
_UNITS = {"": 1, "KB": 1000, "MB": 1000**2, "GB": 1000**3, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


def _size(ctx: click.Context, param: click.Parameter, value: str) -> int:
    """Bytes, with or without a unit: ``4GB``, ``500 MiB``."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)
    unit = _UNITS.get(found[2].upper()) if found else None
    if found is None or unit is None or float(found[1]) * unit < 1:
        raise click.BadParameter(f"{value!r} is no size such as 4GB, 500MB or 1GiB", ctx, param)
    return int(float(found[1]) * unit)


@click.command("quantize")
@click.argument("model")
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--scheme", type=click.Choice(SCHEMES), required=True, help="Bits of weights and activations.")
@click.option(
    "--group-size",
    type=click.Choice([str(size) for size in GROUP_SIZES]),
    help=f"Weights of a row that share a scale; -1 is the whole row. [default: {DEFAULT_GROUP_SIZE}; W8A8: -1]",
)
@click.option("--asymmetric", is_flag=True, help="Store zero points, too (not W8A8).")
@click.option(
    "--observer",
    type=click.Choice(["minmax", "mse"]),
    default="minmax",
    show_default=True,
    help="A scale covers all of its weights, or as much of their range as gives the least squared error.",
)
@click.option(
    "--ignore",
    multiple=True,
    metavar="NAME",
    help="Leave this linear as it is, beside head, routers and visual tower: a name, or re: and an "
    "expression. Repeatable.",
)
@click.option(
    "--shard-size",
    callback=_size,
    default="4GB",
    show_default=True,
    metavar="SIZE",
    help="Largest file of weights.",
)
@click.option("--overwrite", is_flag=True, help="Replace OUT if it exists.")
@click.option(
    "--download-dir",
    type=click.Path(path_type=Path),
    envvar="PYMLLM_SERVER__DOWNLOAD_DIR",
    help="Where MODEL is downloaded to, if it has to be. [default: the hub's cache]",
)
@json_option
def command(
    model: str,
    out: Path,
    scheme: str,
    group_size: str | None,
    asymmetric: bool,
    observer: str,
    ignore: tuple[str, ...],
    shard_size: int,
    overwrite: bool,
    download_dir: Path | None,
    as_json: bool,
) -> None:
    """Write MODEL into the folder OUT, its linears rounded to nearest, in the form of compressed-tensors.

    MODEL is a folder or a name, as for the other commands. No calibration data is used, and never more than some
    rows of one tensor are in memory.
    """
    request = Request(scheme, None if group_size is None else int(group_size), not asymmetric, observer)
    with progress_bar(f"quantising {model}") as progress:
        from pymllm_core.builtin.sources import resolve_model
        from pymllm_core.engine.status import Progress
        from pymllm_quant_ct.quantize.run import quantise  # brings torch along

        def downloading(what: str, done: int, total: int) -> None:
            if progress is not None:
                progress(Progress(f"downloading {what}", done, total))

        folder = resolve_model(model, registry(), SourceOptions(download_dir, downloading))
        summary = quantise(
            folder,
            out,
            request,
            ignore=ignore,
            shard_bytes=shard_size,
            overwrite=overwrite,
            progress=progress,
        )
    if as_json:
        print_json({**dataclasses.asdict(summary), "mean_error": summary.mean_error})
    else:
        _render(request, summary)


def _render(request: Request, summary: Summary) -> None:
    from rich import box
    from rich.table import Table

    groups = f"groups of {request.group}" if request.group else "one scale a row"
    kind = "" if request.symmetric else ", with zero points"
    out = console()
    out.print(f"{request.scheme}, {groups}{kind}, {request.observer}: {summary.out}", style="bold")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    share = summary.bytes_after / summary.bytes_before
    before, after = human_bytes(summary.bytes_before), human_bytes(summary.bytes_after)
    files = "1 file" if summary.files == 1 else f"{summary.files} files"
    left = f", {len(summary.left)} left as they were: {_some(summary.left)}" if summary.left else ""
    table.add_row("linears", f"{summary.quantised} quantised{left}")
    table.add_row("size", f"{before} before, {after} now ({share:.0%}), in {files}")
    table.add_row("relative error", f"{summary.mean_error:.2%} in the mean of all linears")
    for number, (name, error) in enumerate(summary.worst(WORST)):
        table.add_row("" if number else "worst", f"{error:.2%} {name}")
    out.print(table)
    out.print(f"Serve it: pymllm serve {summary.out}")


def _some(names: tuple[str, ...], limit: int = 3) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
