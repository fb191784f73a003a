"""One self-contained HTML file about a run: answers, tables, figures, notes, provenance. No network."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesim import __version__
from moesim.artifacts import digest_file, write_text
from moesim.errors import InputError
from moesim.report.figures import result_figures, study_figures
from moesim.report.headline import study_headline
from moesim.report.plots import INK, PAPER, png_bytes
from moesim.report.tables import BEST_MARK, BEST_NOTE, Cell, study_cells, summary_rows
from moesim.simulate.result import SimulationResult, read_result
from moesim.simulate.study import StudyResult, read_study

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STUDY_SUFFIX, RESULT_SUFFIX, REPORT_NAME = ".study.json", ".result", "report.html"
CAPTIONS = {
    "expert_parallel": "Step time, imbalance and traffic of each placement",
    "offload": "Tokens per second, hit rate and bytes loaded over the size of the cache",
    "diffusion": "Tokens per second of refresh policies against the best schedule, and time per pass of coresets",
    "validation": "Predicted and measured time per kind of task, and the error",
    "time": "What bounded the run: the critical path, and how busy each resource was",
    "timeline": "What ran when",
}
_STYLE = f"""
:root {{ color-scheme: light dark; --ink: {INK[False]}; --paper: {PAPER[False]};
  --line: #d5d9de; --soft: #f4f6f8; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: {INK[True]}; --paper: {PAPER[True]}; --line: #3a4048; --soft: #1f2429; }}
}}
body {{ color: var(--ink); background: var(--paper); font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto;
  max-width: 1040px; padding: 0 1rem; }}
h1 {{ font-size: 1.6rem; }} h2 {{ font-size: 1.25rem; margin-top: 2.5rem; border-top: 1px solid var(--line);
  padding-top: 1rem; }} h3 {{ font-size: 1rem; }}
.answer {{ background: var(--soft); border-left: 4px solid #0072B2; padding: .6rem 1rem; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .2rem .6rem; text-align: left; border-bottom: 1px solid var(--line);
  vertical-align: top; }}
