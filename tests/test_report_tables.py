"""Studies as tables: units, the marks on the best values, the width, the headline."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import InputError
from moesim.report.columns import COLUMNS
from moesim.report.headline import best_row, errors, study_headline
from moesim.report.tables import (
    format_value,
    render,
    study_cells,
    study_table,
    study_text,
    summary_rows,
    summary_table,
)
from moesim.simulate.result import SimulationResult
from moesim.simulate.study import KINDS, StudyResult, read_study


def parallel_study() -> StudyResult:
    """Three placements of 256 experts on 32 ranks, with and without redundant experts."""
    points = [("contiguous", 0, 1.61, 0.87, 5.42e-3, "communication", None),
              ("eplb", 0, 1.10, 0.87, 4.40e-3, "compute", None),
              ("eplb", 32, 1.04, 0.86, 4.20e-3, "compute", None),
              ("affinity", 0, 1.35, 0.57, 4.45e-3, "compute", 0.034)]
    rows = [{"placement": name, "redundant_experts": extra, "imbalance": imbalance, "imbalance_bound": 1.02,
             "imbalance_gap": 1 - 1.02 / imbalance, "cross_rank_fraction": crossing,
             "cross_node_fraction": 0.6 * crossing, "cross_rank_bytes_per_step": crossing * 3.1e8,
             "cross_node_bytes_per_step": 0.6 * crossing * 3.1e8, "step_time_s": time_s, "step_time_bound_s": 4.0e-3,
             "step_time_gap": 1 - 4.0e-3 / time_s, "tokens_per_s": 4096 / time_s, "tokens_per_s_bound": 1.024e6,
             "bound_by": bound_by, "objective_gap": gap}
            for name, extra, imbalance, crossing, time_s, bound_by, gap in points]
    return StudyResult("where", "expert_parallel", "Where should 256 experts live?", pd.DataFrame(rows),
                       ("The bound assumes no traffic.", "Costs: [red]12[/red] measured & 3 <nameplate>."), {"seed": 0})


def offload_study() -> StudyResult:
    """Two policies and an oracle over three cache sizes, fetching or computing on the host on a miss."""
    rows = []
    for policy, gain in (("lru", 0.0), ("static", -0.05), ("belady", 0.1)):
        for miss, cost_s in (("fetch", 0.2), ("cpu", 0.15)):
            for slots in (8, 16, 24):
                hit_rate = 0.4 + gain + slots / 64
                tpot_s, bound_s = 0.02 + (1 - hit_rate) * cost_s, 0.02 + 0.1 * (1 - slots / 32)
                rows.append({"policy": policy, "prefetch": "none", "miss": miss, "slots_per_layer": slots,
                             "resident_fraction": slots / 32, "hit_rate": hit_rate,
                             "htod_bytes_per_token": (1 - hit_rate) * 1.2e9, "stall_fraction": 1 - hit_rate,
                             "tpot_s": tpot_s, "tpot_bound_s": bound_s, "tpot_gap": 1 - bound_s / tpot_s,
                             "tokens_per_s": 1 / tpot_s, "bound_by": "fetch", "sees_future": policy == "belady"})
    return StudyResult("cache", "offload", "What should stay in 8 GB?", pd.DataFrame(rows), (), {"seed": 1})


def validation_study() -> StudyResult:
    """Five kinds of task and two repetitions of the whole."""
    rows = [("attention", 960, 41e-6, 44e-6, 0.08), ("router", 960, 9e-6, 11.5e-6, 0.2),
            ("experts", 960, 312e-6, 300e-6, 0.05), ("load", 4312, 1.52e-3, 1.55e-3, 0.03),
            ("end to end", 1, 1.71, 1.83, 0.02), ("end to end", 1, 1.72, 1.79, 0.02)]
    table = pd.DataFrame(rows, columns=["kind", "num_tasks", "predicted_s", "measured_s", "spread"])
    table["error"] = table["predicted_s"] / table["measured_s"] - 1
    return StudyResult("torch", "validation", "", table, ("Median of 5 repetitions.",), {})


def diffusion_study() -> StudyResult:
    """Policies with 32 and 64 experts on the GPU, among them the best schedule, and three coresets with all of them."""
    points = [("static", "causal", None, 32, 22.1, 0.244), ("interval", "causal", 4, 32, 26.4, 0.036),
              ("interval", "causal", 8, 64, 57.8, 0.087), ("pattern-trained", "trained", None, 64, 58.8, 0.067),
              ("optimal", "offline", None, 64, 62.6, 0.0)]
    rows = [{"policy": name, "coreset": None, "knows": knows, "tau": tau, "factor": None, "slots_per_layer": slots,
             "refreshes_per_block": 3.0, "promotions_per_step": 2.5, "miss_rate": 0.2, "unique_experts": 70.6,
             "experts_step_s": 0.9 / speed, "moves_step_s": 0.1 / speed, "step_time_s": 2.26 / speed, "tokens_per_s": speed,
             "over_optimal_fraction": over} for name, knows, tau, slots, speed, over in points]
    rows += [{"policy": name.replace("none", "resident"), "coreset": name, "slots_per_layer": 256, "unique_experts": unique,
              "expert_bytes_per_layer": 6.3e6 * unique, "experts_step_s": unique * 4e-5, "step_time_s": 8e-4 + unique * 4e-5,
              "tokens_per_s": 2.26 / (8e-4 + unique * 4e-5), "published_accuracy_fraction": accuracy, "lost_weight_share": lost}
             for name, unique, accuracy, lost in (("none", 70, 1.0, 0.0), ("des-vote 0.15", 38, 0.995, 0.145),
                                                  ("ec linear-reverse 2-14", 256, None, 0.68))]
    return StudyResult("refresh", "diffusion", "When to refresh?", pd.DataFrame(rows), ("Routing is made up.",), {"seed": 0})


STUDIES = {"expert_parallel": parallel_study, "offload": offload_study, "diffusion": diffusion_study,
           "validation": validation_study}


@pytest.mark.parametrize(("key", "value", "text"), [
    ("step_time_s", 0.00542, "5.42 ms"), ("makespan_ns", 1_530_000, "1.53 ms"), ("num_tasks", 4312, "4,312"),
    ("htod_bytes_per_token", 635e6, "635 MB"), ("link_bytes_per_s", 25e9, "25 GB/s"), ("hit_rate", 0.475, "47.5 %"),
    ("tokens_per_s", 755_720.2, "755,720"), ("tokens_per_s", 8.5512, "8.55"), ("error", -0.068, "-6.8 %"),
    ("error", 0.04, "+4.0 %"), ("imbalance", 1.0414, "1.041"), ("imbalance", 1, "1"), ("tokens_per_s", None, "-"),
    ("tpot_s", math.nan, "-"), ("tpot_s", math.inf, "-"), ("policy", "lru", "lru"), ("exact", True, "True"),
    ("step", np.int64(12_000), "12,000"), ("objective_gap", np.float64(0.034), "3.4 %"), ("peak_bytes", 2e9, "2 GB")])
def test_the_unit_follows_from_the_name(key: str, value: object, text: str) -> None:
    """A value is written with the unit that ends its name; what is not a finite number is a dash."""
    assert format_value(key, value) == text


@pytest.mark.parametrize("kind", KINDS)
def test_text_fits_in_110_columns_and_holds_all(kind: str) -> None:
    """No line is longer than 110, no row is broken, and title, best-mark legend and notes are there."""
    study = STUDIES[kind]()
    lines = study_text(study).splitlines()
    assert max(map(len, lines)) <= 110
    first = str(study.table.iloc[0, 0])
    assert sum(line.startswith(str(name)) for line in lines for name in set(study.table.iloc[:, 0])) == len(study.table)
    assert lines[0] == (study.title or study.name)
    assert any(line.startswith(first) for line in lines)
    assert "* best of its column" in lines
    for note in study.notes:
        assert note in " ".join(lines)


def test_values_stand_in_line() -> None:
    """In a column with a mark all digits end at the same place: the mark stands in front."""
    lines = study_text(parallel_study()).splitlines()
    rows = [line for line in lines if line.startswith(("contiguous", "eplb", "affinity"))]
    assert {line.index(" ms") for line in rows} == {rows[0].index(" ms")}
    assert len(rows) == 4


def test_best_values_are_those_that_a_sort_finds() -> None:
    """The marked cells are the smallest time, imbalance, traffic and gap, and the most tokens per second."""
    study = parallel_study()
    columns, rows = study_cells(study, all_columns=True)
    marked = {column.key: [row for row, cells in enumerate(rows) if cells[index].best]
              for index, column in enumerate(columns)}
    assert marked["step_time_s"] == marked["tokens_per_s"] == marked["imbalance"] == [2]
    assert marked["cross_rank_fraction"] == marked["cross_node_bytes_per_step"] == [3]
    assert marked["placement"] == marked["step_time_bound_s"] == marked["objective_gap"] == []


@settings(max_examples=40, deadline=None)
@given(st.lists(st.one_of(st.none(), st.integers(1, 6)), min_size=1, max_size=8))
def test_ties_are_all_marked_and_a_flat_column_is_not(times: list[int | None]) -> None:
    """Exactly the rows equal to the minimum are marked, unless no row is worse."""
    table = pd.DataFrame({"placement": "x", "step_time_s": pd.Series(times, dtype=object)})
    study = StudyResult("s", "expert_parallel", "", table)
    columns, rows = study_cells(study)
    known = sorted(time for time in times if time is not None)
    if not known:
        assert [column.key for column in columns] == ["placement"]
        return
    expected = [known[0] < known[-1] and time == known[0] for time in times]
    assert [row[1].best for row in rows] == expected


def test_the_error_nearest_to_zero_is_best() -> None:
    """Of the errors of a validation the smallest in size is marked, not the most negative."""
    columns, rows = study_cells(validation_study())
    index = [column.key for column in columns].index("error")
    assert [row[index].text for row in rows if row[index].best] == ["-1.9 %"]


def test_wide_columns_are_in_the_report_only_and_empty_ones_nowhere() -> None:
    """The text table leaves out four wide columns; a column without any value is left out of both."""
    study = parallel_study()
    wide = {column.key for column in COLUMNS["expert_parallel"] if column.wide}
    narrow, every = ({column.key for column in study_cells(study, all_columns=choice)[0]} for choice in (False, True))
    assert every - narrow == wide
    assert every == set(study.table.columns)
    study.table["objective_gap"] = None
    assert "objective_gap" not in {column.key for column in study_cells(study)[0]}


def test_unknown_columns_come_last_and_still_fit() -> None:
    """A scenario's own column is shown under its name, and a very long name is folded, not cut."""
    study = parallel_study()
    study.table["batch_tokens"] = [4096, 4096, 8192, 4096]
    study.table.loc[0, "placement"] = "a-placement-with-a-name-of-more-than-forty-letters"
    text = study_text(study)
    assert max(map(len, text.splitlines())) <= 110
    assert study_cells(study)[0][-1].key == "batch_tokens"
    assert text.count("4,096") == 3


