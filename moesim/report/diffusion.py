"""The figure of a diffusion study: refresh policies against the best schedule, intervals as a curve, and coresets."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from moesim.errors import InputError
from moesim.report.headline import resident_rows
from moesim.report.plots import (
    BLUE,
    BOUND_MARK,
    ORANGE,
    PALETTE,
    bar_text,
    bars,
    bound_marks,
    column,
    legend,
    line,
    looks,
    panels,
    patch,
    value_axis,
)
from moesim.report.tables import NO_CORESET, format_count, number
from moesim.simulate.study import StudyResult
from moesim.units import format_percent, format_seconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OPTIMAL, INTERVAL = "optimal", "interval"
Draw = Callable[["Axes"], Any]


def diffusion_figure(study: StudyResult) -> Figure:
    """Tokens per second by policy, one colour per budget, with the best schedule as a line across the bars; tokens per
    second over the interval; time per pass of each coreset, with its accuracy. A panel without rows is left out.

    Raises:
        InputError: the table has neither refresh policies nor coresets.
    """
    resident = resident_rows(study.table)
    refreshed = study.table.drop(index=resident.index)
    curves = refreshed[refreshed["policy"] == INTERVAL]
    colors = looks(sorted(set(refreshed["slots_per_layer"])), PALETTE)
    best = _optimum(refreshed)
    draws: list[Draw] = []
    if len(refreshed):
        draws.append(lambda axis: _policies(axis, refreshed, colors, best))
    if len(set(column(curves, "tau").tolist())) > 1:
        draws.append(lambda axis: _intervals(axis, curves, colors, best))
    if len(resident):
        draws.append(lambda axis: _coresets(axis, resident))
    if not draws:
        raise InputError(f"study {study.name!r}: there are no rows to draw")
    num_bars = max(len(_labels(refreshed)) * max(1.6, len(colors)), 1.6 * len(resident), 6)
    figure, axes = panels(len(draws), 1.0 + 0.26 * num_bars)
    for draw, axis in zip(draws, axes, strict=True):
        draw(axis)
    entries = [(patch(color), f"{slots:g} experts per layer on the GPU") for slots, color in colors.items()]
    entries += [(line(**BOUND_MARK), "best schedule")] if best else []
    legend(figure, entries)
    return figure


def _labels(table: pd.DataFrame) -> list[str]:
    """The policies but the best schedule itself, in the table's order."""
    return [name for name in dict.fromkeys(table["policy"].astype(str)) if name != OPTIMAL]


def _optimum(table: pd.DataFrame) -> dict[float, float]:
    """Tokens per second of the best schedule for each number of slots, where the table has it."""
    rows = table[table["policy"] == OPTIMAL]
    return dict(zip(rows["slots_per_layer"].tolist(), column(rows, "tokens_per_s").tolist(), strict=True))


def _policies(axis: Axes, table: pd.DataFrame, colors: dict[float, str], best: dict[float, float]) -> None:
    """Bars per policy and number of slots; of several intervals or factors the best one."""
    labels = _labels(table) or [OPTIMAL]
    shown = table.assign(speed=column(table, "tokens_per_s")).groupby(["policy", "slots_per_layer"])["speed"].max()
    height = 0.8 / len(colors)
    for place, (slots, color) in enumerate(colors.items()):
        at = np.arange(len(labels)) + height * (place - (len(colors) - 1) / 2)
        values = np.array([shown.get((label, slots), np.nan) for label in labels])
        optimum = best.get(slots, np.nan)
        bars(axis, at, values, height, [color] * len(labels), None)
        bound_marks(axis, at, np.full(len(at), optimum), height)
        for y, value in zip(at.tolist(), values.tolist(), strict=True):
            bar_text(axis, np.fmax(value, optimum), y, format_count(value) if np.isfinite(value) else "")
    axis.margins(x=0.15)
    value_axis(axis.xaxis, format_count)
    axis.set_yticks(range(len(labels)), [_best_of_many(label, table) for label in labels])
    axis.invert_yaxis()
    axis.set_xlabel("tokens per second")


def _best_of_many(label: str, table: pd.DataFrame) -> str:
    """``interval, best tau`` where one bar stands for several rows."""
    rows = table[table["policy"] == label]
    many = [key for key in ("tau", "factor") if rows.groupby("slots_per_layer").size().max() > 1
            and len(set(column(rows, key, 0.0).tolist())) > 1]
    return ", best ".join([label, *many[:1]])


def _intervals(axis: Axes, table: pd.DataFrame, colors: dict[float, str], best: dict[float, float]) -> None:
    """One curve per number of slots over tau, the best schedule as a dashed line."""
    for slots, rows in table.sort_values("tau").groupby("slots_per_layer"):
        axis.plot(column(rows, "tau"), column(rows, "tokens_per_s"), color=colors[slots], marker="o", markersize=4)
        if slots in best:
            axis.axhline(best[slots], color=colors[slots], linestyle="--", linewidth=1.2)
    axis.set_xlabel("passes between refreshes (tau); dashed: best schedule")
    axis.set_title("tokens per second", fontsize=9.5)
    axis.set_ylim(bottom=0)
    value_axis(axis.yaxis, format_count)
    taus = sorted(set(column(table, "tau").tolist()))
    if len(taus) <= 8:
        axis.set_xticks(taus, [f"{tau:g}" for tau in taus])
    axis.grid(alpha=0.25)


def _coresets(axis: Axes, table: pd.DataFrame) -> None:
    """Stacked bars of a pass: its routed experts, and the rest; the accuracy beside them."""
    names = table["policy"].astype(str).tolist()
    at = np.arange(len(table))
    experts, total = column(table, "experts_step_s", 0.0), column(table, "step_time_s")
    axis.barh(at, experts, 0.7, color=BLUE)
    axis.barh(at, total - experts, 0.7, left=experts, color=ORANGE, alpha=0.45)
    for y, (value, row) in enumerate(zip(total, table.to_dict(orient="records"), strict=True)):
        bar_text(axis, float(value), float(y), _debit(row))
    axis.margins(x=0.5)
    axis.set_yticks(at, names)
    axis.invert_yaxis()
    axis.set_xlabel("time per pass, all experts on the GPU (solid: routed experts)")
    value_axis(axis.xaxis, format_seconds)


def _debit(row: dict[Any, Any]) -> str:
    """What stands beside a bar: the published accuracy, or the gate weight that is lost."""
    if row.get("coreset", NO_CORESET) == NO_CORESET:
        return "unchanged"
    published, lost = number(row.get("published_accuracy_fraction")), number(row.get("lost_weight_share"))
    if published is not None:
        return f"{format_percent(published)} accuracy (published)"
    return "accuracy unknown" if lost is None else f"{format_percent(lost)} of gate weight lost"