td.number, th.number {{ text-align: right; white-space: nowrap; }} td.best {{ font-weight: 700; }}
td.text {{ overflow-wrap: anywhere; }}
figure {{ margin: 1.2rem 0; }} img {{ max-width: 100%; height: auto; }}
figcaption, .notes, footer {{ font-size: 13px; opacity: .85; }}
"""


def write_report(folder_or_studies: str | os.PathLike[str] | Sequence[StudyResult],
                 path: str | os.PathLike[str], *,
                 results: Mapping[str, SimulationResult] | None = None, title: str = "moesim report",
                 provenance: Mapping[str, Any] | None = None) -> Path:
    """Write one HTML file with every study and result, whole or not at all; the same input, the same bytes.

    A folder stands for its ``*.study.json`` files, and for its ``*.result`` folders if `results` is None.
    Of each study: the best row with its gap to the bound, the table, the figure, the notes. Of each result:
    summary, critical path and first step. Then the provenance of all.

    Raises:
        InputError: nothing to report, or a study or result that cannot be shown (it is named).
    """
    if isinstance(folder_or_studies, (str, os.PathLike)):
        studies, found = read_folder(folder_or_studies)
        results = found if results is None else results
    else:
        studies, results = list(folder_or_studies), results or {}
    if not studies and not results:
        raise InputError(f"report {title!r}: there is neither a study nor a result to show")
    parts = [f"<h1>{escape(title)}</h1>", _answers(studies)]
    parts += [_study_section(study) for study in studies]
    parts += [_result_section(name, result) for name, result in results.items()]
    parts.append(_provenance_section(studies, results, provenance or {}))
    return write_text(path, _page(title, parts))


def report_folder(folder: str | os.PathLike[str]) -> Path:
    """Write ``report.html`` into a run folder, from its ``*.study.json`` files and ``*.result`` folders.

    The provenance lists the digest of every file that was read.

    Raises:
        InputError: no such folder, or nothing in it to report.
    """
    base = Path(folder)
    studies, results = read_folder(base)
    files = [*_named(base, STUDY_SUFFIX), *(part for name in _named(base, RESULT_SUFFIX)
                                            for part in sorted(name.iterdir()) if part.is_file())]
    digests = {file.relative_to(base).as_posix(): digest_file(file) for file in files}
    return write_report(studies, base / REPORT_NAME, results=results, provenance={"files": digests},
                        title=f"moesim report: {base.resolve().name}")


def read_folder(folder: str | os.PathLike[str]) -> tuple[list[StudyResult], dict[str, SimulationResult]]:
    """Return the studies and, by folder name, the results of a run folder, in order of their names.

    Raises:
        InputError: no such folder, nothing in it, or a file that cannot be read.
    """
    base = Path(folder)
    if not base.is_dir():
        raise InputError(f"{folder}: no such folder")
    studies = [read_study(path) for path in _named(base, STUDY_SUFFIX)]
    results = {path.name.removesuffix(RESULT_SUFFIX): read_result(path)
               for path in _named(base, RESULT_SUFFIX)}
    if not studies and not results:
        raise InputError(f"{folder}: nothing to report; expected *{STUDY_SUFFIX} files or *{RESULT_SUFFIX} "
                         "folders, as 'moesim run' writes them")
    return studies, results


def _named(base: Path, suffix: str) -> list[Path]:
    return sorted(path for path in base.glob(f"*{suffix}") if not path.name.startswith("."))


def _page(title: str, parts: Sequence[str]) -> str:
    head = ('<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n")
    return head + "\n".join(part for part in parts if part) + "\n</body>\n</html>\n"


def _answers(studies: Sequence[StudyResult]) -> str:
    """The answer of every study, before anything else."""
    rows = [f"<p><strong>{escape(study.title or study.name)}</strong><br>{escape(study_headline(study))}</p>"
            for study in studies]
    return f'<div class="answer">{"".join(rows)}</div>' if rows else ""


def _study_section(study: StudyResult) -> str:
    columns, rows = study_cells(study, all_columns=True)
    numeric = [all(row[index].numeric for row in rows) for index in range(len(columns))]
    headings = [column.heading.replace("-\n", "").replace("\n", " ") for column in columns]
    table = _table([*zip(headings, numeric, strict=True)], rows)
    notes = "".join(f"<li>{escape(note)}</li>" for note in study.notes)
    marked = f"<p class=\"notes\">{BEST_NOTE}</p>" if any(cell.best for row in rows for cell in row) else ""
    return "\n".join([f"<section>\n<h2>{escape(study.title or study.name)}</h2>",
                      *(_figure(name, figure, study.name) for name, figure in study_figures(study).items()),
                      table, marked, f'<ul class="notes">{notes}</ul>' if notes else "", "</section>"])


def _result_section(name: str, result: SimulationResult) -> str:
    figures = [_figure(kind, figure, name) for kind, figure in result_figures(result).items()]
    return "\n".join([f"<section>\n<h2>Run: {escape(name)}</h2>", *figures,
                      _pairs(summary_rows(result.summary)), "</section>"])


def _provenance_section(studies: Sequence[StudyResult], results: Mapping[str, SimulationResult],
                        provenance: Mapping[str, Any]) -> str:
    sources = [("this report", {"moesim_version": __version__, **provenance}),
               *((f"study {study.name}", study.provenance) for study in studies),
               *((f"run {name}", result.provenance) for name, result in results.items())]
    blocks = [f"<h3>{escape(name)}</h3>\n{_pairs(summary_rows(dict(values), plain=True))}"
              for name, values in sources if values]
    return "\n".join(["<section>\n<h2>Provenance</h2>", *blocks, "</section>"])


def _table(headings: Sequence[tuple[str, bool]], rows: Sequence[Sequence[Cell]]) -> str:
    head = "".join(f'<th{_number(numeric)} scope="col">{escape(text)}</th>' for text, numeric in headings)
    cells = [[_data(cell, numeric) for cell, (_, numeric) in zip(row, headings, strict=True)] for row in rows]
    body = [f"<tr>{''.join(row)}</tr>" for row in cells]
    return ('<div class="scroll"><table>\n<thead><tr>' + head + "</tr></thead>\n<tbody>\n" + "\n".join(body)
            + "\n</tbody></table></div>")


def _data(cell: Cell, numeric: bool) -> str:
    kind = " ".join(name for name, applies in (("number", numeric), ("best", cell.best)) if applies)
    return f'<td class="{kind or "text"}">{BEST_MARK if cell.best else ""}{escape(cell.text)}</td>'


def _number(numeric: bool) -> str:
    return ' class="number"' if numeric else ""


def _pairs(rows: Sequence[tuple[str, str]]) -> str:
    """A table of names and values."""
    body = "\n".join(f'<tr><th scope="row">{escape(name)}</th><td class="text">{escape(value)}</td></tr>'
                     for name, value in rows)
    return f'<div class="scroll"><table>\n<tbody>\n{body}\n</tbody></table></div>' if rows else ""


def _figure(kind: str, figure: Figure, subject: str) -> str:
    """The picture inside the page, drawn for light and for dark pages; the browser picks."""
    light, dark = (base64.b64encode(png_bytes(figure, dark=dark)).decode() for dark in (False, True))
    caption = f"{CAPTIONS[kind]} ({subject})"
    return ('<figure><picture>'
            f'<source media="(prefers-color-scheme: dark)" srcset="data:image/png;base64,{dark}">'
            f'<img alt="{escape(caption)}" src="data:image/png;base64,{light}"></picture>'
            f"<figcaption>{escape(caption)}</figcaption></figure>")
