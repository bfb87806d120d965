"""``pymllm lint-checkpoint MODEL``: whether a checkpoint will be served, by what, and how fast at best."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from pymllm_core.commands.base import (
    SettingsCommand,
    console,
    human_bytes,
    json_option,
    new_table,
    print_json,
    settings_of,
)
from pymllm_core.errors import ConfigError
from pymllm_core.plugins import registry

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from pymllm_core.config import Settings
    from pymllm_core.device import DeviceInfo
    from pymllm_core.lint.report import Report
    from pymllm_core.protocols.lint import Finding

SHOWN = 6
"""Names that a finding shows; --json has them all."""
_STYLES = {"error": "bold red", "warning": "yellow", "note": "dim"}


@click.command("lint-checkpoint", cls=SettingsCommand)
@click.argument("model")
@click.option("--arch", metavar="X.Y", help="Check for a CUDA device of this compute capability, e.g. 8.7.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), help="Short for --server.device.")
@click.option(
    "--bandwidth",
    type=click.FloatRange(min=0, min_open=True),
    metavar="GB/S",
    help="The memory's bandwidth, for the least time of a token: Orin AGX 204.8, Orin NX 102.4.",
)
@click.option(
    "--download", is_flag=True, help="Let a hub's source download the weights, to see their headers."
)
@click.option("--strict", is_flag=True, help="Exit with 1 for warnings, too.")
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    model: str,
    arch: str | None,
    device: str | None,
    bandwidth: float | None,
    download: bool,
    strict: bool,
    as_json: bool,
) -> None:
    """Check MODEL before it is loaded: what serves each layer, what is wrong, what a token costs.

    Reads config.json, the index and the headers of the weight files. Exits with 1 if it would not load.
    """
    settings = settings_of(ctx, model)
    if device is not None:
        server = settings.server.model_copy(update={"device": device})
        settings = settings.model_copy(update={"server": server})
    target = _device(settings, arch)
    from pymllm_core.builtin.sources import resolve_model
    from pymllm_core.lint.report import lint  # brings torch along
    from pymllm_core.protocols.source import SourceOptions

    options = SourceOptions(download_dir=settings.server.download_dir, weights=download)
    folder = resolve_model(model, registry(), options)
    report = lint(
        settings,
        folder,
        target,
        registry(),
        imagined=arch is not None,
        bandwidth=bandwidth,
        # A hub's model whose weights were not asked for is no broken one.
        weights=download or Path(model).expanduser().is_dir(),
    )
    if as_json:
        print_json(report.to_json())
    else:
        render(report, console())
    if report.count("error") or (strict and report.count("warning")):
        ctx.exit(1)


def _device(settings: Settings, arch: str | None) -> DeviceInfo:
    from pymllm_core.device import describe_device

    server = settings.server
    if arch is not None:
        from pymllm_core.lint.device import imagined_device

        if server.device == "cpu":
            raise ConfigError(
                f"--arch {arch} names a CUDA device, and --device the CPU; leave one of them out"
            )
        return imagined_device(arch)
    try:
        return describe_device(server.base_gpu_id, force=None if server.device == "auto" else server.device)
    except ConfigError as error:
        raise ConfigError(f"{error}; --arch 8.7 checks for a device that is not here") from error


def render(report: Report, out: Console) -> None:
    """Print the report for a person: the table of layers, the findings, the totals, the verdict."""
    device = report.device
    capability = ", compute capability {}.{}".format(*device.capability) if device.capability else ""
    name = device.name if capability in f", {device.name}" else f"{device.name}{capability}"
    served = f"; {report.dtype}" if report.dtype else ""
    cache = f", KV in {report.kv_dtype}, attention by {report.attention}" if report.attention else ""
    out.print(f"{report.architecture or 'no architecture'} from {report.folder}", style="bold")
    out.print(f"on {device.type}: {name}{served}{cache}\n")
    _render_rows(report, out)
    for finding in report.findings:
        out.print(_finding(finding))
    if report.findings:
        out.print()
    _render_totals(report, out)
    counts = ", ".join(
        f"{count} {severity}{'' if count == 1 else 's'}"
        for severity in ("error", "warning", "note")
        if (count := report.count(severity))
    )
    verdict = "it will not load" if report.count("error") else "it will load"
    out.print(
        f"\n{verdict}: {counts or 'nothing to remark'}", style="bold red" if report.count("error") else "bold"
    )


def _render_rows(report: Report, out: Console) -> None:
    from pymllm_core.lint.names import printable

    known = any(row.operation for row in report.rows)
    shown = (
        new_table("Layers", "N x K", "Format", "Operation", "Kernel")
        if known
        else new_table("Modules", "Stored")
    )
    for row in report.rows:
        names = printable(" ".join(row.names[:SHOWN]))
        if len(row.names) > SHOWN:
            names += f" and {len(row.names) - SHOWN} more"
        if known:
            size = "" if row.rows is None else f"{row.rows} x {row.columns}"
            shown.add_row(names, size, row.format, row.operation, row.kernel or "")
        else:
            shown.add_row(names, printable(row.format))
    if report.rows:
        out.print(shown)
        out.print()


def _finding(finding: Finding) -> Text:
    from rich.text import Text

    from pymllm_core.lint.names import printable, shorten

    names = shorten(finding.where)
    where = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
    text = Text(f"{finding.severity}: ", style=_STYLES[finding.severity])
    if not finding.message.partition(" ")[0].endswith(where):  # it may begin with the file or field itself
        text.append(printable(where), style="bold").append(": ", style="not bold")
    text.append("\n  ".join(printable(line) for line in finding.message.splitlines()))
    if finding.advice:
        text.append(f"\n  → {printable(finding.advice)}", style="yellow")
    text.append(f" [{finding.code}]", style="dim")
    return text


def _render_totals(report: Report, out: Console) -> None:
    totals = report.totals
    shown = new_table("Bytes", "")
    stored = ", ".join(f"{human_bytes(size)} {dtype}" for dtype, size in totals.stored.items())
    shown.add_row("stored, by dtype", stored or "nothing")
    for name, size in totals.weights.items():
        shown.add_row(f"weights, {name}", human_bytes(size))
    if totals.weights_per_token is not None:
        shown.add_row("weights read for each decoded token", human_bytes(totals.weights_per_token))
    if totals.kv_per_token is not None:
        shown.add_row("KV of each token of context", human_bytes(totals.kv_per_token))
    for cost in totals.tokens:
        floor = "" if cost.floor_ms is None else f", {cost.floor_ms:.2f} ms at least"
        shown.add_row(f"a token behind {cost.context} of context", f"{human_bytes(cost.num_bytes)}{floor}")
    out.print(shown)
