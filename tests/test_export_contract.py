"""One contract for every export target: what it writes, reads back, tells apart, refuses, and offers instead."""

from __future__ import annotations

import ast
import dataclasses
import shlex
import tempfile
from pathlib import Path

import numpy as np
import pytest
from export_worlds import CASES, DOUBLED, KEPT, MODEL, PLAN, UNEVEN, padded_trace
from hypothesis import given, settings
from hypothesis import strategies as st

import moesim
from moesim.errors import CheckError, InputError
from moesim.export.engines import EXPORTERS, PlanTarget, export
from moesim.export.engines.target import Content
from moesim.export.residency import Residency
from moesim.placement.metrics import duplicates_on_rank
from moesim.placement.plan import PlacementPlan

TARGETS = sorted(CASES)
PLAN_TARGETS = [name for name in TARGETS if isinstance(EXPORTERS[name], PlanTarget)]


def on_disk(path: Path) -> Content:
    """The bytes of an exported file, or of each file of an exported folder."""
    return {file.name: file.read_bytes() for file in path.iterdir()} if path.is_dir() else path.read_bytes()


def test_every_target_has_a_case() -> None:
    """A new target cannot come without its place in this suite."""
    assert sorted(EXPORTERS.names()) == TARGETS
    assert all(EXPORTERS[name].name == name and EXPORTERS[name].what for name in TARGETS)


@pytest.mark.parametrize("target", TARGETS)
def test_same_subject_same_bytes_and_nothing_else_written(target: str, tmp_path: Path) -> None:
    """Every target writes one file or folder, the same at each call, with a command line and notes for the reader."""
    case = CASES[target]
    for folder in ("a", "b"):
        report = export(case.subject, case.model, target, tmp_path / folder / f"it's{case.suffix}")
        assert report.notes
        assert str(report.path) in " ".join(shlex.split(report.start_command)).replace("\\'", "'")
    one, other = (next((tmp_path / folder).iterdir()) for folder in ("a", "b"))
    assert on_disk(one) == on_disk(other)
    assert [len(list((tmp_path / folder).iterdir())) for folder in ("a", "b")] == [1, 1]


