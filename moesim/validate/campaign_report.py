"""What a campaign found: errors by family beside the machine's own repeatability, the order of the cases, worst first."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from moesim.errors import InputError
from moesim.units import format_percent, format_seconds

P95 = 95
FEW_REASONS = 2


@dataclass(frozen=True)
class Outcome:
    """One prediction and what it is held against.

    Attributes:
        kinds: kind of task -> predicted less measured seconds of it; where it is known, they sum to the difference of the two.

    Raises:
        InputError: times that are not positive and finite.
    """

    family: str
    case: str
    round: int
    predicted_s: float
    measured_s: float
    kinds: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not all(0 < value < math.inf for value in (self.predicted_s, self.measured_s)):
            raise InputError(f"{self.family}, {self.case}: times must be positive and finite, got {self.predicted_s} and "
                             f"{self.measured_s}")

    @property
    def error(self) -> float:
        """(predicted - measured) / measured."""
        return (self.predicted_s - self.measured_s) / self.measured_s


def to_rows(outcomes: Iterable[Outcome]) -> list[dict[str, Any]]:
    """Return plain dictionaries, with the error."""
    return [asdict(outcome) | {"error": outcome.error} for outcome in outcomes]


def from_rows(rows: Iterable[Mapping[str, Any]], where: str) -> list[Outcome]:
    """Return what `to_rows` wrote; raises InputError (with `where`) for anything else."""
    try:
        return [Outcome(str(row["family"]), str(row["case"]), int(row["round"]), float(row["predicted_s"]),
                        float(row["measured_s"]), {str(kind): float(value) for kind, value in row["kinds"].items()})
                for row in rows]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{where}: expected outcomes of a campaign: {type(error).__name__} {error}") from None


@dataclass(frozen=True)
class CaseSummary:
    """One case over its rounds: medians, the largest less the smallest time, and what the error comes from.

    `spread_s` is nan after one round; `kinds` are medians over the rounds.
    """

    family: str
    case: str
    rounds: int
    predicted_s: float
    measured_s: float
    spread_s: float
    kinds: Mapping[str, float]

    @property
    def error(self) -> float:
        """Of the medians."""
        return (self.predicted_s - self.measured_s) / self.measured_s

    @property
    def reasons(self) -> str:
        """The kinds with the largest differences, each as a share of the measured time."""
        largest = sorted(self.kinds.items(), key=lambda item: -abs(item[1]))[:FEW_REASONS]
        return ", ".join(f"{kind} {signed(seconds / self.measured_s)}" for kind, seconds in largest if seconds)


def signed(value: float) -> str:
    """Return a share with its sign, in percent."""
    return f"{100 * value:+.1f} %"


def case_summaries(outcomes: Iterable[Outcome]) -> list[CaseSummary]:
    """Return one row per case, the largest error first."""
    by_case: dict[tuple[str, str], list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        by_case[outcome.family, outcome.case].append(outcome)
    found = [_summary(runs) for runs in by_case.values()]
    return sorted(found, key=lambda one: (-abs(one.error), one.family, one.case))


def _summary(runs: Sequence[Outcome]) -> CaseSummary:
    measured = [run.measured_s for run in runs]
    names = sorted({name for run in runs for name in run.kinds})
    kinds = {name: float(np.median([run.kinds.get(name, 0.0) for run in runs])) for name in names}
    spread_s = max(measured) - min(measured) if len(runs) > 1 else math.nan
    return CaseSummary(runs[0].family, runs[0].case, len(runs), float(np.median([run.predicted_s for run in runs])),
                       float(np.median(measured)), spread_s, kinds)


@dataclass(frozen=True)
class FamilySummary:
    """One family: sizes of errors, and of the wander of the same cases.

    Attributes:
        cases, runs: how many. median, p95: of the absolute errors of single runs. of_medians: the median over cases of the
            absolute error of a case's median prediction against its median time. bias: the median error with its sign.
        wander_median, wander_p95: of the absolute errors that come out when a run of a case is predicted by another round's
            run of it, all pairs of rounds both ways; nan where nothing was run twice.
    """

    family: str
    cases: int
    runs: int
    median: float
    p95: float
    of_medians: float
    bias: float
    wander_median: float
    wander_p95: float


def wander(outcomes: Iterable[Outcome]) -> np.ndarray:
    """Return the absolute errors of predicting each run by each other run of its case."""
    by_case: dict[tuple[str, str], list[float]] = defaultdict(list)
    for outcome in outcomes:
        by_case[outcome.family, outcome.case].append(outcome.measured_s)
    return np.array([abs(one - other) / other for times in by_case.values() for one, other in itertools.permutations(times, 2)])


def family_summaries(outcomes: Sequence[Outcome]) -> list[FamilySummary]:
    """Return one row per family, the largest median error first."""
    by_family: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        by_family[outcome.family].append(outcome)
    return sorted((_family(name, runs) for name, runs in by_family.items()), key=lambda one: (-one.median, one.family))


def _family(name: str, runs: Sequence[Outcome]) -> FamilySummary:
    errors, cases, apart = np.array([run.error for run in runs]), case_summaries(runs), wander(runs)
    sizes = np.abs(errors)
    middle, high = (float(np.median(apart)), float(np.percentile(apart, P95))) if len(apart) else (math.nan, math.nan)
    return FamilySummary(name, len(cases), len(runs), float(np.median(sizes)), float(np.percentile(sizes, P95)),
                         float(np.median([abs(case.error) for case in cases])), float(np.median(errors)), middle, high)


# ---------------------------------------------------------------- the order of the cases


@dataclass(frozen=True)
class Order:
    """Whether cases are in the right order: predicted medians against measured ones, pair by pair.

    Attributes:
        pairs: of cases. within: pairs whose measured medians differ by no more than the larger of their two spreads, so that the
            measurement itself does not decide them. right, wrong: of the decided pairs; predicted alike is neither.
        tau_b: Kendall's tau-b over all pairs (Kendall, "The treatment of ties in ranking problems", Biometrika 33, 1945);
            nan where all are alike.
    """

    pairs: int
    within: int
    right: int
    wrong: int
    tau_b: float

    @property
    def tau_decided(self) -> float:
        """(right - wrong) over the decided pairs; nan if there are none."""
        decided = self.pairs - self.within
        return (self.right - self.wrong) / decided if decided else math.nan


def order_of(cases: Sequence[CaseSummary]) -> Order:
    """Compare the order of cases as predicted and as measured."""
    within = right = wrong = 0
    for one, other in itertools.combinations(cases, 2):
        apart = one.measured_s - other.measured_s
        spread_s = np.nanmax([one.spread_s, other.spread_s, 0.0])
        agree = np.sign(apart) * np.sign(one.predicted_s - other.predicted_s)
        if abs(apart) <= spread_s:
            within += 1
        else:
            right, wrong = right + int(agree > 0), wrong + int(agree < 0)
    pairs = len(cases) * (len(cases) - 1) // 2
    return Order(pairs, within, right, wrong, tau_b([case.predicted_s for case in cases], [case.measured_s for case in cases]))


def tau_b(predicted: Sequence[float], measured: Sequence[float]) -> float:
    """Return Kendall's tau-b of two lists; nan where either holds one value only."""
    score = guess_ties = real_ties = 0
    for (a, x), (b, y) in itertools.combinations(zip(predicted, measured, strict=True), 2):
        score += int(np.sign(a - b) * np.sign(x - y))
        guess_ties += a == b
        real_ties += x == y
    pairs = len(predicted) * (len(predicted) - 1) // 2
    under = math.sqrt((pairs - guess_ties) * (pairs - real_ties))
    return score / under if under else math.nan


