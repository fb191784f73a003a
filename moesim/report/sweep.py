"""The picture of a sweep: throughput over the first number that was varied, a line per choice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from moesim.errors import InputError
from moesim.report.plots import LINE_STYLES, PALETTE, panels, value_axis
from moesim.report.tables import format_count
from moesim.units import format_bytes, format_rate, format_seconds

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_LINES = 12
LOG_RATIO = 8
CHOICE_KEYS = ("placement", "redundant_experts", "policy", "prefetch", "prefetch_width", "prefetch_recall", "miss", "slots_per_layer")
_UNITS = {"bytes_per_s": format_rate, "num_bytes": format_bytes, "latency_s": format_seconds,
          "kernel_overhead_s": format_seconds}


def sweep_figure(rows: pd.DataFrame, axes: Sequence[tuple[str, Sequence[Any]]]) -> Figure:
    """Return tokens per second over the first axis of at least two numbers; the best lines where there are many.

    Args:
        rows: the sweep's rows. axes: key and values of each axis.

    Raises:
        InputError: no axis of numbers, so that there is nothing to draw over.
    """
    key = next((name for name, values in axes if len(values) > 1 and not any(isinstance(v, str) for v in values)), None)
    if key is None:
        raise InputError("the sweep has no axis of at least two numbers to draw over")
    lines = _lines(rows, key, [name for name, _ in axes])
    figure, panes = panels(1, 4.6)
    axis = panes[0]
    for place, (label, part) in enumerate(lines[:MAX_LINES]):
        axis.plot(part[key], part["tokens_per_s"], LINE_STYLES[place // len(PALETTE) % len(LINE_STYLES)],
                  color=PALETTE[place % len(PALETTE)], marker=".", label=label)
    values = rows[key].to_numpy(np.float64)
    if values.min() > 0 and values.max() >= LOG_RATIO * values.min():
        axis.set_xscale("log")
    axis.set_xlabel(key)
    axis.set_ylabel("tokens per second")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.25)
    value_axis(axis.yaxis, format_count)
    value_axis(axis.xaxis, axis_text(key))
    many = f" (the best {MAX_LINES} of {len(lines)} lines)" if len(lines) > MAX_LINES else ""
    axis.set_title(f"Throughput over {key}{many}", loc="left")
    axis.legend(fontsize=8.5, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def axis_text(key: str) -> Any:
    """Return how a number of an axis is written: rates, sizes and times with their units."""
    return next((text for ending, text in _UNITS.items() if key.endswith(ending)), lambda value: f"{value:.4g}")


def _lines(rows: pd.DataFrame, key: str, names: Sequence[str]) -> list[tuple[str, pd.DataFrame]]:
    """Return (label, rows) of each line, the fastest first; a label has only what differs between lines."""
    keys = [name for name in dict.fromkeys((*CHOICE_KEYS, *names)) if name in rows and name != key]
    differing = [name for name in keys if rows[name].astype(str).nunique() > 1]
    if not differing:
        return [("", rows.sort_values(key))]
    found = []
    for values, part in rows.groupby([rows[name].astype(str) for name in differing], sort=False):
        label = ", ".join(filter(None, map(_label, differing, values)))
        found.append((label, part.sort_values(key)))
    return sorted(found, key=lambda item: -float(item[1]["tokens_per_s"].mean()))


def _label(name: str, value: str) -> str:
    """Return what a legend says of one key; nothing of a prefetcher that is not there."""
    if (name, value) in (("prefetch", "none"), ("prefetch_width", "0"), ("prefetch_recall", "None"), ("prefetch_recall", "nan")):
        return ""
    return value if name in ("policy", "placement") else f"{name.replace('_', ' ')} {value}"