def test_a_column_that_never_changes_is_a_line_below() -> None:
    """What is the same in every row takes no width in the text, but stays a column of the report."""
    study = offload_study()
    study.table["requests_at_once"] = 4
    study.table["trace"] = "synthetic"
    text = study_text(study)
    assert "requests at once: 4\ntrace: synthetic\n" in text
    assert text.count("synthetic") == 1
    assert {"requests_at_once", "trace"} <= {column.key for column in study_cells(study, all_columns=True)[0]}
    study.table.loc[0, "requests_at_once"] = 8
    assert "requests_at_once" in {column.key for column in study_cells(study)[0]}


def test_only_text_is_folded_never_a_number() -> None:
    """Names that are too long take two lines; every number stays whole on one."""
    study = offload_study()
    study.table["policy"] = study.table["policy"] + "-with-a-very-long-name-that-cannot-fit"
    study.table["bound_by"] = "cpu_expert 87% and load 13%"
    lines = study_text(study).splitlines()
    assert max(map(len, lines)) <= 110
    for value in study.table["tpot_s"]:
        assert format_value("tpot_s", value) in "\n".join(lines)


def test_markup_in_notes_is_shown_not_obeyed() -> None:
    """Square brackets of a note reach the reader."""
    assert "[red]12[/red] measured & 3 <nameplate>" in study_text(parallel_study())


