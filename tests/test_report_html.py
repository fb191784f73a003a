"""Figures and the one-file report: what is drawn, that the page is well formed, whole and offline."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from moesim.artifacts import digest_file
from moesim.errors import InputError
from moesim.lowering.graph import Resource, TaskGraph
from moesim.report.figures import gantt_figure, result_figures, study_figures, time_figure
from moesim.report.headline import study_headline
from moesim.report.html import read_folder, report_folder, write_report
from moesim.report.plots import INK, PAPER, png_bytes
from moesim.simulate.result import DONE, SimulationResult, task_table
from moesim.simulate.study import StudyResult

VOID = {"meta", "img", "source", "br", "link", "hr", "input"}


def parallel_study(name: str = "where", title: str = "Where should <256> experts & shards live?") -> StudyResult:
    """Four placements of one model, one of them also with redundant experts."""
    points = [("contiguous", 0, 1.61, 5.42e-3), ("lpt", 0, 1.2, 4.6e-3), ("eplb", 0, 1.1, 4.4e-3),
              ("eplb", 32, 1.04, 4.2e-3)]
    rows = [{"placement": placement, "redundant_experts": extra, "imbalance": imbalance, "imbalance_bound": 1.02,
             "cross_rank_fraction": 0.87, "cross_node_fraction": 0.52, "cross_rank_bytes_per_step": 2.7e8,
             "cross_node_bytes_per_step": 1.6e8, "step_time_s": time_s, "step_time_bound_s": 4e-3,
             "step_time_gap": 1 - 4e-3 / time_s, "tokens_per_s": 4096 / time_s, "bound_by": "compute"}
            for placement, extra, imbalance, time_s in points]
    return StudyResult(name, "expert_parallel", title, pd.DataFrame(rows), ("A note with <b>markup</b> & \"quotes\".",),
                       {"seed": 7, "trace": "sha256:0123", "solvers": {"eplb": "global"}})


def offload_study() -> StudyResult:
    """Two policies and two prefetchers over three cache sizes and two things to do on a miss."""
    rows = [{"policy": policy, "prefetch": prefetch, "miss": miss, "slots_per_layer": slots,
             "hit_rate": slots / 32 + bonus, "htod_bytes_per_token": 1e9 / slots, "tpot_s": 1 / slots,
             "tpot_bound_s": 0.5 / slots, "tokens_per_s": slots * (1 + bonus)}
            for policy, bonus in (("lru", 0.0), ("lfu", 0.05)) for prefetch in ("none", "transition")
            for miss in ("fetch", "cpu") for slots in (8, 16, 24)]
    return StudyResult("cache", "offload", "", pd.DataFrame(rows))


def validation_study() -> StudyResult:
    """Kinds of task that differ by five orders of magnitude, one of them never measured."""
    table = pd.DataFrame({"kind": ["router", "load", "head", "end to end", "end to end"],
                          "num_tasks": [96, 40, 0, 1, 1],
                          "predicted_s": [9e-6, 1.5e-3, 1e-5, 1.7, 1.8], "measured_s": [1.1e-5, 1.6e-3, None, 1.8, 1.7],
                          "spread": [0.2, 1.2, None, 0.02, 0.02]})
    return StudyResult("torch", "validation", "", table)


def run_result(num_steps: int = 3, lanes: int = 2) -> SimulationResult:
    """Steps of 100 us: 60 us of attention on gpu0, 30 us of copy on each link, both from the step's start."""
    links = tuple(Resource(f"pcie{link}", f"gpu{link}", "HtoD") for link in range(lanes))
    graph = TaskGraph((Resource("gpu0.compute", "gpu0", "compute"), *links))
    start, end = [], []
    for step in range(num_steps):
        for resource in range(lanes + 1):
            kind, length = ("attention", 60_000) if resource == 0 else ("load", 30_000)
            graph.add(kind, resource, length, step=step, layer=0, expert=resource - 1, source="measured")
            start.append(100_000 * step)
            end.append(100_000 * step + length)
    zero = np.zeros(len(graph), np.int64)
    tasks = task_table(graph, np.array(start), np.array(start), np.array(end), zero, zero + DONE)
    path = pd.DataFrame({"resource": ["gpu0.compute", "wait"], "kind": ["attention", "wait"],
                         "time_ns": [60_000 * num_steps, 40_000 * (num_steps - 1)], "num_tasks": [num_steps, 2]})
    return SimulationResult("run", {"makespan_ns": 260_000, "costs": {"measured": 9}},
                            {"tasks": tasks, "critical_path": path}, {"seed": 3})


