"""Which task of a prediction is which task of a real run, and where they differ."""

from __future__ import annotations

from typing import Any

import pandas as pd

from moesim.units import us_from_ns

KEY = ["kind", "step", "layer", "expert", "chunk"]


def task_pairs(predicted: pd.DataFrame, measured: pd.DataFrame) -> pd.DataFrame:
    """Return predicted_task, measured_task, predicted_ns, measured_ns: the tasks that both runs did and that took time.

    Tasks are the same if they agree in `KEY`; of several, the n-th to start is the n-th.
    """
    both = _numbered(predicted).merge(_numbered(measured), on=[*KEY, "nth"], suffixes=("_predicted", "_measured"))
    return pd.DataFrame({
        "kind": both["kind"], "predicted_task": both["task_predicted"], "measured_task": both["task_measured"],
        "predicted_ns": both["duration_ns_predicted"], "measured_ns": both["duration_ns_measured"]})


def _numbered(tasks: pd.DataFrame) -> pd.DataFrame:
    own = tasks.sort_values(["start_ns", "task"], ignore_index=True)[[*KEY, "task", "duration_ns"]]
    return own.assign(nth=own.groupby(KEY).cumcount())


def partner_arguments(pairs: pd.DataFrame) -> tuple[dict[int, dict[str, Any]], dict[int, dict[str, Any]]]:
    """Return task -> what its slice says of its partner, for both runs; ``error`` is (predicted - measured) / measured."""
    predicted, measured = {}, {}
    for row in pairs.to_dict(orient="records"):
        error = (row["predicted_ns"] - row["measured_ns"]) / row["measured_ns"]
        predicted[row["predicted_task"]] = {"measured_us": us_from_ns(row["measured_ns"]), "error": error}
        measured[row["measured_task"]] = {"predicted_us": us_from_ns(row["predicted_ns"]), "error": error}
    return predicted, measured


def pair_sums(pairs: pd.DataFrame, num_predicted: int, num_measured: int) -> dict[str, Any]:
    """Return how many slices have a partner, and the sums over those that do, by kind (ns)."""
    sums = pairs.groupby("kind")[["predicted_ns", "measured_ns"]].sum()
    return {"paired": len(pairs), "only_predicted": num_predicted - len(pairs), "only_measured": num_measured - len(pairs),
            "paired_ns_by_kind": {str(kind): [int(row["predicted_ns"]), int(row["measured_ns"])]
                                  for kind, row in sums.iterrows()}}
