"""Studies and results as tables for people: units, percentages, the best value of a column marked."""

from __future__ import annotations

import dataclasses
import io
import math
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
_PARTS = ("policy", "prefetch", "miss", "allocation", "precision", "bound_by")  # of a published system
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
    study = study if all_columns else _by_system(study)
    known = COLUMNS[study.kind]
    names = {column.key for column in known}
    extra = [Column(key, key.replace("_", " "), quiet=True) for key in study.table.columns if key not in names]
    filled = [column for column in (*known, *extra) if column.key in study.table.columns
              and study.table[column.key].notna().any()
              and (all_columns or not (column.wide or _is_quiet(column, study)))]
    by_column = [_cells(column, study.table[column.key].tolist()) for column in filled]
    return filled, [list(row) for row in zip(*by_column, strict=True)]


def _by_system(study: StudyResult) -> StudyResult:
    """Return an offload study that names systems without the columns of their parts, which a text table has no room for."""
    table = study.table
    if study.kind != "offload" or "system" not in table.columns or table["system"].isna().all():
        return study
    parts = table[["policy", "prefetch", "miss"]].astype(str).apply(
        lambda row: ", ".join([row["policy"], *([row["prefetch"]] if row["prefetch"] != "none" else []), row["miss"]]), axis=1)
    named = table.assign(system=table["system"].fillna(parts))
    return dataclasses.replace(study, table=named.drop(columns=[key for key in _PARTS if key in named.columns]))


def _is_quiet(column: Column, study: StudyResult) -> bool:
    values = study.table[column.key]
    return column.quiet and len(values) > 1 and values.nunique(dropna=False) == 1


def _quiet_notes(study: StudyResult) -> list[str]:
    """``requests at once: 1`` for each column that is left out because it never changes."""
    every, _ = study_cells(study, all_columns=True)
    return [f"{column.key.replace('_', ' ')}: {format_value(column.key, study.table[column.key].iloc[0])}"
            for column in every if _is_quiet(column, study)]


def _cells(column: Column, values: list[object]) -> list[Cell]:
    ranks = [rank_of(column.better, value) for value in values]
    known = [rank for rank in ranks if rank is not None]
    best = min(known) if known and min(known) < max(known) else None
    return [Cell(format_value(column.key, value), best is not None and rank == best,
                 not isinstance(value, (str, bool))) for value, rank in zip(values, ranks, strict=True)]


def rank_of(better: str, value: object) -> float | None:
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
