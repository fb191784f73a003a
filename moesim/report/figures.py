"""Figures of studies and results (matplotlib, drawn without its global state).

What colour says, a label or a line style says too. `plots.png_bytes` renders any of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from moesim.errors import InputError
from moesim.export.perfetto import lane_slices, natural_key
from moesim.lowering.graph import KINDS as TASK_KINDS
from moesim.report.diffusion import diffusion_figure
from moesim.report.headline import errors
from moesim.report.plots import (
    BLUE,
    BOUND_MARK,
    GREY,
    INK,
    INK_GID,
    KIND_COLORS,
    LINE_STYLES,
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
    tick_percent,
    value_axis,
)
from moesim.report.tables import check_study, format_count
from moesim.simulate.result import SimulationResult
from moesim.simulate.study import StudyResult
from moesim.units import format_bytes, format_percent, format_seconds, s_from_ns

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_BARS, MAX_LANES, MAX_SLICES = 12, 24, 600
OFFLOAD_PANELS = (("tokens_per_s", "tokens per second", format_count), ("hit_rate", "hit rate", tick_percent),
                  ("htod_bytes_per_token", "HtoD bytes per token", format_bytes))


def study_figures(study: StudyResult) -> dict[str, Figure]:
    """Return the figures of a study by name; see the function of its kind.

    Raises:
        InputError: an unknown kind, no rows, or a column that the figure needs is missing.
    """
    check_study(study)
    draw = {"expert_parallel": expert_parallel_figure, "offload": offload_figure, "diffusion": diffusion_figure,
            "validation": validation_figure}[study.kind]
    return {study.kind: draw(study)}


def result_figures(result: SimulationResult) -> dict[str, Figure]:
    """Return the figures of a result by name: where the time went, and the first step as a timeline.

    Raises:
        InputError: no task took time on a resource.
    """
    return {"time": time_figure(result), "timeline": gantt_figure(result)}


def expert_parallel_figure(study: StudyResult) -> Figure:
    """Bars per placement (one colour per number of redundant experts): step time, imbalance, traffic.

    Ticks across the bars are lower bounds. In the traffic the solid part crosses nodes.
    """
    table = study.table
    labels = list(dict.fromkeys(table["placement"].astype(str)))
    extra = column(table, "redundant_experts", 0.0)
    hues = sorted(set(extra))
    figure, axes = panels(3, 1.0 + 0.28 * len(labels) * max(1.6, len(hues)), sharey=True)
    height = 0.8 / len(hues)
    at = _places(labels, table["placement"].astype(str).tolist(), extra.tolist(), height)
    colors = [PALETTE[hues.index(e) % len(PALETTE)] for e in extra]
    bars(axes[0], at, column(table, "step_time_s"), height, colors, format_seconds)
    bound_marks(axes[0], at, column(table, "step_time_bound_s"), height)
    bars(axes[1], at, column(table, "imbalance"), height, colors, "{:.2f}".format, base=1.0)
    bound_marks(axes[1], at, column(table, "imbalance_bound"), height)
    bars(axes[2], at, column(table, "cross_rank_bytes_per_step"), height, colors, format_bytes, alpha=0.45)
    bars(axes[2], at, column(table, "cross_node_bytes_per_step"), height, colors, None)
    headings = ("step time", "imbalance (max / mean rank load)",
                "bytes across ranks per step (solid: nodes)")
    for axis, heading in zip(axes, headings, strict=True):
        axis.set_xlabel(heading)
    axes[0].set_yticks(range(len(labels)), labels)
    axes[0].invert_yaxis()
    colors_by_hue = looks(hues, PALETTE) if len(hues) > 1 else {}
    entries = [(patch(color), f"{hue:.0f} redundant experts") for hue, color in colors_by_hue.items()]
    legend(figure, [*entries, (line(**BOUND_MARK), "lower bound")])
    return figure


SYSTEMS = "published systems"


def offload_figure(study: StudyResult) -> Figure:
    """Lines over slots per layer: tokens per second with the bound, hit rate, bytes loaded per token.

    Colour is the policy, line style the prefetcher; one row of panels for each thing to do on a miss. Published systems
    have a row of their own, with a colour each.
    """
    keys = ["policy", "prefetch", "miss"]
    table = _systems_apart(study.table.astype(dict.fromkeys(keys, str)))
    misses = list(dict.fromkeys(table["miss"]))
    styles = [looks(table["policy"], PALETTE), looks(table["prefetch"], LINE_STYLES)]
    figure, axes = panels(3, 0.7 + 2.6 * len(misses), rows=len(misses), sharex=True, sharey="col")
    for row, miss in zip(axes.reshape(-1, 3), misses, strict=True):
        part = table[table["miss"] == miss].sort_values("slots_per_layer", kind="stable")
        _offload_bound(row[0], part)
        for axis, (key, heading, text) in zip(row, OFFLOAD_PANELS, strict=True):
            _offload_lines(axis, part, key, styles)
            on_miss = miss if miss == SYSTEMS else f"on a miss: {miss}"
            axis.set_title(f"{heading}, {on_miss}" if len(misses) > 1 else heading, fontsize=9.5)
            value_axis(axis.yaxis, text)
            axis.grid(alpha=0.25)
    for axis in axes:
        axis.set_ylim(bottom=0)
    _slot_axis(axes.ravel()[-3:], sorted(set(table["slots_per_layer"])))
    legend(figure, _offload_legend(*styles))
    return figure


def validation_figure(study: StudyResult) -> Figure:
    """Left: predicted and measured time per task kind, the spread as error bars. Right: the error.

    `spread` is a fraction of the measured time. The time axis is logarithmic where the kinds differ much.
    """
    table = study.table
    labels = _unique([str(kind) for kind in table["kind"]])
    figure, axes = panels(2, 1.0 + 0.5 * len(labels), sharey=True, widths=(1.5, 1))
    at = np.arange(len(labels))
    predicted, measured = column(table, "predicted_s"), column(table, "measured_s")
    spread, error = np.nan_to_num(column(table, "spread")), np.array(errors(table))
    known = np.concatenate([predicted, measured])
    known = known[known > 0]
    if len(known) and known.max() > 30 * known.min():
        axes[0].set_xscale("log")
    axes[0].barh(at - 0.19, predicted, 0.36, color=BLUE)
    drawn = axes[0].barh(at + 0.19, measured, 0.36, color=ORANGE, xerr=measured * spread)
    for artist in drawn.errorbar.lines[2]:
        artist.set_gid(INK_GID)
    axes[0].set_xlabel("time")
    value_axis(axes[0].xaxis, format_seconds)
    axes[1].barh(at, error, 0.5, color=GREY)
    axes[1].axvline(0, linewidth=0.8, color=INK[False], gid=INK_GID)
    for y, value in zip(at, error, strict=True):
        bar_text(axes[1], value, float(y), f"{100 * value:+.1f} %")
    axes[1].margins(x=0.25)
    axes[1].set_xlabel("error of the prediction (+: predicted too slow)")
    value_axis(axes[1].xaxis, tick_percent)
    axes[0].set_yticks(at, labels)
    axes[0].invert_yaxis()
    legend(figure, [(patch(BLUE), "predicted"), (patch(ORANGE), "measured, with its spread")])
    return figure


def time_figure(result: SimulationResult) -> Figure:
    """Left: what the critical path was spent on (sums to the makespan). Right: how busy each resource was."""
    slices = lane_slices(result)
    spent, busy = _critical_shares(result), _busy_shares(slices)
    figure, axes = panels(2, 1.0 + 0.27 * max(len(spent), len(busy), 3))
    headings = ("share of the critical path", "share of the makespan busy")
    for axis, rows, heading in zip(axes, (spent, busy), headings, strict=True):
        at = np.arange(len(rows))
        colors = [KIND_COLORS.get(kind, GREY) for _, kind, _ in rows]
        shares = np.array([share for *_, share in rows])
        bars(axis, at, shares, 0.7, colors, format_percent, ticks=tick_percent)
        axis.set_yticks(at, [label for label, *_ in rows])
        axis.invert_yaxis()
        axis.set_xlabel(heading)
    if not spent:
        axes[0].text(0.5, 0.5, "no critical path was recorded", ha="center", transform=axes[0].transAxes)
    kinds = _kinds(kind for _, kind, _ in spent + busy)
    legend(figure, [(patch(KIND_COLORS.get(kind, GREY)), kind) for kind in kinds])
    return figure


def gantt_figure(result: SimulationResult, *, num_steps: int = 1, max_slices: int = MAX_SLICES) -> Figure:
    """The first `num_steps` steps of a result as bars on lanes: 24 lanes and `max_slices` tasks at most.

    Raises:
        InputError: `num_steps` or `max_slices` below 1, or no task took time on a resource.
    """
    if num_steps < 1 or max_slices < 1:
        raise InputError("timeline: num_steps and max_slices must be at least 1, "
                         f"got {num_steps} and {max_slices}")
    shown, cut = _first_steps(lane_slices(result), num_steps, max_slices)
    lanes = _lanes(shown)
    figure, (axis,) = panels(1, 1.2 + 0.24 * max(4, len(lanes)))
    origin = int(shown["start_ns"].min())
    for (group, label, kind), tasks in shown.groupby(["group", "label", "kind"], sort=True):
        spans = [(s_from_ns(start - origin), s_from_ns(end - start)) for start, end
                 in zip(tasks["start_ns"].tolist(), tasks["end_ns"].tolist(), strict=True)]
        axis.broken_barh(spans, (lanes.index((group, label)) - 0.36, 0.72), color=KIND_COLORS.get(kind, GREY),
                         linewidth=0)
    axis.set_yticks(range(len(lanes)), [f"{group}  {label}" for group, label in lanes])
    axis.set_ylim(len(lanes) - 0.4, -0.6)
    steps = shown.loc[shown["step"] >= 0, "step"]
    since = f"time since the start of step {steps.min()}" if len(steps) else "time"
    axis.set_xlabel(since + (f" ({cut})" if cut else ""))
    value_axis(axis.xaxis, format_seconds)
    axis.margins(x=0.01)
    legend(figure, [(patch(KIND_COLORS.get(kind, GREY)), kind) for kind in _kinds(shown["kind"])])
    return figure


def _places(labels: list[str], names: list[str], hues: list[float], height: float) -> np.ndarray:
    """float64[row]: where each bar is, the bars of one label side by side around its place, by hue."""
    order = sorted(range(len(names)), key=lambda row: (labels.index(names[row]), hues[row]))
    at = np.zeros(len(names))
    for place, label in enumerate(labels):
        rows = [row for row in order if names[row] == label]
        at[rows] = place + height * (np.arange(len(rows)) - (len(rows) - 1) / 2)
    return at


def _systems_apart(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table with systems as policies of a way of their own to handle a miss."""
    if "system" not in table or table["system"].isna().all():
        return table
    named = table["system"].notna()
    table.loc[named, "policy"] = table.loc[named, "system"].astype(str)
    table.loc[named, "prefetch"], table.loc[named, "miss"] = "as published", SYSTEMS
    return table