# ---------------------------------------------------------------- targets


@dataclass(frozen=True)
class Target:
    """What a family is to reach: the median and the 95th percentile of its absolute errors (None: not asked)."""

    median: float
    p95: float | None = None


@dataclass(frozen=True)
class Line:
    """One target, and whether it was met; `note` where the machine's own wander decided."""

    what: str
    reached: str
    target: str
    met: bool
    note: str = ""


def target_lines(summary: FamilySummary, target: Target) -> list[Line]:
    """Return the lines of a family: an error must be within its target, or within the machine's wander where that is larger."""
    lines = [_line(f"{summary.family}: median error", summary.median, target.median, summary.wander_median)]
    if target.p95 is not None:
        lines.append(_line(f"{summary.family}: 95th percentile", summary.p95, target.p95, summary.wander_p95))
    return lines


def _line(what: str, reached: float, target: float, own: float) -> Line:
    wanders = own > target  # False for nan
    note = f"the machine's own wander is {format_percent(own)}" if wanders else ""
    return Line(what, format_percent(reached), f"<= {format_percent(target)}", reached <= max(target, own if wanders else 0.0), note)


def order_line(what: str, order: Order, least: float) -> Line:
    """Return the line of an order: over the pairs that the measurement decides."""
    tau, within = order.tau_decided, f"{order.within} of {order.pairs} pairs lie within the wander and are not counted; tau-b of all {order.tau_b:.3f}"
    reached = "no pair is decided" if math.isnan(tau) else f"{tau:.3f}"
    return Line(f"{what}: Kendall's tau of the order", reached, f">= {least:g}", math.isnan(tau) or tau >= least, within)


# ---------------------------------------------------------------- Markdown


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def families_markdown(summaries: Iterable[FamilySummary]) -> str:
    """Return the table of families."""
    header = ("family", "cases", "runs", "median error", "95th percentile", "of case medians", "with sign", "wander, median",
              "wander, 95th")
    return markdown_table(header, (
        (one.family, str(one.cases), f"{one.runs:,}", f"**{format_percent(one.median)}**", format_percent(one.p95),
         format_percent(one.of_medians), signed(one.bias), _percent(one.wander_median), _percent(one.wander_p95))
        for one in summaries))


def cases_markdown(cases: Iterable[CaseSummary]) -> str:
    """Return the table of cases."""
    return markdown_table(("case", "predicted", "measured", "error", "spread", "from"), (
        (one.case, format_seconds(one.predicted_s), format_seconds(one.measured_s), signed(one.error),
         _percent(one.spread_s / one.measured_s), one.reasons) for one in cases))


def lines_markdown(lines: Iterable[Line]) -> str:
    """Return the table of targets."""
    return markdown_table(("what", "reached", "target", "met", ""), (
        (line.what, line.reached, line.target, "yes" if line.met else "**no**", line.note) for line in lines))


def _percent(value: float) -> str:
    return "" if math.isnan(value) else format_percent(value)