class Page(HTMLParser):
    """Balance of tags, references to the outside, and the text of the page."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Push a tag that must be closed."""
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        """Pop the tag, which must be the innermost one."""
        assert self.open, f"</{tag}> was never opened"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        """Collect text outside styles."""
        if "style" not in self.open:
            self.text += data

    def images(self) -> list[bytes]:
        """The decoded pictures."""
        values = [value for _, name, value in self.attributes if name in ("src", "srcset")]
        return [base64.b64decode(value.removeprefix("data:image/png;base64,")) for value in values]

    def check_offline(self) -> None:
        """Nothing is loaded from anywhere: every reference is data, and no style or script imports."""
        for tag, name, value in self.attributes:
            assert tag not in ("script", "link", "iframe", "object", "embed"), tag
            assert name not in ("href", "action", "poster", "background"), name
            if name in ("src", "srcset"):
                assert value.startswith("data:image/png;base64,")
        assert not re.search(r"https?:|//[a-z]|url\(|@import", re.sub(r"base64,[^\"]*", "", self.source))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a study, a result and its report."""
    base = tmp_path_factory.mktemp("runs") / "a <run>"
    parallel_study().write(base / "where.study.json")
    run_result().write(base / "sim.result")
    assert report_folder(base) == base / "report.html"
    return base


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    """The parsed report of `folder`."""
    return Page(folder / "report.html")


def test_page_is_balanced_and_loads_nothing(page: Page) -> None:
    """Every tag is closed in order, and the page needs no network."""
    page.check_offline()
    assert page.source.startswith("<!DOCTYPE html>")


def test_page_opens_with_the_answer_and_holds_the_table(page: Page) -> None:
    """The headline comes before the first section, and every cell of the study is on the page."""
    headline = study_headline(parallel_study())
    assert headline in page.text
    assert page.source.index("Shortest step") < page.source.index("<section>")
    for text in ("contiguous", "5.42 ms", "*4.2 ms", "270 MB", "*975,238", "* best of its column"):
        assert text in page.text


def test_text_is_escaped(page: Page) -> None:
    """Titles, notes and folder names reach the reader as they are, never as markup."""
    assert "Where should <256> experts & shards live?" in page.text
    assert 'A note with <b>markup</b> & "quotes".' in page.text
    assert "moesim report: a <run>" in page.text
    assert "<b>markup" not in page.source


def test_page_has_three_figures_for_light_and_dark(page: Page) -> None:
    """Study, time and timeline, each as two PNG pictures with another background, each described."""
    pictures = page.images()
    assert len(pictures) == 6
    assert len(set(pictures)) == 6
    assert all(picture.startswith(b"\x89PNG") for picture in pictures)
    assert len([value for tag, name, value in page.attributes if (tag, name) == ("img", "alt") and value]) == 3


def test_provenance_names_every_file_with_its_digest(page: Page, folder: Path) -> None:
    """Version, seeds, nested provenance, and the digest of each file that was read."""
    for file in ("where.study.json", "sim.result/summary.json", "sim.result/tasks.parquet"):
        assert file in page.text
        assert digest_file(folder / file) in page.text
    for text in ("moesim_version", "sha256:0123", "solvers.eplb", "costs.measured", "260 us"):
        assert text in page.text


def test_report_repeats_exactly_and_leaves_one_file(folder: Path) -> None:
    """Writing the report again gives the same bytes, and a report is no input of the next."""
    before = (folder / "report.html").read_bytes()
    write_report(folder, folder / "again.html", title="t", results={})
    report_folder(folder)
    assert (folder / "report.html").read_bytes() == before
    assert sorted(path.name for path in folder.iterdir()) == ["again.html", "report.html", "sim.result",
                                                              "where.study.json"]
    again = Page(folder / "again.html")
    assert "Run: sim" not in again.text
    assert len(again.images()) == 2


def test_partial_files_of_a_broken_run_are_no_input(folder: Path, tmp_path: Path) -> None:
    """What begins with a dot is a leftover of a run that was stopped."""
    (tmp_path / ".x.study.json").write_text("{")
    parallel_study().write(tmp_path / "b.study.json")
    parallel_study("first").write(tmp_path / "a.study.json")
    studies, results = read_folder(tmp_path)
    assert [study.name for study in studies] == ["first", "where"]
    assert results == {}


@pytest.mark.parametrize("study", [parallel_study(), offload_study(), validation_study()],
                         ids=lambda study: study.kind)
def test_study_figure_draws_every_number(study: StudyResult) -> None:
    """The bars' lengths and the lines' points are the table's numbers."""
    (figure,) = study_figures(study).values()
    drawn = {round(patch.get_x() + patch.get_width(), 9) for axis in figure.axes for patch in axis.patches
             if np.isfinite(patch.get_width())}
    drawn |= {round(float(y), 9) for axis in figure.axes for line in axis.lines for y in line.get_ydata()}
    columns = {"expert_parallel": ("step_time_s", "imbalance", "cross_rank_bytes_per_step"),
               "offload": ("tokens_per_s", "hit_rate", "htod_bytes_per_token"),
               "validation": ("predicted_s", "measured_s")}[study.kind]
    for column in columns:
        assert {round(value, 9) for value in study.table[column].dropna()} <= drawn, column


