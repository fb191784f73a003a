"""Plans go out and come back: import(export(x)) is x wherever the file says enough, and says what is missing where not."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from export_worlds import CASES, MODEL, PLAN, SINGLE
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import CheckError, InputError
from moesim.export.engines import export
from moesim.placement.engine_files import PLAN_READERS, PlanFacts, detect_plan_format, read_engine_plan
from moesim.placement.metrics import duplicates_on_rank
from moesim.placement.plan import PlacementPlan

FACTS = PlanFacts(model=MODEL, num_ranks=2)
EXACT = sorted(set(PLAN_READERS) - {"exflow"})  # a home says the rank, not the slot


@pytest.mark.parametrize("target", EXACT)
def test_slots_come_back(target: str, tmp_path: Path) -> None:
    """Every slot of every layer, the ranks and the experts are the plan's; the format is told from the file."""
    path = export(PLAN, MODEL, target, tmp_path / f"x{CASES[target].suffix}").path
    for source_format in (None, target):
        back = read_engine_plan(path, source_format, FACTS)
        assert np.array_equal(back.physical_to_logical, PLAN.physical_to_logical)
        assert (back.num_ranks, back.num_experts, back.slot_share) == (2, 4, None)
    assert back.provenance["source"] == path.name


def test_homes_come_back(tmp_path: Path) -> None:
    """ExFlow's CSV keeps which rank holds an expert, and nothing of the order inside a rank."""
    path = export(SINGLE, MODEL, "exflow", tmp_path / "x.csv").path
    back = read_engine_plan(path, facts=FACTS)
    assert np.array_equal(np.sort(back.physical_to_logical.reshape(3, 2, 2)),
                          np.sort(SINGLE.physical_to_logical.reshape(3, 2, 2)))


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_random_plans_come_back(data: st.DataObject) -> None:
    """Over random sizes and layers, through every exact format."""
    import tempfile

    ranks, per_rank = data.draw(st.integers(2, 3)), data.draw(st.integers(1, 3))
    experts = data.draw(st.integers(1, ranks * per_rank))
    moe = sorted(data.draw(st.sets(st.integers(0, 5), min_size=1, max_size=3)))
    filled = [*range(experts), *range(ranks * per_rank - experts)][:ranks * per_rank]
    rows = [data.draw(st.permutations([expert % experts for expert in filled])) for _ in moe]
    plan = PlacementPlan(np.array(rows), ranks, experts)
    model = dataclasses.replace(MODEL, num_layers=6, moe_layers=tuple(moe), num_experts=experts, top_k=1)
    with tempfile.TemporaryDirectory() as folder:
        for target in EXACT:
            if target == "vllm-ascend" and duplicates_on_rank(plan).any():
                continue  # refused there
            path = export(plan, model, target, f"{folder}/x{CASES[target].suffix}").path
            back = read_engine_plan(path, facts=PlanFacts(model=model, num_ranks=ranks))
            assert np.array_equal(back.physical_to_logical, plan.physical_to_logical)


@pytest.mark.parametrize(("target", "facts", "text"), [
    ("sglang", PlanFacts(num_ranks=2), "the model is needed, to know which are MoE layers"),
    ("sglang", PlanFacts(model=MODEL), "does not say how many ranks there are"),
    ("sglang", PlanFacts(dataclasses.replace(MODEL, num_layers=6), num_ranks=2), "5 rows, model 'org/tiny' has 6 layers"),
    ("tensorrt-llm", PlanFacts(dataclasses.replace(MODEL, moe_layers=(1, 2, 3)), num_ranks=2),
     r"assigns the layers \[1, 2, 4\], the MoE layers of 'org/tiny' are \[1, 2, 3\]"),
    ("eplb", PlanFacts(), "does not say how many ranks"),
    ("vllm", PlanFacts(num_ranks=4), "holds 2 ranks, expected 4"),
    ("vllm-ascend", PlanFacts(num_layers=2), "holds 3 MoE layers, expected 2"),
    ("eplb", PlanFacts(num_ranks=4), "6 slots do not divide over 4 ranks"),
])
def test_missing_and_wrong_facts_are_named(target: str, facts: PlanFacts, text: str, tmp_path: Path) -> None:
    """What a file does not say must be given, and what is given must be what it holds."""
    path = export(PLAN, MODEL, target, tmp_path / f"x{CASES[target].suffix}").path
    with pytest.raises((InputError, CheckError), match=text):
        read_engine_plan(path, facts=facts)


@pytest.mark.parametrize(("name", "text", "message"), [
    ("x.json", "{", "not valid JSON"),
    ("x.json", "[1]", "expected a JSON object, found list"),
    ("x.json", '{"a": 1}', "not a placement file that is known; formats: sglang"),
    ("x.txt", "", "not a placement file that is known"),
    ("x.json", '{"physical_to_logical_map": 3}', "not a placement file of sglang"),
    ("x.json", '{"physical_to_logical_map": [[0], [0, 1], [0], [0], [0]]}', "not a placement file of sglang"),
    ("x.json", '{"layer_list": [{"layer_id": 0}]}', "not a placement file of vllm-ascend: KeyError"),
    ("x.yaml", "a: [", "not valid YAML"),
    ("x.yaml", "num_slots: 3", "not a placement file of tensorrt-llm: KeyError"),
    ("x.npz", "\x93NUMPY", "not a placement file of eplb"),
])
def test_files_of_another_kind_are_refused(name: str, text: str, message: str, tmp_path: Path) -> None:
    """The message names the file and what it was taken for."""
    (tmp_path / name).write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=rf"{name}: {message}|{name}.*{message}"):
        read_engine_plan(tmp_path / name, facts=FACTS)


def test_unknown_format_suggests_a_known_one(tmp_path: Path) -> None:
    """A misspelt format names the nearest one; a missing file is named."""
    with pytest.raises(InputError, match=r"unknown plan format 'sglan'. Did you mean 'sglang'"):
        read_engine_plan(tmp_path / "x.json", "sglan")
    with pytest.raises(InputError, match=r"none\.json: no such file"):
        detect_plan_format(tmp_path / "none.json")


def test_sglang_map_by_hand(tmp_path: Path) -> None:
    """A file that was not written here: dense rows are left out, whatever they hold."""
    rows = [[9, 9], [1, 0], [0, 1], [9, 9], [0, 1]]
    (tmp_path / "map.json").write_text(json.dumps({"physical_to_logical_map": rows}))
    model = dataclasses.replace(MODEL, num_experts=2)
    plan = read_engine_plan(tmp_path / "map.json", facts=PlanFacts(model=model, num_ranks=1))
    assert plan.physical_to_logical.tolist() == [[1, 0], [0, 1], [0, 1]]
