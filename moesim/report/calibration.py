"""The figure of two calibration profiles: b over a by size; one panel per kind of size, one colour per operation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moesim.calibrate.compare import ProfileComparison, TableComparison
from moesim.errors import InputError
from moesim.report.plots import GREY, PALETTE, panels, png_bytes, value_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_TABLES = 4
TICKS = (0.01, 0.1, 0.2, 0.5, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0, 5.0, 10.0, 100.0)


def comparison_figure(comparison: ProfileComparison, *, dark: bool = False) -> bytes:
    """Return a PNG: the ratio over each table's first axis, on logarithmic scales; large points were measured by both.

    Per panel (tokens, bytes) the tables with most sizes are drawn, four at most. Where a table has several axes its
    points are not joined: their order along the first one means nothing.

    Raises:
        InputError: no size that both profiles know.
    """
    drawn: dict[str, list[TableComparison]] = {}
    for table in sorted(comparison.tables, key=lambda one: -len(one.pairs)):
        if table.pairs:
            drawn.setdefault(table.axes[0], []).append(table)
    if not drawn:
        raise InputError(f"{comparison.name_a!r} and {comparison.name_b!r}: no size that both know, so nothing to draw")
    figure, axes = panels(len(drawn), 4.0, sharey=True)
    for axis, (unit, tables) in zip(axes, drawn.items(), strict=True):
        _panel(axis, unit, tables[:MAX_TABLES])
    axes[0].set_ylabel("b over a (above 1: b is slower)")
    figure.suptitle(f"a: {comparison.name_a}\nb: {comparison.name_b}", fontsize=10)
    return png_bytes(figure, dark=dark)


def _panel(axis: Axes, unit: str, tables: list[TableComparison]) -> None:
    for table, color in zip(tables, PALETTE, strict=False):
        points = [(max(pair.size[0], 1.0), pair.ratio, 4.0 if pair.measured else 2.0) for pair in table.pairs]
        x, y, size = zip(*points, strict=True)
        axis.scatter(x, y, s=[4 * one for one in size], color=color, label=f"{table.op} {table.shape} {table.dtype}"[:36])
        if len(table.axes) == 1:
            axis.plot(x, y, color=color, linewidth=1.0, alpha=0.7)
    axis.axhline(1.0, color=GREY, linewidth=0.8)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel(unit)
    axis.legend(frameon=False, fontsize=7.5)
    axis.yaxis.set_ticks([tick for tick in TICKS if axis.get_ylim()[0] <= tick <= axis.get_ylim()[1]])
    value_axis(axis.yaxis, lambda value: f"{value:g} x")
