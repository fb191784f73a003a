"""Studies and results as tables for people: units, percentages, the best value of a column marked."""

from __future__ import annotations

import io
import math
import statistics
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from moesim.errors import InputError, did_you_mean, unknown
from moesim.report.columns import COLUMNS, REQUIRED, Column
from moesim.simulate.result import SimulationResult
from moesim.simulate.study import KINDS, StudyResult
from moesim.units import format_bytes, format_percent, format_rate, format_seconds, s_from_ns

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

WIDTH = 110
MISSING = "-"
END_TO_END = "end to end"
NO_CORESET = "none"
BEST_MARK = "*"
BEST_NOTE = f"{BEST_MARK} best of its column"
_PLAIN = ("tau", "factor")
_FRACTIONS = ("fraction", "gap", "rate", "share", "error", "spread", "percent", "utilisation")


@dataclass(frozen=True)
class Cell:
    """One value as text; `best` if no other row of its column is better and some are worse."""

    text: str
    best: bool = False
    numeric: bool = True


def check_study(study: StudyResult) -> None:
    """Raise InputError unless the study's kind is known and it has rows and the columns that matter."""
    if study.kind not in KINDS:
        raise unknown(f"kind of study {study.name!r}:", study.kind, KINDS)
    if study.table.empty:
        raise InputError(f"study {study.name!r}: the table has no rows")
    for key in REQUIRED[study.kind]:
        if key not in study.table.columns:
            hint = did_you_mean(key, study.table.columns)
            raise InputError(f"study {study.name!r}: the table lacks the column {key!r}.{hint}")


def number(value: object) -> float | None:
    """Return a finite number as float; None for anything else (None, NaN, inf, text)."""
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        return None
    plain = float(value)
    return plain if math.isfinite(plain) else None


def format_value(key: str, value: object) -> str:
    """Return `value` as text, its unit taken from the last words of its name `key`."""
    plain = number(value)
    if plain is None:
        return MISSING if value is None or not isinstance(value, (str, bool)) else str(value)
    formatter = _formatter(key)
    if formatter is not None:
        return formatter(plain)
    if plain == int(plain) and not isinstance(value, float):
        return f"{int(plain):,}"
    return f"{plain:,.3f}" if abs(plain) < 1000 else f"{plain:,.0f}"


def _formatter(key: str) -> Callable[[float], str] | None:
    """The formatter of a field, or None for a bare number."""
    if key in _PLAIN:
        return "{:g}".format
    if key.endswith("bytes_per_s"):
        return format_rate
    if "bytes_per_" in key or key.endswith("_bytes") or key == "num_bytes":
        return format_bytes
    if "_per_s" in key:
        return format_count
    if key.endswith("_ns"):
        return lambda value: format_seconds(s_from_ns(value))  # type: ignore[arg-type]
    if key.endswith("_s"):
        return format_seconds
    if key == "error":
        return lambda value: f"{100 * value:+.1f} %"
    return format_percent if key.removesuffix("_shuffled").rsplit("_", 1)[-1] in _FRACTIONS else None


