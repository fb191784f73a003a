"""What `run_scenario` tells its caller while it works, and two listeners: one for people, one silent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from moesim.simulate.study import StudyResult

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

POINT_KEYS = (
    "placement", "redundant_experts", "policy", "tau", "factor", "prefetch", "prefetch_width", "miss",
    "slots_per_layer", "kind", "imbalance", "hit_rate", "step_time_s", "tpot_s", "tokens_per_s", "predicted_s", "measured_s",
    "error")
POINT_WORDS = {
    "redundant_experts": "+{} slots", "tau": "tau {}", "factor": "factor {}",
    "slots_per_layer": "{} slots/layer", "imbalance": "imbalance {}",
    "hit_rate": "hit rate {}", "step_time_s": "{} per step", "tpot_s": "{} per token",
    "tokens_per_s": "{} tokens/s", "predicted_s": "predicted {}", "measured_s": "measured {}",
    "error": "error {}", "prefetch": "prefetch {}", "prefetch_width": "width {}", "miss": "miss: {}"}


class Reporter(Protocol):
    """Hears what a run is doing. Methods return nothing and must not raise."""

    def study_started(self, name: str, title: str, num_points: int) -> None:
        """A study begins; `num_points` rows will follow."""

    def point_done(self, study_name: str, row: dict[str, Any]) -> None:
        """One row of a study's table is known."""

    def study_done(self, study: StudyResult) -> None:
        """A study is complete."""

    def message(self, text: str) -> None:
        """A sentence for the reader."""

    def progress(self, description: str, done: float, total: float) -> None:
        """`done` of `total` (any unit) of one long piece of work; at ``done >= total`` it has ended."""


class QuietReporter:
    """Says nothing."""

    def study_started(self, name: str, title: str, num_points: int) -> None:
        """Say nothing."""

    def point_done(self, study_name: str, row: dict[str, Any]) -> None:
        """Say nothing."""

    def study_done(self, study: StudyResult) -> None:
        """Say nothing."""

    def message(self, text: str) -> None:
        """Say nothing."""

    def progress(self, description: str, done: float, total: float) -> None:
        """Say nothing."""


class RichReporter:
    """Titles, rows as they come and progress bars on one console (stderr); finished tables on the other.

    Use it as a context manager: leaving it ends the progress bars.
    """

    def __init__(self, out: Console | None = None, log: Console | None = None) -> None:
        from rich.console import Console

        self.out = out or Console()
        self.log = log or Console(stderr=True)
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> RichReporter:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop()

    def study_started(self, name: str, title: str, num_points: int) -> None:
        """Print the title; show a bar over the points."""
        from rich.text import Text

        self._stop()
        self.log.print(Text(f"\n{title or name}", style="bold"))
        self._set(name, 0, num_points)

    def point_done(self, study_name: str, row: dict[str, Any]) -> None:
        """Print the row's answer and move the bar on."""
        from rich.text import Text

        self.log.print(Text(f"  {point_line(row)}"), soft_wrap=True)
        if self._bars is not None and study_name in self._tasks:
            self._bars.advance(self._tasks[study_name])

    def study_done(self, study: StudyResult) -> None:
        """Print the study's table; where the terminal is narrower than it, as lines that the terminal wraps."""
        from rich.text import Text

        from moesim.report.tables import WIDTH, study_table, study_text

        self._stop()
        self.out.print()
        if self.out.width < WIDTH:
            self.out.print(Text(study_text(study)), soft_wrap=True)
        else:
            self.out.print(study_table(study))

    def message(self, text: str) -> None:
        """Print a sentence."""
        from rich.text import Text

        self.log.print(Text(text), soft_wrap=True)

    def progress(self, description: str, done: float, total: float) -> None:
        """Show a bar; it goes when the work has ended."""
        self._set(description, done, total)
        if done >= total and self._bars is not None:
            self._bars.remove_task(self._tasks.pop(description))

    def _set(self, description: str, done: float, total: float) -> None:
        bars = self._started()
        if description not in self._tasks:
            self._tasks[description] = bars.add_task(description, total=total)
        bars.update(self._tasks[description], completed=done, total=total)

    def _started(self) -> Progress:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        if self._bars is None:
            columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=30),
                       MofNCompleteColumn(), TimeElapsedColumn())
            self._bars = Progress(*columns, console=self.log, transient=True)
            self._bars.start()
        return self._bars

    def _stop(self) -> None:
        if self._bars is not None:
            self._bars.stop()
        self._bars, self._tasks = None, {}


def point_line(row: dict[str, Any]) -> str:
    """Return one row of a study in words: what was tried, then what came out."""
    from moesim.report.tables import format_value

    parts = []
    for key in POINT_KEYS:
        value = row.get(key)
        says_nothing = value is None or value != value or value in ("", "none")
        if says_nothing or (key == "redundant_experts" and not value):
            continue
        parts.append(POINT_WORDS.get(key, "{}").format(format_value(key, value)))
    return ", ".join(parts)
