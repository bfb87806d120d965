"""From the outcomes of a load test to the numbers of its row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pymllm_core.bench.client import Outcome
from pymllm_core.errors import ConfigError

PERCENTILES = (50, 90, 99)
OBJECTIVES = ("ttft", "tpot", "itl", "e2e")


def parse_objectives(texts: Sequence[str]) -> dict[str, float]:
    """``ttft:200`` and the like, in milliseconds. Raises ConfigError."""
    found: dict[str, float] = {}
    for text in texts:
        name, _, value = text.partition(":")
        try:
            found[name] = float(value)
        except ValueError:
            found[name] = 0.0
        if name not in OBJECTIVES or not found[name] > 0:
            raise ConfigError(
                f"--slo {text}: allowed: NAME:MILLISECONDS, where NAME is one of {', '.join(OBJECTIVES)}"
            )
    return found


def meets(outcome: Outcome, objectives: Mapping[str, float]) -> bool:
    """Whether an answered request keeps every limit. itl: its longest gap; tpot: its mean time a token."""
    values = {
        "ttft": outcome.ttft,
        "tpot": outcome.tpot or 0.0,
        "itl": max(outcome.gaps, default=0.0),
        "e2e": outcome.e2e,
    }
    return all(1e3 * values[name] <= limit for name, limit in objectives.items())


def report(outcomes: Sequence[Outcome], objectives: Mapping[str, float]) -> dict[str, Any]:
    """The measured fields of a row; docs/reference/bench-serve.md has the meaning of each.

    The clock runs from the first request sent to the last answer's end. Failed requests count in `errors`, and in
    the duration, but in no other figure.
    """
    good = [outcome for outcome in outcomes if outcome.error is None]
    duration = max(o.ended for o in outcomes) - min(o.sent for o in outcomes)
    inputs, outputs = sum(o.input_tokens for o in good), sum(o.output_tokens for o in good)
    within = sum(meets(outcome, objectives) for outcome in good) if objectives else None
    return {
        "requests": len(outcomes),
        "completed": len(good),
        "errors": dict(Counter(o.error for o in outcomes if o.error is not None).most_common()),
        "duration": duration,
        "input_tokens": inputs,
        "output_tokens": outputs,
        "request_throughput": len(good) / duration,
        "input_throughput": inputs / duration,
        "output_throughput": outputs / duration,
        "total_throughput": (inputs + outputs) / duration,
        "tokens_per_piece": outputs / max(sum(len(o.pieces) for o in good), 1),
        "slo": dict(objectives) or None,
        "goodput": None if within is None else within / duration,
        "goodput_share": None if within is None else within / len(outcomes),
        **_spread("ttft", [o.ttft for o in good]),
        **_spread("itl", [gap for o in good for gap in o.gaps]),
        **_spread("tpot", [o.tpot for o in good if o.tpot is not None]),
        **_spread("e2e", [o.e2e for o in good]),
        "max_in_flight": _most_at_once(outcomes),
        "max_late_ms": 1e3 * max(o.late for o in outcomes),
    }


def _spread(name: str, seconds: Sequence[float]) -> dict[str, float | None]:
    """Mean and percentiles in milliseconds, by NumPy's linear interpolation; None of nothing."""
    fields = [f"{name}_ms_mean", *(f"{name}_ms_p{percent}" for percent in PERCENTILES)]
    if not seconds:
        return dict.fromkeys(fields)
    values = np.asarray(seconds) * 1e3
    return dict(zip(fields, map(float, (values.mean(), *np.percentile(values, PERCENTILES))), strict=True))


def _most_at_once(outcomes: Sequence[Outcome]) -> int:
    """The most requests that were under way at one time; one that ends when another begins is not."""
    changes = sorted([(o.ended, -1) for o in outcomes] + [(o.sent, 1) for o in outcomes])
    most = now = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most