@pytest.mark.parametrize("kind", KINDS)
def test_a_study_from_disk_shows_the_same(kind: str, tmp_path: Path) -> None:
    """Written and read back, with None for what was missing, the text and the headline are the same."""
    study = STUDIES[kind]()
    again = read_study(study.write(tmp_path / "x.study.json"))
    assert study_text(again) == study_text(study)
    assert study_headline(again) == study_headline(study)


def test_headline_of_placements() -> None:
    """The shortest step, its gap to the bound, and what it saves against the longest (by hand: 1 - 4.2/5.42)."""
    assert study_headline(parallel_study()) == (
        "Shortest step: eplb with 32 redundant experts, 4.2 ms, gap 4.8 % to the bound of 4 ms. "
        "22.5 % less than contiguous, the longest.")


def test_headline_of_diffusion_recommends_what_can_be_had() -> None:
    """The best schedule knows the run and coresets change the model: neither is the answer, and a coreset says its debit."""
    study = diffusion_study()
    assert best_row(study)["policy"] == "pattern-trained"
    assert study_headline(study) == (
        "Most tokens per second without knowing the run: 58.8 with pattern-trained, 64 experts per layer on the GPU. Its "
        "experts and moves take 6.7 % longer than under the best schedule of each layer. Fastest coreset: des-vote 0.15, "
        "2.32 ms per pass instead of 3.6 ms; published relative accuracy 99.5 %.")
    resident = StudyResult("x", "diffusion", "", study.table[study.table["coreset"].notna()].iloc[[0, 2]])
    assert study_headline(resident) == (
        "628 tokens per second with all experts on the GPU. Fastest coreset: ec linear-reverse 2-14, 11.04 ms per "
        "pass instead of 3.6 ms; 68.0 % of the gate weight is lost, the accuracy is not published.")
    bare = StudyResult("x", "diffusion", "", resident.table.drop(columns=["lost_weight_share", "published_accuracy_fraction"]))
    assert study_headline(bare).endswith("what it costs in accuracy is unknown.")