def _offload_lines(axis: Axes, table: pd.DataFrame, key: str, styles: list[dict[str, str]]) -> None:
    """One line per policy and prefetcher."""
    policies, dashes = styles
    for (policy, prefetch), rows in table.groupby(["policy", "prefetch"], sort=False):
        axis.plot(rows["slots_per_layer"], column(rows, key), color=policies[policy],
                  linestyle=dashes[prefetch], marker="o", markersize=4, linewidth=1.5, clip_on=False)


def _offload_legend(policies: dict[str, str], dashes: dict[str, str]) -> list[tuple[Any, str]]:
    entries = [(line(color=color, linewidth=3), policy) for policy, color in policies.items()]
    if len(dashes) > 1:
        entries += [(line(color=GREY, linestyle=dash), f"prefetch {name}") for name, dash in dashes.items()]
    return [*entries, (line(color=INK[False], linewidth=1.0, gid=INK_GID), "bound")]


def _offload_bound(axis: Axes, table: pd.DataFrame) -> None:
    """The most tokens per second that any point's bound on the time per token allows."""
    lowest = pd.Series(column(table, "tpot_bound_s")).groupby(column(table, "slots_per_layer")).min()
    bound = lowest[lowest > 0]
    axis.plot(bound.index, 1.0 / bound, color=INK[False], linewidth=1.0, gid=INK_GID)