def test_bounds_are_drawn_across_the_bars() -> None:
    """Each bar of the step time has a mark at its bound, within its height."""
    (figure,) = study_figures(parallel_study()).values()
    axis = figure.axes[0]
    marks = [segment for collection in axis.collections for segment in collection.get_segments()]
    assert [round(mark[0][0], 9) for mark in marks] == [0.004] * 4
    centres = sorted(bar.get_y() + bar.get_height() / 2 for bar in axis.patches)
    assert sorted((mark[0][1] + mark[1][1]) / 2 for mark in marks) == pytest.approx(centres)


def test_offload_has_a_row_per_miss_and_a_bound_that_no_point_beats() -> None:
    """Six panels, four lines and a bound each for tokens per second; the bound is 2 x slots."""
    (figure,) = study_figures(offload_study()).values()
    assert len(figure.axes) == 6
    bound, *lines = figure.axes[0].lines
    assert list(bound.get_ydata()) == [16, 32, 48]
    assert len(lines) == 4
    assert all((bound.get_ydata() >= line.get_ydata()).all() for line in lines)
    assert figure.axes[0].get_title() == "tokens per second, on a miss: fetch"


def test_repeated_kinds_are_told_apart_and_wide_ranges_are_logarithmic() -> None:
    """Two end-to-end rows are two bars with two names, microseconds and seconds share a readable axis."""
    (figure,) = study_figures(validation_study()).values()
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == ["router", "load", "head", "end to end", "end to end 2"]
    assert figure.axes[0].get_xscale() == "log"
    assert len(png_bytes(figure)) > 10_000


def test_time_figure_shares_follow_from_the_tables() -> None:
    """Critical path 180 and 80 of 260 us; gpu0 busy 180, each link 90 of the 260 us makespan."""
    left, right = time_figure(run_result()).axes
    assert [round(bar.get_width(), 4) for bar in left.patches] == [round(18 / 26, 4), round(8 / 26, 4)]
    assert [round(bar.get_width(), 4) for bar in right.patches] == [round(18 / 26, 4), *[round(9 / 26, 4)] * 2]
    assert [label.get_text() for label in right.get_yticklabels()] == ["gpu0.compute", "pcie0", "pcie1"]


def test_the_path_is_summed_by_kind_over_resources() -> None:
    """The same kind on four devices is one bar, whose name counts them; one device is named."""
    path = pd.DataFrame({"resource": ["gpu0", "gpu1", "gpu2", "gpu3", "net", "wait"],
                         "kind": ["experts"] * 4 + ["combine", "wait"], "time_ns": [10, 20, 30, 15, 20, 5]})
    result = run_result()
    left = time_figure(SimulationResult("x", {}, {**result.tables, "critical_path": path})).axes[0]
    names = [label.get_text() for label in left.get_yticklabels()]
    assert names == ["experts (4 resources)", "combine (net)", "wait"]
    assert [round(bar.get_width(), 9) for bar in left.patches] == [0.75, 0.2, 0.05]


def test_bars_of_one_placement_lie_around_its_name() -> None:
    """A placement with one bar has it at its name; with two, the smaller number of extra experts is above."""
    (figure,) = study_figures(parallel_study()).values()
    centres = [round(bar.get_y() + bar.get_height() / 2, 9) for bar in figure.axes[0].patches]
    assert centres == [0.0, 1.0, 1.8, 2.2]


def test_busy_time_counts_overlapping_tasks_once() -> None:
    """Two tasks at once on one resource do not make it busier than the clock."""
    result = run_result()
    double = pd.concat([result.tasks, result.tasks], ignore_index=True)
    figure = time_figure(SimulationResult("x", {}, {"tasks": double}))
    assert round(figure.axes[1].patches[0].get_width(), 4) == round(18 / 26, 4)
    assert [text.get_text() for text in figure.axes[0].texts] == ["no critical path was recorded"]


def test_many_small_parts_of_the_path_become_other() -> None:
    """At most twelve bars, and they still add up to the whole path."""
    path = pd.DataFrame({"resource": "gpu0", "kind": [f"kind{index}" for index in range(30)],
                         "time_ns": range(100, 130)})
    result = run_result()
    left = time_figure(SimulationResult("x", {}, {**result.tables, "critical_path": path})).axes[0]
    assert len(left.patches) == 12
    assert sum(bar.get_width() for bar in left.patches) == pytest.approx(1.0)
    assert left.get_yticklabels()[-1].get_text() == "other"