@pytest.mark.parametrize("target", TARGETS)
def test_the_check_reads_the_file_and_tells_it_from_another(target: str, tmp_path: Path) -> None:
    """What lies on disk passes the engine's rules as the subject's own, and fails as another's."""
    case, chosen = CASES[target], EXPORTERS[target]
    path = export(case.subject, case.model, target, tmp_path / f"x{case.suffix}").path
    chosen.check(on_disk(path), case.subject, case.model)
    with pytest.raises(CheckError, match=target.split("-")[0]):
        chosen.check(on_disk(path), case.other, case.model)


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_is_written_where_the_check_fails(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that goes wrong leaves no file behind: here it encodes another subject than it was given."""
    case, chosen = CASES[target], EXPORTERS[target]
    wrong = chosen.encode(case.other, case.model, Path(f"x{case.suffix}"))
    monkeypatch.setattr(type(chosen), "encode", lambda self, subject, model, path: wrong)
    with pytest.raises(CheckError):
        export(case.subject, case.model, target, tmp_path / f"x{case.suffix}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("target", "number"), [(name, number) for name in TARGETS
                                                for number in range(len(CASES[name].refused))])
def test_what_cannot_be_expressed_is_refused_and_the_nearest_offered(target: str, number: int, tmp_path: Path) -> None:
    """A refusal says why; `nearest` writes what the message named, which then passes as it is, or there is none."""
    case = CASES[target]
    subject, reason, has_nearest = case.refused[number]
    path = tmp_path / f"x{case.suffix}"
    with pytest.raises(InputError, match=reason) as refused:
        export(subject, case.model, target, path)
    assert ("--nearest" in str(refused.value)) == has_nearest
    assert not list(tmp_path.iterdir())
    if not has_nearest:
        with pytest.raises(InputError, match=reason):
            export(subject, case.model, target, path, nearest=True)
        return
    report = export(subject, case.model, target, path, nearest=True)
    assert "not what was given" in report.notes[0]
    refusal = EXPORTERS[target].refusal(subject, case.model)
    assert refusal is not None
    assert EXPORTERS[target].refusal(refusal.nearest, case.model) is None


@pytest.mark.parametrize("target", TARGETS)
def test_wrong_ending_is_refused_with_the_right_one(target: str, tmp_path: Path) -> None:
    """The engine chooses its reader by the ending, so another one is an error (a folder has none)."""
    case = CASES[target]
    if not case.suffix:
        (tmp_path / "plan.bin").write_text("mine")
        expected = "is not a folder that an export wrote"
    else:
        expected = rf"plan\.bin: the file must end in .*\{case.suffix}"
    with pytest.raises(InputError, match=expected):
        export(case.subject, case.model, target, tmp_path / "plan.bin")


@pytest.mark.parametrize("target", TARGETS)
def test_another_kind_of_subject_is_refused(target: str, tmp_path: Path) -> None:
    """Each target names what it takes; a plan is not a trace."""
    case = CASES[target]
    wrong = KEPT if isinstance(case.subject, PlacementPlan) else PLAN
    with pytest.raises(InputError, match=rf"{target}: takes .*, not a (plan|list of experts)"):
        export(wrong, case.model, target, tmp_path / f"x{case.suffix}")


@pytest.mark.parametrize("target", [name for name in TARGETS if EXPORTERS[name].needs_model])
def test_engines_with_layers_of_their_own_need_the_model(target: str, tmp_path: Path) -> None:
    """Without the model nobody knows which layers are dense; that is an error, not a guess."""
    with pytest.raises(InputError, match=f"{target}: the model is needed"):
        export(CASES[target].subject, None, target, tmp_path / f"x{CASES[target].suffix}")


@pytest.mark.parametrize("target", [name for name in TARGETS if name != "chakra"])
def test_subjects_of_another_model_are_refused(target: str, tmp_path: Path) -> None:
    """No target writes what was made for other layers or experts."""
    case = CASES[target]
    for changes, text in (({"moe_layers": case.model.moe_layers[:2]}, "for 3 MoE layers, the model 'org/tiny' has 2"),
                          ({"num_experts": 8}, "for 4 experts, the model 'org/tiny' has 8")):
        with pytest.raises(InputError, match=text):
            export(case.subject, dataclasses.replace(case.model, **changes), target, tmp_path / f"x{case.suffix}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("target", [name for name in PLAN_TARGETS if EXPORTERS[name].needs_model]
                         + ["ktransformers", "llama.cpp"])
def test_experts_shared_between_layers_are_refused(target: str, tmp_path: Path) -> None:
    """An engine that loads each layer's own experts cannot express a shared pool; the reason is given."""
    case = CASES[target]
    model = dataclasses.replace(case.model, expert_pool=np.tile(np.arange(4), (3, 1)))
    with pytest.raises(InputError, match="shares 4 experts between layers"):
        export(case.subject, model, target, tmp_path / f"x{case.suffix}")


def test_unknown_target_suggests_a_known_one(tmp_path: Path) -> None:
    """A misspelt target names the nearest exporter."""
    with pytest.raises(InputError, match=r"unknown export target 'sglan'. Did you mean 'sglang'"):
        export(PLAN, MODEL, "sglan", tmp_path / "plan.json")


def test_a_folder_with_other_files_is_left_as_it_is(tmp_path: Path) -> None:
    """A folder is replaced only if everything in it has the name of a file that the export writes."""
    case = CASES["chakra"]
    export(case.subject, None, "chakra", tmp_path / "et")
    export(case.subject, None, "chakra", tmp_path / "et")
    (tmp_path / "et" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="left as it is"):
        export(case.subject, None, "chakra", tmp_path / "et")
    assert (tmp_path / "et" / "notes.txt").read_text() == "mine"


def test_the_checks_share_no_code_with_the_writers() -> None:
    """`moesim.export.check` imports errors and itself only, so a mistake is not made twice."""
    folder = Path(moesim.__file__).parent / "export" / "check"
    names = {str(node.module) for file in folder.glob("*.py") for node in ast.walk(ast.parse(file.read_text()))
             if isinstance(node, ast.ImportFrom) and str(node.module).startswith("moesim")}
    assert names == {"moesim.errors", "moesim.export.check.rows"}


def test_even_shares_are_no_obstacle(tmp_path: Path) -> None:
    """Shares that say what engines do anyway are not refused."""
    even = dataclasses.replace(PLAN, slot_share=PLAN.share)
    assert export(even, MODEL, "sglang", tmp_path / "x.json").path.is_file()


def test_nearest_for_ascend_keeps_every_copy() -> None:
    """Copies move to ranks without one; how many there are of each expert does not change."""
    refusal = EXPORTERS["vllm-ascend"].refusal(DOUBLED, MODEL)
    assert refusal is not None
    assert np.array_equal(refusal.nearest.replica_count, DOUBLED.replica_count)
    assert int(duplicates_on_rank(refusal.nearest).sum()) == 0
    assert np.array_equal(refusal.nearest.physical_to_logical[1:], DOUBLED.physical_to_logical[1:])


def test_no_nearest_for_ascend_where_there_are_more_copies_than_ranks() -> None:
    """Three copies on two ranks cannot be parted; nothing is offered."""
    plan = PlacementPlan(np.array([[0, 1, 0, 0]]), 2, 2)
    refusal = EXPORTERS["vllm-ascend"].refusal(plan, dataclasses.replace(MODEL, moe_layers=(1,), num_experts=2))
    assert refusal is not None
    assert refusal.nearest is None


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_nearest_single_homes_move_as_few_experts_as_can_be(data: st.DataObject) -> None:
    """Of all plans with one home each and equal counts, none keeps more experts on a rank that holds them (brute force)."""
    from itertools import permutations

    ranks, extra = 2, data.draw(st.integers(1, 2))
    row = data.draw(st.permutations([0, 1, 2, 3, *data.draw(st.lists(st.integers(0, 3), min_size=2 * extra,
                                                                     max_size=2 * extra))]))
    plan = PlacementPlan(np.array([row]), ranks, 4)
    refusal = EXPORTERS["exflow"].refusal(plan, None)
    assert refusal is not None
    holders = [{slot // plan.slots_per_rank for slot, expert in enumerate(row) if expert == one} for one in range(4)]

    def kept(order: tuple[int, ...]) -> int:
        return sum(place // 2 in holders[expert] for place, expert in enumerate(order))

    best = max(kept(order) for order in permutations(range(4)))
    assert kept(tuple(refusal.nearest.physical_to_logical[0].tolist())) == best


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_every_random_plan_passes_every_plan_target(data: st.DataObject) -> None:
    """Any plan is written by every plan target, if need be as the nearest one, and passes the target's rules."""
    ranks, per_rank = data.draw(st.integers(2, 3)), data.draw(st.integers(2, 3))
    experts = data.draw(st.integers(1, per_rank)) * ranks
    slots = ranks * max(per_rank, experts // ranks)
    extra = data.draw(st.lists(st.integers(0, experts - 1), min_size=slots - experts, max_size=slots - experts))
    rows = [data.draw(st.permutations([*range(experts), *extra])) for _ in range(3)]
    plan = PlacementPlan(np.array(rows), ranks, experts)
    model = dataclasses.replace(MODEL, num_experts=experts, top_k=1)
    copies = max(int(plan.replica_count.max()), 1)
    with tempfile.TemporaryDirectory() as folder:
        for name in PLAN_TARGETS:
            if name == "vllm-ascend" and copies > 1:
                continue  # whether copies can be parted is another test's matter
            path = export(plan, model, name, f"{folder}/{name}{CASES[name].suffix}", nearest=True).path
            assert path.is_file()


def test_residency_and_traces_are_not_changed_by_a_refusal() -> None:
    """Finding the nearest leaves the refused subject as it was."""
    before = (KEPT.on_gpu.copy(), UNEVEN.share.copy(), padded_trace().expert_ids)
    EXPORTERS["llama.cpp"].refusal(KEPT, MODEL)
    EXPORTERS["sglang"].refusal(UNEVEN, MODEL)
    assert np.array_equal(KEPT.on_gpu, before[0])
    assert np.array_equal(UNEVEN.share, before[1])
    assert isinstance(KEPT, Residency)