def _slot_axis(axes: Iterable[Axes], slots: list[int]) -> None:
    """Ticks at the numbers of slots that were simulated, where there are few."""
    for axis in axes:
        axis.set_xlabel("expert slots per layer")
        if len(slots) <= 8:
            axis.set_xticks(slots)


def _unique(labels: list[str]) -> list[str]:
    """Number the labels that repeat: ``end to end``, ``end to end 2``."""
    times = [labels[:place + 1].count(label) for place, label in enumerate(labels)]
    return [label if time == 1 else f"{label} {time}" for label, time in zip(labels, times, strict=True)]


def _kinds(kinds: Any) -> list[str]:
    """The kinds that occur, in the order of the task graph's list, unknown ones last."""
    order = {kind: place for place, kind in enumerate(TASK_KINDS)}
    return sorted(set(kinds), key=lambda kind: (order.get(kind, len(order)), kind))


def _critical_shares(result: SimulationResult) -> list[tuple[str, str, float]]:
    """(label, kind, share) of the critical path by kind of task, largest first; small ones as ``other``."""
    path = result.tables.get("critical_path")
    if path is None or path.empty:
        return []
    total = int(path["time_ns"].sum())
    rows = [(_kind_label(str(kind), sorted(set(part["resource"]) - {"", kind})), str(kind),
             int(part["time_ns"].sum()) / total) for kind, part in path.groupby("kind")]
    rows.sort(key=lambda row: (-row[2], row[1]))
    if len(rows) > MAX_BARS:
        rest = sum(share for *_, share in rows[MAX_BARS - 1:])
        rows = [*rows[:MAX_BARS - 1], ("other", "other", rest)]
    return rows


