"""What every verb of the command line shares: one-line errors, JSON for programs, tables for people."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from moesim.errors import InputError, MoesimError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

EXIT_BUG, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 130

# typer carries its own copy of click from 0.20 on; this finds UsageError in either
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]

JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON to stdout, and nothing else.")]
SeedOption = Annotated[int, typer.Option(min=0, help="Seed of everything random.")]
OptionList = Annotated[list[str], typer.Option(metavar="KEY=VALUE", help="May be repeated.")]
NumNodes = Annotated[int, typer.Option(min=1, help="Equal nodes of the hardware.")]
ExecutorOption = Annotated[str, typer.Option(
    metavar="auto|compiled|simpy", help="All give the same tables. auto: compiled, and SimPy until that has been compiled once.")]
PluginOption = Annotated[list[Path], typer.Option(
    "--plugin", metavar="FILE.py", help="A Python file of your own with policies, prefetchers, miss rules or solvers; it is run. "
    "May be repeated.")]
GpusPerNode = Annotated[int | None, typer.Option(min=1, help="GPUs to use per node (default: all).")]


class OneLineErrors(TyperGroup):
    """The top of the command line: every error a user can cause is one line on stderr and exit status 2."""

    def make_context(self, *args: Any, **extra: Any) -> Any:
        """Parse the options before the verb."""
        with one_line_errors(debug=False):
            return super().make_context(*args, **extra)

    def invoke(self, ctx: Any) -> Any:
        """Parse the rest and run the verb."""
        with one_line_errors(debug=bool(ctx.params.get("debug"))):
            return super().invoke(ctx)


@contextlib.contextmanager
def one_line_errors(*, debug: bool) -> Iterator[None]:
    """Turn errors into a line on stderr and an exit status; with `debug` leave them as they are."""
    try:
        yield
    except (typer.Exit, typer.Abort, BrokenPipeError):
        raise
    except KeyboardInterrupt:
        _fail("interrupted", EXIT_INTERRUPTED)
    except Exception as error:
        if debug or type(error).__name__ == "NoArgsIsHelpError":
            raise
        _fail(*_words(error))


def _words(error: Exception) -> tuple[str, int]:
    """Return what to print about an error, and the exit status."""
    if isinstance(error, MoesimError):
        return str(error), EXIT_BAD_INPUT
    if isinstance(error, _UsageError):
        context = getattr(error, "ctx", None)
        hint = f" Try '{context.command_path} --help'." if context is not None else ""
        text = " ".join(str(error.format_message()).split())  # type: ignore[attr-defined]
        return text + ("" if text.endswith((".", "?")) else ".") + hint, EXIT_BAD_INPUT
    if isinstance(error, OSError) and error.strerror:
        name = f"{error.filename}: " if error.filename else ""
        return f"{name}{error.strerror}", EXIT_BAD_INPUT
    text = " ".join(str(error).split())
    return f"a bug in moesim: {type(error).__name__}: {text} (--debug before the verb shows where)", EXIT_BUG


def _fail(text: str, status: int) -> None:
    for line in text.splitlines() or [text]:
        typer.echo(f"error: {line}", err=True)
    raise typer.Exit(status)


def load_plugins(files: Sequence[Path]) -> None:
    """Run the user's plug-in files, if there are any."""
    if files:
        from moesim.scenario import plugins

        plugins.load_plugins(files)


def output_folder(chosen: Path | None, default: Path) -> Path:
    """Return the folder to write to; raises InputError, before any work, if a file is in its way."""
    folder = chosen or default
    for part in (folder, *folder.parents):
        if part.is_file():
            raise InputError(f"--output {folder}: {'' if part == folder else f'{part} '}is a file, not a folder")
    return folder


def emit_json(value: object) -> None:
    """Print one JSON document to stdout."""
    typer.echo(json.dumps(plain(value), indent=1, allow_nan=False))


