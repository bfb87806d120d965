"""Plots of a load test: curves over the loads, or the distributions of a single one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pymllm_core.bench.client import Outcome
from pymllm_core.bench.load_report import PERCENTILES
from pymllm_core.bench.plot import Row, figure, save

_TITLES = {
    "ttft": "time to the first piece",
    "itl": "time between two pieces",
    "e2e": "time to the end of the answer",
}


def plot_serve(rows: Sequence[Row], last: Sequence[Outcome], path: Path) -> None:
    """rows: of one run, all by concurrency or all by rate. last: the answered requests of the last row."""
    answered = [row for row in rows if row["completed"]]
    first = answered[0]
    asked = f"prompts of {first['input_len']}" if first["input_len"] else Path(first["dataset"]).name
    title = f"{first['model']} at {first['url']}; {asked}, answers of {first['output_len']} tokens"
    if len(answered) > 1:
        _curves(title, answered, path)
    else:
        _distributions(title, first, last, path)


def _curves(title: str, rows: Sequence[Row], path: Path) -> None:
    by = "concurrency" if rows[0]["concurrency"] is not None else "request_rate"
    label = "requests under way" if by == "concurrency" else "requests that arrive (1/s)"
    rows = sorted(rows, key=lambda row: row[by])
    at = [row[by] for row in rows]
    made, panels = figure(title, 3)
    throughput, *latencies = panels
    throughput.plot(at, [row["output_throughput"] for row in rows], "o-", label="answered tokens")
    throughput.set(title="throughput", ylabel="tokens a second")
    if rows[0]["slo"]:
        limits = ", ".join(f"{name} {value:g} ms" for name, value in rows[0]["slo"].items())
        share = throughput.twinx()
        share.plot(at, [100 * row["goodput_share"] for row in rows], "s--", color="C2")
        share.set(ylabel=f"requests within {limits} (%)", ylim=(0, 105))
        throughput.plot([], [], "s--", color="C2", label="requests within the limits")
    for axes, name in zip(latencies, ("ttft", "itl"), strict=True):
        for percent in PERCENTILES:
            values = [row[f"{name}_ms_p{percent}"] for row in rows]
            axes.plot(at, [float("nan") if v is None else v for v in values], "o-", label=f"p{percent}")
        if limit := (rows[0]["slo"] or {}).get(name):
            axes.axhline(limit, color="gray", ls="--", label=f"limit {limit:g} ms")
        axes.set(title=_TITLES[name], ylabel="ms")
    for axes in panels:
        axes.set_xlabel(label)
        if max(at) >= 4 * min(at):
            axes.set_xscale("log", base=2)
        axes.set_xticks(at, [f"{value:g}" for value in at])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        # Beneath: curves that rise and fall leave no corner free.
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=4, frameon=False)
    save(made, path)


def _distributions(title: str, row: Row, outcomes: Sequence[Outcome], path: Path) -> None:
    values: dict[str, list[float]] = {
        "ttft": [o.ttft for o in outcomes],
        "itl": [gap for o in outcomes for gap in o.gaps],
        "e2e": [o.e2e for o in outcomes],
    }
    load = f"{row['concurrency']} at once" if row["concurrency"] else f"{row['request_rate']:g} requests/s"
    made, panels = figure(f"{title}; {load}, {row['output_throughput']:.0f} tokens/s", 3)
    for axes, (name, seconds) in zip(panels, values.items(), strict=True):
        _distribution(axes, sorted(1e3 * value for value in seconds))
        if limit := (row["slo"] or {}).get(name):
            axes.axvline(limit, color="gray", ls="--", label=f"limit {limit:g} ms")
        axes.set(title=_TITLES[name], xlabel="ms", ylabel="no more than that (%)", ylim=(0, 101))
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="lower right")
    save(made, path)


def _distribution(axes: Any, values: Sequence[float]) -> None:
    """The share of values that are no more than x, and the row's percentiles as lines."""
    shares = [100 * (rank + 1) / len(values) for rank in range(len(values))]
    axes.step(values, shares, where="post", label=f"{len(values)} measured")
    if values:
        import numpy as np

        for percent, style in zip(PERCENTILES, (":", "-.", "-"), strict=True):
            value = float(np.percentile(values, percent))
            axes.axvline(value, color="C1", ls=style, lw=1, label=f"p{percent} {value:.1f} ms")