def _kind_label(kind: str, resources: list[str]) -> str:
    """``load (pcie0)``, ``experts (8 resources)``, ``wait``."""
    where = resources[0] if len(resources) == 1 else f"{len(resources)} resources"
    return f"{kind} ({where})" if resources else kind


def _busy_shares(slices: pd.DataFrame) -> list[tuple[str, str, float]]:
    """(resource, its main kind, share of the makespan with at least one task), the busiest first."""
    makespan = int(slices["end_ns"].max() - slices["start_ns"].min())
    rows = []
    for resource, tasks in slices.groupby("resource"):
        time_by_kind = (tasks["end_ns"] - tasks["start_ns"]).groupby(tasks["kind"]).sum()
        rows.append((str(resource), str(time_by_kind.idxmax()), _covered_ns(tasks) / makespan))
    return sorted(rows, key=lambda row: (-row[2], natural_key(row[0])))[:MAX_BARS]


def _covered_ns(tasks: pd.DataFrame) -> int:
    """Length of the union of the tasks' intervals (sorted by start)."""
    start, end = tasks["start_ns"].to_numpy(), tasks["end_ns"].to_numpy()
    reached = np.maximum.accumulate(np.concatenate([start[:1], end[:-1]]))
    return int(np.maximum(0, end - np.maximum(start, reached)).sum())


def _lanes(slices: pd.DataFrame) -> list[tuple[str, str]]:
    """(group, label) of every lane, in the order of a timeline."""
    lanes = set(zip(slices["group"], slices["label"], strict=True))
    return sorted(lanes, key=lambda lane: (natural_key(lane[0]), natural_key(lane[1])))


def _first_steps(slices: pd.DataFrame, num_steps: int, max_slices: int) -> tuple[pd.DataFrame, str]:
    """The slices that start while the first steps run, and what had to be left out, in words."""
    ids = sorted(set(slices.loc[slices["step"] >= 0, "step"].tolist()))[:num_steps]
    inside = slices[slices["step"].isin(ids)] if ids else slices
    begin, end = inside["start_ns"].min(), inside["end_ns"].max()
    window = slices[(slices["start_ns"] >= begin) & (slices["start_ns"] < end)]
    lanes = _lanes(window)
    kept = pd.MultiIndex.from_frame(window[["group", "label"]]).isin(lanes[:MAX_LANES])
    shown = window[kept].head(max_slices)
    cuts = [f"{MAX_LANES} of {len(lanes)} lanes"] if len(lanes) > MAX_LANES else []
    cuts += [f"first {max_slices} of {int(kept.sum())} tasks"] if kept.sum() > max_slices else []
    return shown, ", ".join(cuts)
