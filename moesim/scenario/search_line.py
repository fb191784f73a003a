"""A line on stderr that shows a long search: best objective, bound, gap, falling while it runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from moesim.placement.progress import Report
from moesim.placement.result import relative_gap

if TYPE_CHECKING:
    from rich.console import Console

QUIET_S = 2.0  # nothing is shown before
_LINE_EVERY_S = 5.0  # where the output is no terminal


def report_text(report: Report) -> str:
    """Return e.g. ``12.3 s  affinity  .0771  bound .0808  gap 4.6 %``."""
    parts = [f"{report.seconds:6.1f} s", report.stage]
    if report.objective is not None:
        parts.append(f"best {report.objective:.6g}")
    if report.bound is not None:
        parts.append(f"bound {report.bound:.6g}")
        if report.objective is not None:
            parts.append(f"gap {100 * relative_gap(report.objective, report.bound, report.sense):.2f} %")
    return "  ".join(part for part in parts if part)


@contextlib.contextmanager
def search_line(console: Console, *, quiet: bool = False) -> Iterator[Callable[[Report], None]]:
    """Yield the listener of a search: a live line on a terminal, a line every few seconds elsewhere."""
    if quiet:
        yield lambda report: None
        return
    if not console.is_terminal:
        last = [QUIET_S - _LINE_EVERY_S]

        def tell(report: Report) -> None:
            if report.seconds >= last[0] + _LINE_EVERY_S:
                last[0] = report.seconds
                console.print(report_text(report), markup=False)

        yield tell
        return
    with console.status("searching (Ctrl-C keeps the best plan so far)") as status:
        yield lambda report: status.update(report_text(report)) if report.seconds >= QUIET_S else None
