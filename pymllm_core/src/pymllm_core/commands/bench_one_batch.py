"""``pymllm bench one-batch``: time a static batch in this process."""

from __future__ import annotations

import logging
import re
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pymllm_core.commands.base import SettingsCommand, progress_bar, settings_of, spread
from pymllm_core.errors import ConfigError, EngineError

if TYPE_CHECKING:
    from pymllm_core.bench.one_batch import Options, Sizes
    from pymllm_core.config import Settings

RESULT_NAME = "pymllm_bench_one_batch.jsonl"
_SWEPT = ("--batch-size", "--input-len", "--output-len")
_VALUES = {**dict.fromkeys(_SWEPT, re.compile(r"\d+")), "--profile-activities": re.compile("CPU|GPU")}
_positive = click.IntRange(min=1)


class OneBatchCommand(SettingsCommand):
    """Takes several values in a row, ``--batch-size 1 8``, as click's own options cannot."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, spread(args, _VALUES))


@click.command("one-batch", cls=OneBatchCommand, short_help="a static batch in this process")
@click.argument("model", required=False)
@click.option("--run-name", default="default", show_default=True, help="Names the run in its rows.")
@click.option("--batch-size", type=_positive, multiple=True, default=(1,), help="Sequences. [default: 1]")
@click.option(
    "--input-len",
    type=_positive,
    multiple=True,
    default=(256, 512, 1024),
    help="Prompt tokens of each. [default: 256 512 1024]",
)
@click.option(
    "--output-len",
    type=_positive,
    multiple=True,
    default=(128,),
    help="Answer tokens of each, the one that the prefill yields among them. [default: 128]",
)
@click.option(
    "--result-filename",
    type=click.Path(dir_okay=False, path_type=Path),
    help=f"JSONL file to append to. [default: {RESULT_NAME} in the temporary folder]",
)
@click.option("--log-decode-step", type=click.IntRange(min=0), default=0, help="Print every Nth decode step.")
@click.option("--seed", type=int, default=42, show_default=True, help="Of the random prompts.")
@click.option("--skip-warmup", is_flag=True, help="Time the first run of each setting.")
@click.option("--repeat", type=_positive, default=1, show_default=True, help="Runs whose median is reported.")
@click.option(
    "--limits",
    type=click.Choice(["cached", "measure", "off"]),
    default="cached",
    show_default=True,
    help="What the device can do at best: from the cache, measured anew, or not asked for.",
)
@click.option(
    "--plot", type=click.Path(dir_okay=False, path_type=Path), help="Draw the rows (PNG, SVG, PDF)."
)
@click.option("--profile", is_flag=True, help="Write traces of a further, untimed run.")
@click.option("--profile-record-shapes", is_flag=True, help="Record the shapes of operators' inputs.")
@click.option(
    "--profile-activities",
    type=click.Choice(["CPU", "GPU"]),
    multiple=True,
    default=("CPU", "GPU"),
    help="[default: CPU GPU]",
)
@click.option(
    "--profile-stage", type=click.Choice(["all", "prefill", "decode"]), default="all", show_default=True
)
@click.option("--profile-filename-prefix", default="pymllm_profile", show_default=True)
@click.option(
    "--profile-start-step", type=click.IntRange(min=0), help="First decode step. [default: the middle one]"
)
@click.option("--profile-steps", type=_positive, default=1, show_default=True, help="Decode steps.")
@click.option("--image", "--image-path", "image", type=click.Path(path_type=Path), help="For vision models.")
@click.option("--prompt", help="With --correct: the prompt to continue, in place of three short ones.")
@click.option(
    "--correct",
    "--correctness-test",
    "correct",
    is_flag=True,
    help="Measure nothing: continue real prompts and print the text.",
)
@click.pass_context
def one_batch(ctx: click.Context, /, model: str | None, **flags: Any) -> None:
    """Time a static prefill and the decode steps after it, for every combination of sizes.

    No HTTP, scheduler or tokenizer takes part: the engine's runner computes a fixed batch of random prompts,
    greedily, and each step's clock stops when its tokens are on the host. Sizes take several values.
    """
    settings = settings_of(ctx, model)
    if flags["image"] is not None:
        raise ConfigError("--image is refused: no installed model takes images; leave it out")
    if flags["prompt"] is not None and not flags["correct"]:
        raise click.UsageError("--prompt is for --correct; prompts that are timed are random", ctx)
    if flags["plot"] is not None:
        from pymllm_core.bench.plot import check_plot

        check_plot(flags["plot"])
    logging.basicConfig(
        level=settings.server.log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    options = _options(flags)  # brings torch along
    if flags["correct"]:
        _correct(settings, options, flags["prompt"])
    else:
        _measure(settings, options, flags["plot"])


def _options(flags: dict[str, Any]) -> Options:
    from pymllm_core.bench.one_batch import Options, sweep
    from pymllm_core.bench.profiling import ProfileOptions
    from pymllm_core.bench.record import command_line

    start, outputs = flags["profile_start_step"], flags["output_len"]
    if flags["profile"] and start is not None and start >= max(outputs) - 1:
        raise ConfigError(
            f"--profile-start-step {start}: the longest answer has {max(outputs) - 1} decode steps (from 0)"
        )
    profile = ProfileOptions(
        activities=flags["profile_activities"],
        record_shapes=flags["profile_record_shapes"],
        stage=flags["profile_stage"],
        prefix=flags["profile_filename_prefix"],
        start_step=start,
        steps=flags["profile_steps"],
    )
    return Options(
        run_name=flags["run_name"],
        sizes=tuple(sweep(flags["batch_size"], flags["input_len"], outputs)),
        result_filename=flags["result_filename"] or Path(tempfile.gettempdir()) / RESULT_NAME,
        log_decode_step=flags["log_decode_step"],
        seed=flags["seed"],
        skip_warmup=flags["skip_warmup"],
        repeat=flags["repeat"],
        limits=flags["limits"],
        profile=profile if flags["profile"] else None,
        command=command_line("pymllm", "bench", "one-batch"),
    )


def _measure(settings: Settings, options: Options, plot: Path | None) -> None:
    from pymllm_core.bench.one_batch import OneBatch

    with progress_bar(f"starting {settings.server.model_path}") as progress:
        bench = OneBatch(settings, options, progress or (lambda _: None))
    plan = bench.plan
    click.echo(
        f"{plan.architecture}, {plan.dtype}, on {plan.device.name}; loaded in {bench.load_seconds:.1f} s"
    )
    if bench.limits is not None:
        rates = ", ".join(f"{kind} {rate / 1e12:.3g} TOP/s" for kind, rate in bench.limits.matrix.items())
        click.echo(f"limits of the device: reads {bench.limits.read / 1e9:.4g} GB/s; multiplies {rates}")
    click.echo(_HEADER)

    def skipped(size: Sizes, why: str) -> None:
        click.echo(f"{size.batch_size:>6}{size.input_len:>7}{size.output_len:>7}  skipped: {why}")

    def logged(step: int, seconds: float) -> None:
        click.echo(f"  decode step {step}: {1e3 * seconds:.3f} ms")

    rows = []
    traces: list[Path] = []
    for row in bench.rows(skipped, traces.append, logged):
        click.echo(_line(row))
        rows.append(row)
    if not rows:
        raise EngineError("no setting fits this engine, so nothing was measured; the reasons are above")
    click.echo(f"{len(rows)} row(s) appended to {options.result_filename}")
    for path in traces:
        click.echo(f"trace: {path} (open it in https://ui.perfetto.dev)")
    if plot is not None:
        from pymllm_core.bench.plot import plot_one_batch

        plot_one_batch(rows, plot)
        click.echo(f"plot: {plot}")


_HEADER = (
    f"{'batch':>6}{'input':>7}{'output':>7}{'prefill ms':>12}{'tok/s':>9}{'of limit':>9}"
    f"{'decode ms':>12}{'tok/s':>9}{'of limit':>9}"
)


def _line(row: dict[str, Any]) -> str:
    def share(stage: str) -> str:
        shares = [row[f"{stage}_bandwidth_share"], row[f"{stage}_matrix_share"]]
        return "-" if None in shares else f"{max(shares):.0%}"

    def part(latency: str, throughput: str, stage: str) -> str:
        if not row[latency]:
            return f"{'-':>12}{'-':>9}{'-':>9}"
        return f"{1e3 * row[latency]:>12.3f}{row[throughput]:>9.0f}{share(stage):>9}"

    return (
        f"{row['batch_size']:>6}{row['input_len']:>7}{row['output_len']:>7}"
        + part("prefill_latency", "prefill_throughput", "prefill")
        + part("median_decode_latency", "median_decode_throughput", "decode")
    )


def _correct(settings: Settings, options: Options, prompt: str | None) -> None:
    from pymllm_core.bench.correctness import PROMPTS, answers
    from pymllm_core.bench.one_batch import fit, sweep
    from pymllm_core.engine.build import assemble, build_engine

    prompts = PROMPTS if prompt is None else (prompt,)
    output_len = options.sizes[0].output_len
    # As many prompts as there are, which are longer than a token each and shorter than 1024.
    settings = fit(settings, sweep([len(prompts)], [1024], [output_len]))
    with progress_bar(f"starting {settings.server.model_path}") as progress:
        engine = build_engine(assemble(settings, weights=True), progress=progress or (lambda _: None))
    found = answers(engine, prompts, output_len)
    for answer in found:
        click.echo(f"prompt: {answer.prompt}")
        click.echo(f"answer: {answer.text}")
        served = "the same" if answer.differs is None else f"another answer from token {answer.differs}"
        click.echo(f"served alone: {served}\n")
    if any(answer.differs == 0 for answer in found):
        raise EngineError("a first token depends on the batch that it was computed in, which is a fault")
