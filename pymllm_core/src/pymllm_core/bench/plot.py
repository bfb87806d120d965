"""Plots of rows; matplotlib is an optional extra and is imported only here."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pymllm_core.errors import ConfigError

Row = Mapping[str, Any]


FORMATS = (".png", ".svg", ".pdf")


def check_plot(path: Path) -> None:
    """Before anything is measured: raises ConfigError for an unknown format, or where matplotlib is missing."""
    if path.suffix not in FORMATS:
        raise ConfigError(f"--plot {path}: found the ending {path.suffix!r}, allowed: {', '.join(FORMATS)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib, which is not installed: pip install 'pymllm-core[bench]'")


def figure(title: str, panels: int) -> tuple[Any, list[Any]]:
    """(figure, its panels side by side) on a canvas that needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(6.4 * panels, 4.8), layout="constrained")
    FigureCanvasAgg(made)
    made.suptitle(title, fontsize=11)
    return made, [made.add_subplot(1, panels, index + 1) for index in range(panels)]


def save(made: Any, path: Path) -> None:
    """Write the figure; the format follows the file's ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made.savefig(path, dpi=120)


def plot_one_batch(rows: Sequence[Row], path: Path) -> None:
    """Prefill and decode of a sweep, with the floors that the device's limits set as dashed lines."""
    first = rows[0]
    names = [str(first["model"]).rstrip("/").rsplit("/", 1)[-1], str(first["dtype"])]
    names += [str(first["quantisation"])] if first["quantisation"] else []
    made, (left, right) = figure(f"{', '.join(names)} on {first['device_name']}", 2)
    _panel(left, rows, "prefill_latency", "prefill_floor", "prefill", "time to prefill the batch (ms)")
    decoded = [row for row in rows if row["median_decode_latency"]]
    _panel(right, decoded, "median_decode_latency", "decode_floor", "decode", "median time of a step (ms)")
    save(made, path)


def _panel(axes: Any, rows: Sequence[Row], field: str, floor: str, title: str, label: str) -> None:
    """x is the dimension with the most values; a line for each combination of the other two."""
    dimensions = {
        "input_len": "prompt (tokens)",
        "batch_size": "batch size (sequences)",
        "output_len": "answer (tokens)",
    }
    values = {name: sorted({row[name] for row in rows}) for name in dimensions}
    x = max(dimensions, key=lambda name: len(values[name]))
    others = [name for name in dimensions if name != x]
    short = {"input_len": "prompt", "batch_size": "batch", "output_len": "answer"}
    groups: dict[tuple[int, ...], list[Row]] = {}
    for row in sorted(rows, key=lambda row: row[x]):
        groups.setdefault(tuple(row[name] for name in others), []).append(row)
    top = 0.0
    for index, (group, members) in enumerate(sorted(groups.items())):
        said = [
            f"{short[name]} {value}"
            for name, value in zip(others, group, strict=True)
            if len(values[name]) > 1
        ]
        color = f"C{index % 10}"
        at = [row[x] for row in members]
        name = ", ".join(said) or "measured"
        axes.plot(at, [1e3 * row[field] for row in members], "o-", color=color, label=name)
        floors = [row[floor] for row in members]
        if None not in floors:
            # A single point makes no line.
            style = "--" if len(at) > 1 else "_"
            axes.plot(at, [1e3 * value for value in floors], style, color=color, alpha=0.7, ms=24)
            top = max(top, *floors)
    if top:
        axes.plot([], [], "--", color="gray", label="limit of the device")
    if len(values[x]) > 1 and min(values[x]) > 0 and max(values[x]) >= 4 * min(values[x]):
        axes.set_xscale("log", base=2)
    axes.set_xticks(values[x], [str(value) for value in values[x]])
    axes.minorticks_off()
    axes.set_ylim(0, 1.1e3 * max([top, *(row[field] for row in rows)]) or 1)
    axes.set(title=title, xlabel=dimensions[x], ylabel=label)
    axes.grid(alpha=0.3)
    if rows:
        axes.legend(fontsize=8)
