"""The row that answers a study's question, and the answer in a sentence."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

import pandas as pd

from moesim.errors import InputError
from moesim.report.tables import END_TO_END, NO_CORESET, check_study, format_count, format_value, number, rank_of
from moesim.simulate.study import StudyResult
from moesim.units import format_percent


def best_row(study: StudyResult) -> pd.Series:
    """Return the row that answers the study's question: the shortest step, or the most tokens per second.

    An offload row that `sees_future` (its policy or prefetcher is built from it) or has a precision answers only if there is no other; a
    diffusion row only if its policy does not know the run, and one that changes the model's results only if there is no
    other. For a validation: the ``end to end`` row of the largest error; else such a task kind.

    Raises:
        InputError: see `check_study`, or no row has a number there.
    """
    check_study(study)
    if study.kind == "validation":
        table = study.table.assign(error=errors(study.table))
        ends = table["kind"].astype(str).str.startswith(END_TO_END)
        return _extreme(study, table[ends] if ends.any() else table, "error", "high", abs)
    if study.kind == "expert_parallel":
        return _extreme(study, study.table, "step_time_s", "low")
    chosen = deployable(study.table) if study.kind == "diffusion" else _exact_offload(study.table)
    return _extreme(study, chosen if len(chosen) else study.table, "tokens_per_s", "high")


def _extreme(study: StudyResult, table: pd.DataFrame, key: str, better: str,
             measure: Callable[[float], float] = float) -> pd.Series:
    """The first row with the best value of a column."""
    values = [number(value) for value in table[key]]
    ranks = [rank_of(better, measure(value)) for value in values if value is not None]
    if not ranks:
        raise InputError(f"study {study.name!r}: no row has a number in the column {key!r}")
    places = [place for place, value in enumerate(values) if value is not None]
    return table.iloc[min(zip(ranks, places, strict=True))[1]]


def _exact_offload(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of an offload study that can be deployed and leave the model's results as they are."""
    past = table[~_knows_future(table)]
    same = past[past["precision"].isna()] if "precision" in past.columns else past
    return same if len(same) else past


def _knows_future(table: pd.DataFrame) -> pd.Series:
    """bool[row]: whether an offload row's policy or prefetcher saw the future."""
    if "sees_future" not in table.columns:
        return pd.Series(False, index=table.index)
    return table["sees_future"].astype(bool)


