"""Placement as tables and as the picture of quality against time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moesim.report.plots import INK, INK_GID, PALETTE, panels
from moesim.report.tables import format_value

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKERS = ("o", "s", "^", "D")
PLAN_COLUMNS = ("plan", "step time>", "imbalance>", "kept on rank>", "cross-rank/step>", "cross-node/step>",
                "migration>", "gain train>", "held out>")
_PLAN_KEYS = ("step_time_s", "imbalance", "kept_on_rank_fraction", "cross_rank_bytes_per_step",
              "cross_node_bytes_per_step", "migration_bytes", "gain_train_fraction", "gain_held_out_fraction")
COMPARE_COLUMNS = ("solver", "objective>", "gap>", "solver time>", "held out>", "step time>", "imbalance>",
                   "cross-node/step>")
ROLLING_COLUMNS = ("from step>", "steps>", "static step>", "rolling step>", "moves>", "moved>")
_ROLLING_KEYS = ("first_step", "num_steps", "static_step_time_s", "rolling_step_time_s", "migration_time_s",
                 "migration_bytes")


def _cell(key: str, row: dict[str, Any]) -> str | None:
    return None if row.get(key) is None else format_value(key, row[key])


def plan_row(row: dict[str, Any]) -> list[str | None]:
    """Return the cells of a judged plan under `PLAN_COLUMNS`."""
    return [row["plan"], *(_cell(key, row) for key in _PLAN_KEYS)]


def _objective(value: float | None, facts: dict[str, Any]) -> str | None:
    if value is None:
        return None
    return format_value("step_ns", value) if facts["objective"] == "step_time" else f"{value:.5g}"


def compare_row(row: dict[str, Any], facts: dict[str, Any]) -> list[str | None]:
    """Return the cells of a solver under `COMPARE_COLUMNS`."""
    return [row["solver"], _objective(row["objective"], facts), _cell("gap", row), _cell("time_s", row),
            _objective(row.get("objective_held_out"), facts),
            *(_cell(key, row) for key in ("step_time_s", "imbalance", "cross_node_bytes_per_step"))]


def rolling_row(row: dict[str, Any]) -> list[str | None]:
    """Return the cells of a block of steps under `ROLLING_COLUMNS`."""
    return [_cell(key, row) for key in _ROLLING_KEYS]


def compare_figure(rows: list[dict[str, Any]], facts: dict[str, Any]) -> Figure:
    """Return the picture: each solver's best objective over its time, the bound as a line.

    A solver that reports its search is a falling (rising) staircase, another one a point at its end.
    """
    figure, axes = panels(1, 4.6)
    axis = axes[0]
    for place, row in enumerate(rows):
        colour, marker = PALETTE[place % len(PALETTE)], MARKERS[place // len(PALETTE) % len(MARKERS)]
        times, values = zip(*_rising(row["curve"]), strict=True)
        axis.step(times, values, where="post", color=colour, linewidth=1.4, alpha=0.9)
        axis.plot(times[-1], values[-1], marker, color=colour, markersize=6, label=row["solver"])
    if facts.get("bound") is not None:
        axis.axhline(facts["bound"], color=INK[False], linewidth=1.4, linestyle="--", gid=INK_GID,
                     label=f"bound: no plan is {'lower' if facts['sense'] == 'min' else 'higher'}")
    axis.set_xscale("log")
    axis.set_xlabel("seconds of search")
    axis.set_ylabel(facts["unit"])
    axis.set_title(f"Plans for '{facts['objective']}' by solver", loc="left")
    axis.legend(fontsize=8.5, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _rising(curve: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the curve with times above 0 and rising (a log axis has no 0)."""
    points, last = [], 1.0 / 1024
    for seconds, value in curve:
        last = max(last, seconds)
        points.append((last, value))
    return points


