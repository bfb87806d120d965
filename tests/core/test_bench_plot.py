"""Plots: what a figure says, and that it is a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pymllm_core.bench import plot
from pymllm_core.errors import ConfigError

COMMON = {"model": "/models/Toy", "dtype": "bfloat16", "quantisation": None, "device_name": "a CPU"}


def one_batch_row(batch: int, length: int, floor: float | None = 0.001) -> dict[str, Any]:
    return {
        **COMMON,
        "batch_size": batch,
        "input_len": length,
        "output_len": 4,
        "prefill_latency": 0.002 * batch * length,
        "median_decode_latency": 0.003 * batch,
        "prefill_floor": floor,
        "decode_floor": floor,
    }


@pytest.fixture
def panels(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The panels of the last figure that was saved."""
    found: list[Any] = []
    save = plot.save

    def kept(made: Any, path: Path) -> None:
        found[:] = made.axes
        save(made, path)

    monkeypatch.setattr(plot, "save", kept)
    return found


def test_a_sweep_has_a_line_for_each_batch_and_its_limit(tmp_path: Path, panels: list[Any]) -> None:
    rows = [one_batch_row(batch, length) for batch in (1, 8) for length in (16, 64, 256)]
    path = tmp_path / "new" / "sweep.png"
    plot.plot_one_batch(rows, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    prefill, decode = panels
    assert prefill.get_xlabel() == "prompt (tokens)"
    assert prefill.get_ylabel() == "time to prefill the batch (ms)"
    assert decode.get_ylabel() == "median time of a step (ms)"
    names = [text.get_text() for text in prefill.get_legend().get_texts()]
    assert names == ["batch 1", "batch 8", "limit of the device"]
    lines = {line.get_label(): line for line in decode.get_lines()}
    assert list(lines["batch 8"].get_ydata()) == pytest.approx([24.0, 24.0, 24.0])  # milliseconds
    dashed = [line for line in decode.get_lines() if line.get_linestyle() == "--" and len(line.get_xdata())]
    assert [list(line.get_ydata()) for line in dashed] == [[1.0, 1.0, 1.0]] * 2
    assert prefill.get_ylim() == pytest.approx((0, 1.1 * 2 * 8 * 256))


def test_a_sweep_over_batches_without_limits(tmp_path: Path, panels: list[Any]) -> None:
    plot.plot_one_batch([one_batch_row(batch, 16, None) for batch in (1, 2)], tmp_path / "x.svg")
    assert panels[0].get_xlabel() == "batch size (sequences)"
    assert [text.get_text() for text in panels[0].get_legend().get_texts()] == ["measured"]
    assert "<svg" in (tmp_path / "x.svg").read_text()


def test_prefills_alone_leave_the_other_panel_empty(tmp_path: Path, panels: list[Any]) -> None:
    plot.plot_one_batch([{**one_batch_row(1, 16), "median_decode_latency": 0.0}], tmp_path / "x.png")
    assert not panels[1].get_lines()


def test_what_cannot_be_drawn_is_said_first(monkeypatch: pytest.MonkeyPatch) -> None:
    plot.check_plot(Path("x.png"))
    with pytest.raises(
        ConfigError, match=r"--plot x.gnu: found the ending '.gnu', allowed: .png, .svg, .pdf"
    ):
        plot.check_plot(Path("x.gnu"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'pymllm-core\[bench\]'"):
        plot.check_plot(Path("x.png"))
