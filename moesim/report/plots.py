"""The drawing that all figures share: panels, bars with their values, bounds, legends, light and dark pages.

Colours are those of Okabe and Ito (2008), which the colour-blind can tell apart.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

T = TypeVar("T")

BLUE, ORANGE, GREEN, RED, SKY, PINK, YELLOW = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#F0E442")
GREY, LIGHT_GREY = "#8A8F98", "#B9BFC7"
PALETTE = (BLUE, RED, GREEN, PINK, ORANGE, SKY, GREY)
# Related kinds share a colour: computation on the device, on the host, exchange, loading.
KIND_COLORS = {
    "attention": SKY, "router": GREY, "dense": SKY, "shared_expert": PINK, "head": YELLOW, "experts": BLUE,
    "expert": BLUE, "cpu_expert": GREEN, "dispatch": ORANGE, "combine": RED, "all_gather": PINK, "send": ORANGE, "receive": RED,
    "load": ORANGE, "prefetch": RED, "admit": PINK, "wait": LIGHT_GREY, "write_back": GREEN, "dequantize": GREY,
    "other": LIGHT_GREY}
WIDTH_IN, DPI = 10.0, 144
INK, PAPER = {False: "#1F2328", True: "#D7DCE2"}, {False: "#FFFFFF", True: "#16191D"}
INK_GID = "ink"
BOUND_MARK = {"color": INK[False], "marker": "|", "linestyle": "none", "markersize": 11,
              "markeredgewidth": 1.8, "gid": INK_GID}
LINE_STYLES = ("-", "--", ":", "-.")


def png_bytes(figure: Figure, *, dark: bool = False) -> bytes:
    """Render a figure for a light or a dark page; the same figure gives the same bytes.

    The layout is found once and kept: found again from where it was left, it would move by a pixel.
    """
    _recolour(figure, INK[dark], PAPER[dark])
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor=PAPER[dark], metadata={"Software": None})
    return buffer.getvalue()


def tick_percent(value: float) -> str:
    """Return e.g. ``20 %``."""
    return f"{100 * value:.4g} %"


def panels(num: int, height_in: float, *, rows: int = 1, sharex: bool = False,
           sharey: bool | Literal["col"] = False,
           widths: Sequence[float] | None = None) -> tuple[Figure, Any]:
    """Return a figure and its panels, Axes[row * num], without the frame's upper and right lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_IN, height_in), dpi=DPI, layout="constrained")
    grid = figure.subplots(rows, num, sharex=sharex, sharey=sharey, width_ratios=widths, squeeze=False)
    axes = grid.ravel()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8.5)
        axis.xaxis.label.set_fontsize(9.5)
        axis.title.set_fontsize(10)
    return figure, axes


def _recolour(figure: Figure, ink: str, paper: str) -> None:
    """Give every text, frame, tick and marked line the colour `ink`, every background `paper`."""
    from matplotlib.text import Text

    for axis in figure.axes:
        axis.set_facecolor(paper)
        axis.tick_params(color=ink, labelcolor=ink)
        for spine in axis.spines.values():
            spine.set_edgecolor(ink)
    for text in figure.findobj(Text):
        text.set_color(ink)
    marked: Any = figure.findobj(lambda one: one.get_gid() == INK_GID)
    for artist in marked:
        artist.set_color(ink)


def bars(axis: Axes, at: np.ndarray, values: np.ndarray, height: float, colors: list[str],
         text: Callable[[float], str] | None, *, base: float = 0.0, alpha: float = 1.0,
         ticks: Callable[[float], str] | None = None) -> None:
    """Draw horizontal bars from `base`, each with its value as text."""
    axis.barh(at, values - base, height * 0.88, left=base, color=colors, alpha=alpha)
    if text is None:
        return
    for y, value in zip(at, values, strict=True):
        bar_text(axis, value, y, text(value))
    axis.margins(x=0.28)
    axis.set_xlim(left=base)
    value_axis(axis.xaxis, ticks or text)


def bar_text(axis: Axes, value: float, y: float, text: str) -> None:
    """Write `text` beside the end of a bar."""
    if math.isfinite(value):
        axis.annotate(text, (value, y), xytext=(-4 if value < 0 else 4, 0), textcoords="offset points",
                      va="center", ha="right" if value < 0 else "left", fontsize=8)


def bound_marks(axis: Axes, at: np.ndarray, bounds: np.ndarray, height: float) -> None:
    """Draw a line across each bar at its lower bound."""
    known = np.isfinite(bounds)
    axis.vlines(bounds[known], at[known] - height / 2, at[known] + height / 2, color=INK[False],
                linewidth=1.8, gid=INK_GID)


def value_axis(axis: Any, text: Callable[[float], str]) -> None:
    """Set few ticks, each written with its unit."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    if axis.get_scale() == "linear":
        axis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: "0" if value == 0 else text(value)))
    axis.set_minor_formatter(NullFormatter())


def patch(color: str) -> Any:
    """Return a legend's coloured box."""
    from matplotlib.patches import Patch

    return Patch(color=color)


def line(**style: Any) -> Any:
    """Return a legend's line or marker."""
    from matplotlib.lines import Line2D

    return Line2D([], [], **style)


def legend(figure: Figure, entries: list[tuple[Any, str]]) -> None:
    """Draw one legend above the panels."""
    if not entries:
        return
    handles, labels = zip(*entries, strict=True)
    drawn: Any = figure.legend(handles, labels, loc="outside upper center", ncols=min(len(entries), 7),
                               frameon=False, fontsize=9)
    for copy, handle in zip(drawn.legend_handles, handles, strict=True):
        copy.set_gid(handle.get_gid())


def looks(names: Iterable[T], choices: Sequence[str]) -> dict[T, str]:
    """Return one look per name, in order of appearance; looks repeat after the last."""
    return dict(zip(dict.fromkeys(names), cycle(choices), strict=False))


def column(table: pd.DataFrame, name: str, default: float = math.nan) -> np.ndarray:
    """Return float64[row]; `default` where there is no number."""
    if name not in table.columns:
        return np.full(len(table), default)
    values = pd.to_numeric(table[name], errors="coerce").to_numpy(np.float64)
    return np.where(np.isfinite(values), values, default)