def format_count(value: float) -> str:
    """Return a rate such as tokens per second: ``12,345`` or ``3.14``."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def study_cells(study: StudyResult, *, all_columns: bool = False) -> tuple[list[Column], list[list[Cell]]]:
    """Return the columns that hold anything, and the rows of cells.

    With `all_columns` the wide ones too. Columns that moesim does not know come last, under their names.

    Raises:
        InputError: see `check_study`.
    """
    check_study(study)
    known = COLUMNS[study.kind]
    names = {column.key for column in known}
    extra = [Column(key, key.replace("_", " "), quiet=True) for key in study.table.columns if key not in names]
    filled = [column for column in (*known, *extra) if column.key in study.table.columns
              and study.table[column.key].notna().any()
              and (all_columns or not (column.wide or _is_quiet(column, study)))]
    by_column = [_cells(column, study.table[column.key].tolist()) for column in filled]
    return filled, [list(row) for row in zip(*by_column, strict=True)]


def _is_quiet(column: Column, study: StudyResult) -> bool:
    values = study.table[column.key]
    return column.quiet and len(values) > 1 and values.nunique(dropna=False) == 1


def _quiet_notes(study: StudyResult) -> list[str]:
    """``requests at once: 1`` for each column that is left out because it never changes."""
    every, _ = study_cells(study, all_columns=True)
    return [f"{column.key.replace('_', ' ')}: {format_value(column.key, study.table[column.key].iloc[0])}"
            for column in every if _is_quiet(column, study)]


def _cells(column: Column, values: list[object]) -> list[Cell]:
    ranks = [_rank(column.better, value) for value in values]
    known = [rank for rank in ranks if rank is not None]
    best = min(known) if known and min(known) < max(known) else None
    return [Cell(format_value(column.key, value), best is not None and rank == best,
                 not isinstance(value, (str, bool))) for value, rank in zip(values, ranks, strict=True)]


def _rank(better: str, value: object) -> float | None:
    """A number that is lower for a better value; None where nothing is better."""
    plain = number(value)
    if plain is None or not better:
        return None
    return {"low": plain, "high": -plain, "zero": abs(plain)}[better]


def study_table(study: StudyResult) -> Table:
    """Return a study as a rich table of at most 110 columns, its notes below.

    Raises:
        InputError: see `check_study`.
    """
    from rich.text import Text

    columns, rows = study_cells(study)
    table = _plain_table(study.title or study.name)
    for index, column in enumerate(columns):
        numeric = all(row[index].numeric for row in rows)
        table.add_column(Text(column.heading), justify="right" if numeric else "left", overflow="fold",
                         no_wrap=numeric)
    for row in rows:
        table.add_row(*(_styled(cell) for cell in row))
    marked = any(cell.best for row in rows for cell in row)
    notes = [*([BEST_NOTE] if marked else []), *_quiet_notes(study), *study.notes]
    table.caption = Text("\n".join(notes))
    return table


def _styled(cell: Cell) -> Text:
    """The cell's text, a mark in front of the best (behind it, digits would no longer stand in line)."""
    from rich.text import Text

    return Text(BEST_MARK + cell.text, style="bold") if cell.best else Text(cell.text)


def _plain_table(title: str) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    return Table(title=Text(title), title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD,
                 padding=(0, 0, 0, 0), pad_edge=False, show_edge=False)


def study_text(study: StudyResult) -> str:
    """Return `study_table` as plain text, no line over 110 columns; the notes use that width too.

    Raises:
        InputError: see `check_study`.
    """
    table = study_table(study)
    title, notes = str(table.title), str(table.caption)
    table.title = table.caption = None
    lines = [line for note in notes.splitlines() for line in textwrap.wrap(note, WIDTH)]
    return "\n".join([*textwrap.wrap(title, WIDTH), render(table).rstrip("\n"), *lines]) + "\n"


def render(table: Table) -> str:
    """Return a rich table as plain text of at most 110 columns."""
    from rich.console import Console

    buffer = io.StringIO()
    Console(file=buffer, width=WIDTH, color_system=None, legacy_windows=False).print(table)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


def summary_table(result: SimulationResult) -> Table:
    """Return a result's summary as a rich table of two columns; nested values have dotted names."""
    from rich.text import Text

    table = _plain_table(result.name)
    table.add_column("quantity")
    table.add_column("value", overflow="fold")
    for key, value in summary_rows(result.summary):
        table.add_row(Text(key), Text(value))
    return table


def summary_rows(summary: dict[str, Any], *, plain: bool = False) -> list[tuple[str, str]]:
    """Return (dotted name, text) of every value of a nested dict; the values as they are if `plain`."""
    return [(name, str(value) if plain else format_value(name.rsplit(".", 1)[-1], value))
            for name, value in _flat(summary, "")]


def _flat(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, object]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, (list, tuple)):
            yield f"{prefix}{key}", ", ".join(str(item) for item in value)
        else:
            yield f"{prefix}{key}", value


def best_row(study: StudyResult) -> pd.Series:
    """Return the row that answers the study's question: the shortest step, or the most tokens per second.

    An offload row that `sees_future` (its policy or prefetcher is built from it) answers only if there is no other; a
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
    chosen = deployable(study.table) if study.kind == "diffusion" else study.table[~_knows_future(study.table)]
    return _extreme(study, chosen if len(chosen) else study.table, "tokens_per_s", "high")


def _extreme(study: StudyResult, table: pd.DataFrame, key: str, better: str,
             measure: Callable[[float], float] = float) -> pd.Series:
    """The first row with the best value of a column."""
    values = [number(value) for value in table[key]]
    ranks = [_rank(better, measure(value)) for value in values if value is not None]
    if not ranks:
        raise InputError(f"study {study.name!r}: no row has a number in the column {key!r}")
    places = [place for place, value in enumerate(values) if value is not None]
    return table.iloc[min(zip(ranks, places, strict=True))[1]]


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
