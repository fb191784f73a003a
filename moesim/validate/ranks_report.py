"""Expert-parallel plans predicted against run for real: a ValidationReport per plan, and whether their order was right."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from moesim.artifacts import write_json
from moesim.units import s_from_ns
from moesim.validate.report import END_TO_END, FEW_SAMPLES, ValidationReport

SCHEMA = "moesim.ranks_validation/1"
DECIDED = 0.05


@dataclass(frozen=True)
class RanksReport:
    """How far predictions of plans were from the same steps run over real ranks.

    Attributes:
        plans: name -> its report. `kinds` there is the time on the critical path by kind of task, so the rows sum to the end to
            end; `runs` has one row per repetition.
        ranking: frame of plan, predicted_s, measured_s (the sum over steps of the median over repetitions, so that a pause in
            one step of one repetition does not move a plan), predicted_relative, measured_relative (over the mean of all
            plans), error (of the relative time), disturbed (the share of its steps in which a rank was without its core).
        kendall_tau: of these times, in -1 ... 1 (Kendall, "A New Measure of Rank Correlation", Biometrika 30, 1938, in
            its form tau-b for ties); nan for one plan, or where all are predicted alike.
        decided, decided_right: pairs of plans predicted to differ by more than `DECIDED`, and those whose order was right.
        notes: what to know.
    """

    plans: dict[str, ValidationReport]
    ranking: pd.DataFrame
    kendall_tau: float
    decided: int
    decided_right: int
    notes: tuple[str, ...] = ()
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def errors(self) -> np.ndarray:
        """float64[plan * repetition], the end-to-end errors of all runs."""
        return np.concatenate([report.runs["error"].to_numpy() for report in self.plans.values()])

    @property
    def median_error(self) -> float:
        """The median over all runs of the absolute end-to-end error."""
        return float(np.median(np.abs(self.errors)))

    @property
    def max_error(self) -> float:
        """The largest absolute end-to-end error of a run."""
        return float(np.max(np.abs(self.errors)))

    @property
    def kinds(self) -> pd.DataFrame:
        """The plans' `kinds` under one another, with the column plan in front."""
        return pd.concat([report.kinds.assign(plan=name)[["plan", *report.kinds.columns]]
                          for name, report in self.plans.items()], ignore_index=True)

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write ``*.validation.json``."""
        body = {
            "median_error": self.median_error, "max_error": self.max_error,
            "kendall_tau": None if np.isnan(self.kendall_tau) else self.kendall_tau,
            "decided": self.decided, "decided_right": self.decided_right,
            "notes": list(self.notes), "provenance": self.provenance,
            "ranking": self.ranking.to_dict(orient="records"),
            "plans": {name: {"kinds": report.kinds.to_dict(orient="records"), "runs": report.runs.to_dict(orient="records")}
                      for name, report in self.plans.items()},
        }
        return write_json(path, SCHEMA, body)


def plan_report(predicted: Sequence[pd.DataFrame], measured: Sequence[pd.DataFrame]) -> ValidationReport:
    """Compare the critical paths (`simulate.critical_path`) of one plan's predictions and runs, repetition by repetition."""
    guess, real = (pd.DataFrame([_by_kind(path) for path in paths]).fillna(0.0) for paths in (predicted, measured))
    ends = np.stack([guess.sum(axis=1), real.sum(axis=1)])
    counts = measured[-1].groupby("kind")["num_tasks"].sum()
    rows = [_row(kind, int(counts.get(kind, 0)), guess.get(kind, pd.Series([0.0])).to_numpy(), real[kind].to_numpy())
            for kind in sorted(real.columns)]
    rows.append(_row(END_TO_END, int(counts.sum()), *ends))
    runs = pd.DataFrame({"repetition": np.arange(len(real)), "predicted_s": ends[0], "measured_s": ends[1],
                         "error": ends[0] / ends[1] - 1})
    columns = ["kind", "num_tasks", "predicted_s", "measured_s", "spread", "error"]
    few = (f"only {len(runs)} repetitions: too few for a spread to mean much",) if len(runs) < FEW_SAMPLES else ()
    return ValidationReport(pd.DataFrame(rows, columns=columns), runs, few)


def _by_kind(path: pd.DataFrame) -> pd.Series:
    return path.groupby("kind")["time_ns"].sum().map(s_from_ns)


def _row(kind: str, count: int, predicted: np.ndarray, measured: np.ndarray) -> tuple[Any, ...]:
    guess, middle = float(np.median(predicted)), float(np.median(measured))
    spread = float((measured.max() - measured.min()) / middle) if middle else 0.0
    return kind, count, guess, middle, spread, (guess - middle) / middle if middle else 0.0


def ranks_report(
    plans: dict[str, ValidationReport],
    step_seconds: Mapping[str, tuple[np.ndarray, np.ndarray]],
    disturbed: Mapping[str, float],
    notes: tuple[str, ...],
    provenance: dict[str, Any],
) -> RanksReport:
    """Put the plans' reports together and judge their order.

    Args:
        step_seconds: plan -> predicted and measured, float64[repetition, step].
        disturbed: plan -> the share of its steps in which a rank was without its core.
    """
    predicted, measured = (np.array([np.median(step_seconds[name][side], axis=0).sum() for name in plans]) for side in (0, 1))
    relative = [times / times.mean() for times in (predicted, measured)]
    ranking = pd.DataFrame({
        "plan": list(plans), "predicted_s": predicted, "measured_s": measured, "predicted_relative": relative[0],
        "measured_relative": relative[1], "error": relative[0] / relative[1] - 1,
        "disturbed": [disturbed[name] for name in plans]})
    decided, right = decided_pairs(predicted, measured)
    return RanksReport(plans, ranking, kendall_tau(predicted, measured), decided, right, notes, provenance)


def kendall_tau(predicted: np.ndarray, measured: np.ndarray) -> float:
    """Return tau-b of two lists of times."""
    from scipy.stats import kendalltau

    if len(predicted) < 2 or np.ptp(predicted) == 0 or np.ptp(measured) == 0:
        return float("nan")
    return float(kendalltau(predicted, measured).statistic)


def decided_pairs(predicted: np.ndarray, measured: np.ndarray, least: float = DECIDED) -> tuple[int, int]:
    """Return how many pairs are predicted to differ by more than `least` of the smaller, and how many of them do so rightly."""
    decided = right = 0
    for one, other in itertools.combinations(range(len(predicted)), 2):
        fast, slow = sorted((one, other), key=lambda place: predicted[place])
        if predicted[slow] > (1 + least) * predicted[fast]:
            decided += 1
            right += int(measured[slow] > measured[fast])
    return decided, right
