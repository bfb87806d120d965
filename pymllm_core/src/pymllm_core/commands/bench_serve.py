"""``pymllm bench serve``: load a running server and measure what its clients see."""

from __future__ import annotations

import asyncio
import json
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pymllm_core.commands.base import console, is_terminal, spread
from pymllm_core.errors import ConfigError, EngineError

if TYPE_CHECKING:
    from pymllm_core.bench.client import Outcome
    from pymllm_core.bench.serve import Load, ServeOptions

RESULT_NAME = "pymllm_bench_serve.jsonl"
_NUMBER = r"\d+(\.\d+)?"
_VALUES = {
    "--concurrency": re.compile(r"\d+"),
    "--request-rate": re.compile(_NUMBER),
    "--slo": re.compile(rf"\w+:{_NUMBER}"),
}
_positive = click.IntRange(min=1)


class ServeCommand(click.Command):
    """Takes several values in a row, ``--concurrency 1 8``, as click's own options cannot."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, spread(args, _VALUES))


@click.command("serve", cls=ServeCommand, short_help="a running server under load")
@click.option("--url", default="http://127.0.0.1:30000", show_default=True, help="The server.")
@click.option("--model", help="Its name there. [default: the first of /v1/models]")
@click.option("--api-key", envvar="PYMLLM_API_KEY", help="Bearer token. [env: PYMLLM_API_KEY]")
@click.option("--concurrency", type=_positive, multiple=True, help="Requests under way. [default: 1]")
@click.option(
    "--request-rate",
    type=click.FloatRange(min=0, min_open=True),
    multiple=True,
    help="Requests that arrive a second, at random times (Poisson), instead of --concurrency.",
)
@click.option("--num-requests", type=_positive, default=64, show_default=True, help="For each load.")
@click.option("--input-len", default="256", show_default=True, help="Prompt tokens: 256, or 100:1024.")
@click.option("--output-len", default="128", show_default=True, help="Answer tokens, likewise.")
@click.option("--vocab-size", type=int, help="Random ids are lower. [default: the server's, else 5000]")
@click.option(
    "--dataset",
    type=click.Path(path_type=Path),
    help="JSONL of {prompt or messages, max_tokens}, instead of random ids.",
)
@click.option(
    "--warmup", type=_positive, default=2, show_default=True, help="Requests before the clock runs."
)
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True)
@click.option(
    "--slo", multiple=True, help="Limits in ms that make a request good: ttft:200 itl:50 tpot: e2e:"
)
@click.option("--extra-body", default="{}", help="JSON object that goes into every request.")
@click.option(
    "--timeout", type=click.FloatRange(min=1), default=600.0, show_default=True, help="Seconds without news."
)
@click.option(
    "--processes",
    type=_positive,
    help="Client processes. [default: one for each 8 requests at once or a second, on half of the cores at most]",
)
@click.option("--seed", type=int, default=42, show_default=True, help="Of prompts, lengths and arrivals.")
@click.option("--run-name", default="default", show_default=True, help="Names the run in its rows.")
@click.option(
    "--result-filename",
    type=click.Path(dir_okay=False, path_type=Path),
    help=f"JSONL file to append to. [default: {RESULT_NAME} in the temporary folder]",
)
@click.option(
    "--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw the rows (PNG, SVG, PDF)."
)
@click.pass_context
def serve(ctx: click.Context, /, **flags: Any) -> None:
    """Measure a running server: throughput, and the latencies that its clients see.

    --concurrency keeps so many requests under way; --request-rate sends them however many are. Each takes
    several values, which are measured one after another.
    """
    if flags["concurrency"] and flags["request_rate"]:
        raise click.UsageError("--concurrency and --request-rate exclude each other", ctx)
    if flags["plot"] is not None:
        from pymllm_core.bench.plot import check_plot

        check_plot(flags["plot"])
    asyncio.run(_run(_options(flags), flags["plot"]))


def _options(flags: dict[str, Any]) -> ServeOptions:
    from pymllm_core.bench.load_report import parse_objectives
    from pymllm_core.bench.record import command_line
    from pymllm_core.bench.serve import Load, ServeOptions
    from pymllm_core.bench.workload import Range

    try:
        extra = json.loads(flags["extra_body"])
    except ValueError:
        extra = None
    if not isinstance(extra, dict):
        raise ConfigError(f"--extra-body: found {flags['extra_body']!r}, allowed: a JSON object")
    loads = [Load(rate=rate) for rate in flags["request_rate"]]
    loads = loads or [Load(concurrency=number) for number in flags["concurrency"] or (1,)]
    return ServeOptions(
        url=flags["url"].rstrip("/"),
        model=flags["model"],
        api_key=flags["api_key"],
        loads=tuple(loads),
        num_requests=flags["num_requests"],
        inputs=Range.parse(flags["input_len"]),
        outputs=Range.parse(flags["output_len"]),
        vocab_size=flags["vocab_size"],
        dataset=flags["dataset"],
        warmup=flags["warmup"],
        temperature=flags["temperature"],
        slo=parse_objectives(flags["slo"]),
        extra_body=extra,
        timeout=flags["timeout"],
        processes=flags["processes"],
        seed=flags["seed"],
        run_name=flags["run_name"],
        result_filename=flags["result_filename"] or Path(tempfile.gettempdir()) / RESULT_NAME,
        command=command_line("pymllm", "bench", "serve"),
    )


async def _run(options: ServeOptions, plot: Path | None) -> None:
    from pymllm_core.bench.serve import measure

    rows: list[dict[str, Any]] = []
    outcomes: list[Outcome] = []
    click.echo(_HEADER)
    with _progress(options.num_requests) as (begun, ended):
        async for row, measured in measure(options, begun, ended):
            rows.append(row)
            outcomes = measured
            click.echo(_line(row))
            for line in _remarks(row):
                click.echo(line)
    click.echo(f"{len(rows)} row(s) appended to {options.result_filename}")
    if plot is not None and any(row["completed"] for row in rows):
        from pymllm_core.bench.plot_serve import plot_serve

        plot_serve(rows, [outcome for outcome in outcomes if outcome.error is None], plot)
        click.echo(f"plot: {plot}")
    if not any(row["completed"] for row in rows):
        raise EngineError("no request was answered; the errors are above")


@contextmanager
def _progress(count: int) -> Iterator[tuple[Any, Any]]:
    """(begun, ended) for `measure`: a bar on stderr where a person looks at it."""
    if not is_terminal(sys.stderr):
        yield (lambda load: None), (lambda: None)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console(sys.stderr), transient=True) as bar:
        task = bar.add_task("warming up", total=count)

        def begun(load: Load) -> None:
            bar.reset(task, total=count, description=str(load))

        yield begun, lambda: bar.advance(task)


_COLUMNS = ("ttft_ms_p50", "ttft_ms_p99", "tpot_ms_p50", "itl_ms_p99", "e2e_ms_p50", "e2e_ms_p99")
_HEADER = f"{'load':>12}{'ok':>6}{'req/s':>8}{'out tok/s':>10}" + "".join(
    f"{name.replace('_ms_', ' '):>10}" for name in _COLUMNS
)
_HEADER += f"{'good/s':>8}   (times in ms)"


def _line(row: dict[str, Any]) -> str:
    load = f"{row['concurrency']} at once" if row["concurrency"] else f"{row['request_rate']:g}/s"
    times = ["-" if row[name] is None else f"{row[name]:.1f}" for name in _COLUMNS]
    return (
        f"{load:>12}{row['completed']:>6}{row['request_throughput']:>8.2f}{row['output_throughput']:>10.1f}"
        + "".join(f"{time:>10}" for time in times)
        + ("-" if row["goodput"] is None else f"{row['goodput']:.2f}").rjust(8)
    )


def _remarks(row: dict[str, Any]) -> Iterator[str]:
    for error, count in row["errors"].items():
        yield f"  {count} failed: {error}"
    if row["client_cpu_share"] > 0.8:
        used = f"{row['client_cpu_share']:.0%} of a core"
        yield f"  a client process used {used}: these latencies may be its own; raise --processes"
