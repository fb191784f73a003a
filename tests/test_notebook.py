"""The notebook: stored without outputs, runs from top to bottom, and its numbers respect what must hold."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pandas as pd
import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "notebooks" / "what_if.ipynb"
NUM_FIGURES = 11
SMALLER = {  # the run of the test: fewer points, fewer steps
    "NUM_STEPS = 24": "NUM_STEPS = 6",
    "LINKS_GB_PER_S = [4, 8, 16, 32, 64]": "LINKS_GB_PER_S = [4, 16, 64]",
    "SLOTS = [16, 32, 48, 56]": "SLOTS = [16, 48]"}
LOAD_CELLS = 6  # up to the cell that loads the trace and checks its shape


def load():
    """The notebook as stored."""
    return nbformat.read(NOTEBOOK, as_version=4)


def execute(notebook, folder: Path, trace: Path | str | None = None):
    """Run a notebook in a fresh kernel whose working directory is `folder`; errors raise CellExecutionError."""
    env = dict(os.environ)
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), env.get("PYTHONPATH"))))
    if trace is not None:
        env["MOESIM_NOTEBOOK_TRACE"] = str(trace)
    client = nbclient.NotebookClient(notebook, timeout=900, kernel_name="python3",
                                     resources={"metadata": {"path": str(folder)}})
    return client.execute(env=env)


def table(notebook, name: str) -> pd.DataFrame:
    """A table that an added cell printed as JSON."""
    text = "".join(output["text"] for output in notebook.cells[-1].outputs)
    return pd.DataFrame(json.loads(text)[name])


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory):
    """The notebook after a run with fewer points and steps, and a last cell that prints its tables."""
    notebook = load()
    for knob, smaller in SMALLER.items():
        cell = next(cell for cell in notebook.cells if knob in cell.source)
        cell.source = cell.source.replace(knob, smaller)
    tables = '{"sweep": sweep.to_dict("list"), "plans": by_phase.reset_index().to_dict("list")}'
    notebook.cells.append(nbformat.v4.new_code_cell(f"import json\nprint(json.dumps({tables}))"))
    return execute(notebook, tmp_path_factory.mktemp("notebook"))


def test_stored_without_outputs() -> None:
    """No output, no execution count, and a kernel that every installation has."""
    notebook = load()
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert (cell.outputs, cell.execution_count, dict(cell.metadata)) == ([], None, {})


def test_every_cell_is_short_and_introduced() -> None:
    """Each code cell follows a markdown cell and has at most 25 lines."""
    cells = load().cells
    kinds = [cell.cell_type for cell in cells]
    assert kinds == ["markdown", *["markdown", "code"] * (len(cells) // 2 - 1), "markdown"]
    assert max(len(cell.source.splitlines()) for cell in cells if cell.cell_type == "code") <= 25


def test_links_lead_somewhere() -> None:
    """Every relative link of the markdown names a file of the repository."""
    text = "\n".join(cell.source for cell in load().cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\((\.\./[^)]+)\)", text)
    assert links
    assert [link for link in links if not (NOTEBOOK.parent / link).is_file()] == []


def test_runs_and_draws_its_figures(executed) -> None:
    """Every code cell ran, none wrote to stderr, and all figures came out as PNG."""
    codes = [cell for cell in executed.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in codes] == list(range(1, len(codes) + 1))
    outputs = [output for cell in codes for output in cell.outputs]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == NUM_FIGURES


def test_no_point_beats_its_bound(executed) -> None:
    """Offload points stay at or below the bound on tokens/s, plans at or above the bound on step time."""
    sweep, plans = table(executed, "sweep"), table(executed, "plans")
    assert len(sweep) == 3 * 2 * 2
    assert (sweep["tokens_per_s"] <= sweep["bound_tokens_per_s"] * (1 + 1e-9)).all()
    assert len(plans) == 2 * 7
    assert (plans["duration_ns"] >= plans["bound_ns"]).all()


def test_hits_do_not_depend_on_the_link(executed) -> None:
    """Where every miss is fetched and nothing prefetched, LRU's hits are those of the stream, at any bandwidth."""
    sweep = table(executed, "sweep")
    hits = sweep[sweep["miss"] == "load"].groupby("slots_per_layer")["hit_rate"]
    assert (hits.nunique() == 1).all()
    assert hits.first().is_monotonic_increasing


def test_a_missing_trace_is_named(tmp_path: Path) -> None:
    """A wrong MOESIM_NOTEBOOK_TRACE ends in one clear line, not in a figure of nothing."""
    notebook = load()
    notebook.cells = notebook.cells[:LOAD_CELLS]
    with pytest.raises(nbclient.exceptions.CellExecutionError, match=r"mine\.trace\.parquet: no such file"):
        execute(notebook, tmp_path, tmp_path / "mine.trace.parquet")


def test_a_trace_of_another_shape_is_refused(tiny_folder: Path) -> None:
    """A trace with other layers and experts than the model's is refused before anything is drawn."""
    notebook = load()
    notebook.cells = notebook.cells[:LOAD_CELLS]
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="has 3 MoE layers x 8 experts, top-2, but"):
        execute(notebook, tiny_folder, tiny_folder / "tiny.trace.parquet")