def test_headline_of_offload_does_not_recommend_an_oracle() -> None:
    """Belady knows the future, so the best of the others answers: 1 / (20 + 22.5 % of 150 ms) = 18.6 tokens/s."""
    study = offload_study()
    row = best_row(study)
    real = study.table[study.table["policy"] != "belady"]
    assert row["tokens_per_s"] == real["tokens_per_s"].max() < study.table["tokens_per_s"].max()
    assert study_headline(study) == (
        "Most tokens per second: 18.6 with lru, prefetch none, on a miss cpu, 24 slots per layer, gap 16.3 % "
        "to the bound of 45 ms. Its hit rate is 77.5 %. With knowledge of the future it would be 25.8.")
    only = study.table[study.table["policy"] == "belady"]
    assert best_row(StudyResult("o", "offload", "", only))["policy"] == "belady"


def test_headline_of_a_validation_takes_the_worst_repetition() -> None:
    """End to end the larger error, and over the kinds the median and the largest."""
    assert study_headline(validation_study()) == (
        "End to end: predicted 1.71 s, measured 1.83 s, error -6.6 %. "
        "Task kinds: median error 5.4 %, largest 21.7 %.")


def test_without_a_bound_no_gap_is_claimed() -> None:
    """A study whose bound is unknown says so in its headline."""
    study = parallel_study()
    study.table["step_time_bound_s"] = None
    assert "4.2 ms (no proven bound)." in study_headline(study)


def test_errors_follow_from_the_times_where_the_column_is_missing() -> None:
    """Without an `error` column it is (predicted - measured) / measured, NaN where nothing was measured."""
    table = pd.DataFrame({"kind": ["a", "b"], "predicted_s": [1.1, 1.0], "measured_s": [1.0, None]})
    found = errors(table)
    assert found[0] == pytest.approx(0.1)
    assert math.isnan(found[1])


def test_summary_has_dotted_names_and_units() -> None:
    """Nested values are flat, lists are joined, provenance is printed as it is."""
    summary = {"makespan_ns": 2_500_000, "sources": {"measured": 12}, "limits": ["a", "b"], "tokens_per_s": 12.5}
    assert summary_rows(summary) == [("makespan_ns", "2.5 ms"), ("sources.measured", "12"), ("limits", "a, b"),
                                     ("tokens_per_s", "12.5")]
    assert summary_rows({"seed": 12345}, plain=True) == [("seed", "12345")]
    text = render(summary_table(SimulationResult("run [1]", summary, {})))
    assert "run [1]" in text
    assert "2.5 ms" in text


@pytest.mark.parametrize(("study", "text"), [
    (StudyResult("s", "offlaod", "", pd.DataFrame({"a": [1]})), r"study 's': 'offlaod'. Did you mean 'offload'"),
    (StudyResult("s", "offload", "", pd.DataFrame()), "study 's': the table has no rows"),
    (StudyResult("s", "expert_parallel", "", pd.DataFrame({"placment": ["a"], "step_time_s": [1]})),
     "lacks the column 'placement'. Did you mean 'placment'"),
    (StudyResult("s", "validation", "", pd.DataFrame({"kind": ["a"], "predicted_s": [1]})),
     r"lacks the column 'measured_s'. Known: kind, predicted_s\."),
])
def test_a_study_that_cannot_be_shown_is_refused(study: StudyResult, text: str) -> None:
    """An unknown kind, no rows, or a missing column is an error that names the study and the remedy."""
    for call in (study_table, study_headline, study_cells):
        with pytest.raises(InputError, match=text):
            call(study)


def test_no_number_means_no_answer() -> None:
    """A study whose every time is missing has no best row, and says which column."""
    study = parallel_study()
    study.table["step_time_s"] = None
    with pytest.raises(InputError, match="no row has a number in the column 'step_time_s'"):
        best_row(study)