def test_timeline_shows_the_first_step_only_and_more_on_request() -> None:
    """One step ends at 60 us, two at 160 us; lanes are in the timeline's order."""
    one, two = (gantt_figure(run_result(), num_steps=count).axes[0] for count in (1, 2))
    for axis, end_s in ((one, 60e-6), (two, 160e-6)):
        boxes = [path.vertices for bars in axis.collections for path in bars.get_paths()]
        assert max(box[:, 0].max() for box in boxes) == pytest.approx(end_s)
    assert [label.get_text() for label in one.get_yticklabels()] == ["gpu0  HtoD", "gpu0  compute", "gpu1  HtoD"]
    assert one.get_xlabel() == "time since the start of step 0"


def test_timeline_says_what_it_leaves_out() -> None:
    """Thirty lanes are cut to 24 and five tasks are all that was asked for; the axis says both."""
    axis = gantt_figure(run_result(lanes=29), max_slices=5).axes[0]
    assert "24 of 30 lanes" in axis.get_xlabel()
    assert "first 5 of 24 tasks" in axis.get_xlabel()
    assert sum(len(bars.get_paths()) for bars in axis.collections) == 5


def test_a_figure_renders_for_both_pages_and_repeats() -> None:
    """The corner has the page's colour, and rendering again, after the other page, gives the same bytes."""
    from matplotlib.image import imread

    figure = gantt_figure(run_result(num_steps=1))
    light, dark = png_bytes(figure), png_bytes(figure, dark=True)
    for picture, color in ((light, PAPER[False]), (dark, PAPER[True])):
        corner = imread(io.BytesIO(picture))[0, 0, :3]
        assert "#" + "".join(f"{round(255 * part):02X}" for part in corner) == color
    assert png_bytes(figure) == light
    assert figure.axes[0].yaxis.label.get_color() == INK[False]


def test_figures_use_no_global_state_of_matplotlib() -> None:
    """No figure is registered with pyplot, so nothing has to be closed."""
    from matplotlib import pyplot

    figures = {**study_figures(parallel_study()), **result_figures(run_result())}
    assert all(isinstance(figure, Figure) for figure in figures.values())
    assert pyplot.get_fignums() == []


def test_a_study_of_required_columns_only_can_be_drawn() -> None:
    """Without bounds, imbalance and traffic the figure has the step times and no warning."""
    table = pd.DataFrame({"placement": ["a", "b"], "step_time_s": [1e-3, 2e-3]})
    (figure,) = study_figures(StudyResult("s", "expert_parallel", "", table)).values()
    assert len(png_bytes(figure)) > 5_000


def test_empty_folder_is_an_error(tmp_path: Path) -> None:
    """A folder without studies and results says what was expected there."""
    with pytest.raises(InputError, match=r"nothing to report; expected \*\.study\.json files or \*\.result"):
        report_folder(tmp_path)
    assert not list(tmp_path.iterdir())


def test_missing_folder_is_an_error(tmp_path: Path) -> None:
    """A path that is no folder is named."""
    with pytest.raises(InputError, match="absent: no such folder"):
        report_folder(tmp_path / "absent")


def test_nothing_to_show_is_an_error(tmp_path: Path) -> None:
    """A report of no study and no result is refused and writes nothing."""
    with pytest.raises(InputError, match="neither a study nor a result"):
        write_report([], tmp_path / "r.html")
    assert not list(tmp_path.iterdir())


def test_a_broken_study_stops_the_report_and_is_named(tmp_path: Path) -> None:
    """A study without rows leaves no half report behind."""
    empty = StudyResult("hollow", "offload", "", pd.DataFrame({"policy": []}))
    with pytest.raises(InputError, match="study 'hollow': the table has no rows"):
        write_report([parallel_study(), empty], tmp_path / "r.html")
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_no_study_is_named(tmp_path: Path) -> None:
    """Broken JSON is reported with its file and line."""
    (tmp_path / "x.study.json").write_text("{\n 1")
    with pytest.raises(InputError, match=r"x\.study\.json:2:2: not valid JSON"):
        report_folder(tmp_path)


@pytest.mark.parametrize("bad", [{"num_steps": 0}, {"max_slices": -1}])
def test_timeline_limits_must_be_positive(bad: dict[str, int]) -> None:
    """No steps or no tasks to draw is a mistake of the caller."""
    with pytest.raises(InputError, match="must be at least 1"):
        gantt_figure(run_result(), **bad)