def plain(value: Any) -> Any:
    """Return a value as what JSON has: no arrays, no paths, no NaN."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, (list, tuple, set)):
        return [plain(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)


def parse_options(pairs: Sequence[str]) -> dict[str, Any]:
    """Return ``["policy=global", "sweeps=4"]`` as a dict; JSON numbers and booleans become that.

    Raises:
        InputError: no ``=``, or a key given twice.
    """
    options: dict[str, Any] = {}
    for pair in pairs:
        key, sign, value = pair.partition("=")
        if not sign or not key:
            raise InputError(f"--option {pair!r}: expected KEY=VALUE")
        if key in options:
            raise InputError(f"--option {key!r} is given twice")
        options[key] = _value(value)
    return options


def _value(text: str) -> str | int | float | bool:
    with contextlib.suppress(json.JSONDecodeError):
        value = json.loads(text)
        if isinstance(value, (int, float)):
            return value
    return text


def console(*, stderr: bool = False) -> Console:
    """Return a console for people; 110 columns where the output is no terminal."""
    from rich.console import Console

    made = Console(stderr=stderr, highlight=False)
    if not made.is_terminal:
        made = Console(stderr=stderr, highlight=False, width=110)
    return made


def new_table(title: str, *headings: str) -> Table:
    """Return an empty table in the house style; headings that end in ``>`` are right-aligned."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, show_edge=False,
                  pad_edge=False)
    for heading in headings:
        text = Text(heading.removesuffix(">"))
        table.add_column(text, justify="right" if heading.endswith(">") else "left", overflow="fold")
    return table


def add_row(table: Table, *cells: object) -> None:
    """Add a row of plain text (brackets in it mean nothing)."""
    from rich.text import Text

    table.add_row(*(Text("-" if cell is None else str(cell)) for cell in cells))


def show_pairs(title: str, pairs: Iterable[tuple[str, object]]) -> None:
    """Print names and values, one per row."""
    table = new_table(title, "quantity", "value")
    for name, value in pairs:
        add_row(table, name, value)
    console().print(table)


def show_files(files: Iterable[Path]) -> None:
    """Name the files that were written, with a line on what each is; no path is ever broken over lines."""
    rows = [(str(file), describe_file(file)) for file in files]
    width = max((len(name) for name, _ in rows), default=0)
    out = console()
    out.print("\nWritten:")
    for name, words in rows:
        out.print(f"  {name:<{width}}  {words}".rstrip(), soft_wrap=True, markup=False)


FILE_WORDS = {
    "report.html": "the report: open it in a browser",
    ".study.json": "the table of a study, with its notes and provenance",
    ".result": "one run: tasks, steps, transfers, cache and critical path as Parquet",
    ".plan.json": "a placement plan (moesim export --to ...)",
    ".bound.npz": "the proof of a plan's bound (moesim place verify)",
    "compare.json": "the table of all solvers",
    "compare.png": "the picture: quality against time, the bound as a line",
    ".profile.json": "calibration: measured times",
    ".sweep": "all rows of a sweep as Parquet, one file per part",
    ".validation.json": "predicted against measured, task kind by task kind",
    ".perfetto.json": "a timeline: open it at ui.perfetto.dev",
    ".perfetto.json.gz": "a timeline: open it at ui.perfetto.dev",
    ".trace.parquet": "routing: which experts each token used",
    ".counts.parquet": "expert counts, without tokens",
    ".arrivals.parquet": "request arrivals: when, and how long",
    ".png": "a figure",
    ".json": "JSON",
}


def describe_file(file: Path) -> str:
    """Return what a file of moesim is, from its ending."""
    return next((words for ending, words in FILE_WORDS.items() if file.name.endswith(ending)), "")


@contextlib.contextmanager
def progress_bar(*, quiet: bool = False) -> Iterator[Callable[[str, float, float], None]]:
    """Yield ``(description, done, total)`` -> None, which draws bars on stderr."""
    from moesim.scenario.reporter import RichReporter

    if quiet:
        yield lambda description, done, total: None
        return
    with RichReporter(console(), console(stderr=True)) as reporter:
        yield reporter.progress