def deployable(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of a diffusion study whose policy does not know the run and leaves the model's results as they are.

    Those with all experts on the GPU only where there are no others.
    """
    knows, coreset = (table.get(key, pd.Series(None, index=table.index, dtype=object)) for key in ("knows", "coreset"))
    real = table[(knows != "offline") & (coreset.isna() | (coreset == NO_CORESET))]
    refreshed = real[coreset[real.index].isna()]
    return refreshed if len(refreshed) else real


def resident_rows(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of a diffusion study that name a coreset (or ``none``): those with all experts on the GPU."""
    return table[table["coreset"].notna()] if "coreset" in table.columns else table.iloc[:0]


def errors(table: pd.DataFrame) -> list[float]:
    """float[row]: a validation's ``error``, or else ``(predicted - measured) / measured``; NaN if unknown."""
    if "error" in table.columns:
        return [math.nan if (value := number(error)) is None else value for error in table["error"]]
    pairs = [(number(p), number(m)) for p, m in zip(table["predicted_s"], table["measured_s"], strict=True)]
    return [(p - m) / m if p is not None and m else math.nan for p, m in pairs]


def study_headline(study: StudyResult) -> str:
    """Return the study's answer in one or two sentences: the best row, its gap to the bound, what it beats.

    Raises:
        InputError: see `best_row`.
    """
    row = best_row(study)
    write = {"expert_parallel": _headline_parallel, "offload": _headline_offload, "diffusion": _headline_diffusion,
             "validation": _headline_validation}[study.kind]
    return write(study, row)


def _headline_parallel(study: StudyResult, row: pd.Series) -> str:
    text = f"Shortest step: {_point(row)}, {format_value('step_time_s', row['step_time_s'])}"
    text += _gap(row, "step_time_s", "step_time_bound_s", "step_time_gap") + "."
    worst = _extreme(study, study.table, "step_time_s", "high")
    saved = 1 - float(row["step_time_s"]) / float(worst["step_time_s"])
    return text + (f" {format_percent(saved)} less than {_point(worst)}, the longest." if saved else "")


def _point(row: pd.Series) -> str:
    """``eplb with 32 redundant experts``."""
    extra = number(row.get("redundant_experts"))
    return f"{row['placement']}{f' with {int(extra)} redundant experts' if extra else ''}"


def _headline_offload(study: StudyResult, row: pd.Series) -> str:
    slots = format_value("slots_per_layer", row["slots_per_layer"])
    text = (f"Most tokens per second: {format_count(float(row['tokens_per_s']))} with {row['policy']}, "
            f"prefetch {row['prefetch']}, on a miss {row['miss']}, {slots} slots per layer")
    text += _gap(row, "tpot_s", "tpot_bound_s", "tpot_gap") + "."
    if (hit_rate := number(row.get("hit_rate"))) is not None:
        text += f" Its hit rate is {format_percent(hit_rate)}."
    oracles = study.table[_knows_future(study.table)]
    most = pd.to_numeric(oracles["tokens_per_s"], errors="coerce").max()
    if most > float(row["tokens_per_s"]):
        text += f" With knowledge of the future it would be {format_count(most)}."
    return text


def _headline_diffusion(study: StudyResult, row: pd.Series) -> str:
    tau, speed = number(row.get("tau")), format_count(float(row["tokens_per_s"]))
    slots, chosen = format_value("slots_per_layer", row["slots_per_layer"]), f"{row['policy']}{f' (tau {tau:g})' if tau else ''}"
    resident = resident_rows(study.table)
    text = f"{speed} tokens per second with all experts on the GPU." if row.name in resident.index else (
        f"Most tokens per second without knowing the run: {speed} with {chosen}, {slots} experts per layer on the GPU.")
    if (over := number(row.get("over_optimal_fraction"))) is not None:
        text += f" Its experts and moves take {format_percent(over)} longer than under the best schedule of each layer."
    changed = resident[resident["coreset"] != NO_CORESET] if len(resident) else resident
    return text + (_coreset_words(resident, _extreme(study, changed, "step_time_s", "low")) if len(changed) else "")


def _coreset_words(resident: pd.DataFrame, row: pd.Series) -> str:
    """Return a sentence on the fastest coreset, which always says what it costs in accuracy."""
    unchanged = resident[resident["coreset"] == NO_CORESET]
    text = f" Fastest coreset: {row['coreset']}, {format_value('step_time_s', row['step_time_s'])} per pass"
    if len(unchanged):
        text += f" instead of {format_value('step_time_s', unchanged['step_time_s'].iloc[0])}"
    published, lost = (number(row.get(key)) for key in ("published_accuracy_fraction", "lost_weight_share"))
    if published is not None:
        return f"{text}; published relative accuracy {format_percent(published)}."
    return f"{text}; " + ("what it costs in accuracy is unknown." if lost is None else
                          f"{format_percent(lost)} of the gate weight is lost, the accuracy is not published.")


def _headline_validation(study: StudyResult, row: pd.Series) -> str:
    text = (f"{str(row['kind']).capitalize()}: predicted {format_value('predicted_s', row['predicted_s'])}, "
            f"measured {format_value('measured_s', row['measured_s'])}, "
            f"error {format_value('error', row['error'])}.")
    kinds = study.table[~study.table["kind"].astype(str).str.startswith(END_TO_END)]
    values = sorted(abs(error) for error in errors(kinds) if not math.isnan(error))
    if not values:
        return text
    median = format_percent(statistics.median(values))
    return text + f" Task kinds: median error {median}, largest {format_percent(values[-1])}."


def _gap(row: pd.Series, value_key: str, bound_key: str, gap_key: str) -> str:
    """``, gap 4.1 % to the bound of 4.22 ms``; says so where there is no bound."""
    value, bound, gap = (number(row.get(key)) for key in (value_key, bound_key, gap_key))
    if bound is None or not value:
        return " (no proven bound)"
    gap = (value - bound) / value if gap is None else gap
    return f", gap {format_percent(gap)} to the bound of {format_value(bound_key, bound)}"
