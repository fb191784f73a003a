"""ValidationReport: predicted against measured, per kind of task and end to end."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from moesim.artifacts import write_json
from moesim.simulate.result import DONE
from moesim.units import s_from_ns

SCHEMA = "moesim.validation/1"
END_TO_END = "end to end"
EXECUTOR = "executor"
FEW_SAMPLES = 3
LEAST_S = s_from_ns(1)


@dataclass(frozen=True)
class ValidationReport:
    """How far a prediction was from the same work run for real.

    Attributes:
        kinds: frame of kind, num_tasks, predicted_s, measured_s, spread, error, error_share: busy seconds per run, the
            median over the repetitions in which it ran (num_tasks: in the last one); `spread` is
            (max - min) / median over these; `error` is (predicted - measured) / measured; `error_share` is the kind's
            |predicted - measured| over the sum of all kinds' (0 if there is none). The last row is the end-to-end
            time (share 1), the one before it may be ``executor``: time between tasks that was no kernel's.
        runs: frame of repetition, predicted_s, measured_s, error (end to end).
        notes: what to know, for instance too few repetitions.
    """

    kinds: pd.DataFrame
    runs: pd.DataFrame
    notes: tuple[str, ...] = ()
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def median_error(self) -> float:
        """The median over repetitions of the absolute end-to-end error."""
        return float(np.median(np.abs(self.runs["error"])))

    @property
    def max_error(self) -> float:
        """The largest absolute end-to-end error of a repetition."""
        return float(np.max(np.abs(self.runs["error"])))

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write ``*.validation.json``."""
        body = {
            "median_error": self.median_error,
            "max_error": self.max_error,
            "notes": list(self.notes),
            "provenance": self.provenance,
            "kinds": self.kinds.to_dict(orient="records"),
            "runs": self.runs.to_dict(orient="records"),
        }
        return write_json(path, SCHEMA, body)


def busy_seconds(tasks: pd.DataFrame, overhead_ns: Mapping[str, int] | None = None) -> pd.Series:
    """Return the summed kernel time of done tasks by kind.

    A predicted duration holds the executor's own time too: `overhead_ns` (per task, by kind) is taken out of
    it and summed under `EXECUTOR`.
    """
    done = tasks[(tasks["state"] == DONE) & (tasks["resource"] != "")]
    if overhead_ns is None:
        return done.groupby("kind")["duration_ns"].sum().map(s_from_ns)
    own = done["kind"].map(lambda kind: overhead_ns.get(kind, 0)).astype(np.int64)
    kernels = (done["duration_ns"] - own).groupby(done["kind"]).sum()
    kernels[EXECUTOR] = own.sum()
    return kernels.map(s_from_ns)


def compare(
    predicted: list[pd.DataFrame],
    measured: list[pd.DataFrame],
    notes: tuple[str, ...] = (),
    provenance: dict[str, Any] | None = None,
    *,
    overheads_ns: Sequence[Mapping[str, int]] | None = None,
    executor_s: Sequence[float] | None = None,
) -> ValidationReport:
    """Compare task tables of predictions and real runs, repetition by repetition.

    Args:
        overheads_ns: the executor's time per task, by kind, that is part of each prediction's durations.
        executor_s: the executor's own time in each real run.
    """
    pairs = [(_makespan(p), _makespan(m)) for p, m in zip(predicted, measured, strict=True)]
    runs = pd.DataFrame(
        [(place, p, m, (p - m) / m) for place, (p, m) in enumerate(pairs)],
        columns=["repetition", "predicted_s", "measured_s", "error"],
    )
    own: Sequence[Mapping[str, int] | None] = overheads_ns or [None] * len(predicted)
    guess = pd.DataFrame([busy_seconds(*pair) for pair in zip(predicted, own, strict=True)]).median()
    real = pd.DataFrame([busy_seconds(table) for table in measured])
    if executor_s is not None:
        real[EXECUTOR] = list(executor_s)
    counts = measured[-1].loc[measured[-1]["state"] == DONE, "kind"].value_counts()
    rows = [
        _row(kind, int(counts.get(kind, 0)), float(guess.get(kind, 0.0)), real[kind].dropna().to_numpy())
        for kind in sorted(real.columns)
    ]
    total = [_row(END_TO_END, len(measured[-1]), float(runs["predicted_s"].median()), runs["measured_s"].to_numpy())]
    if len(measured) < FEW_SAMPLES:
        notes = (*notes, f"only {len(measured)} repetitions: too few for a spread to mean much")
    columns = ["kind", "num_tasks", "predicted_s", "measured_s", "spread", "error"]
    kinds = pd.DataFrame(rows + total, columns=columns).assign(error_share=[*_error_shares(rows), 1.0])
    return ValidationReport(kinds, runs, notes, provenance or {})


def _error_shares(rows: list[tuple[Any, ...]]) -> list[float]:
    """Return each kind's part of the summed differences between predicted and measured busy time."""
    differences = np.array([abs(predicted - measured) for _, _, predicted, measured, *_ in rows])
    return (differences / max(float(differences.sum()), LEAST_S)).tolist()


def _makespan(tasks: pd.DataFrame) -> float:
    done = tasks[tasks["state"] == DONE]
    return s_from_ns(int(done["end_ns"].max() - done["start_ns"].min()))


def _row(kind: str, count: int, predicted: float, measured: np.ndarray) -> tuple[Any, ...]:
    middle = float(np.median(measured))
    spread = float((measured.max() - measured.min()) / middle)
    return kind, count, predicted, middle, spread, (predicted - middle) / middle
