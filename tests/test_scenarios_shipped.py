"""The scenarios that ship: each is read strictly and has an expected summary; quick ones are run and compared."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest

from moesim.hardware.load import load_hardware
from moesim.scenario.load import load_scenario
from moesim.simulate.study import StudyResult
from moesim.units import GB

ROOT = Path(__file__).parents[1]
QUICK = ("hobbit", "raspberry-pi")


def program() -> ModuleType:
    """scenarios/check.py as a module."""
    spec = importlib.util.spec_from_file_location("scenarios_check", ROOT / "scenarios" / "check.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["scenarios_check"] = module
    spec.loader.exec_module(module)
    return module


CHECK = program()
NAMES = CHECK.scenario_names()


@pytest.mark.parametrize("name", NAMES)
def test_every_scenario_has_a_summary_of_its_studies(name: str) -> None:
    """The file is valid, its name is its own, and the committed summary has its studies with a row for each point."""
    scenario = load_scenario(ROOT / "scenarios" / f"{name}.yaml")
    assert scenario.name == name
    want = CHECK.expected(name)
    studies = {study.name: study for study in scenario.studies if study.kind != "validation"}
    assert set(want) == set(studies)
    for study, table in want.items():
        if studies[study].kind == "offload":
            assert len(table["rows"]) == len(studies[study].expand())
        assert all(len(row) == len(table["columns"]) for row in table["rows"])


@pytest.mark.parametrize("name", QUICK)
def test_quick_scenarios_come_out_as_committed(name: str) -> None:
    """Every row, integer by integer."""
    assert CHECK.check(name) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name not in QUICK])
def test_all_scenarios_come_out_as_committed(name: str) -> None:
    """Every row of the others."""
    assert CHECK.check(name) == []


def test_a_difference_is_told_with_its_place() -> None:
    """Study, row, column, expected and got; a study too many or too few as well."""
    table = {"columns": ["policy", "tpot_ns"], "rows": [["lru", 5], ["lfu", 7]]}
    other = {"columns": ["policy", "tpot_ns"], "rows": [["lru", 5], ["lfu", 8]]}
    assert list(CHECK.differences({"a": table}, {"a": other})) == ["study 'a', row 1 (lfu): tpot_ns: expected 7, got 8"]
    assert list(CHECK.differences({"a": table}, {})) == ["study 'a': expected, but not run"]
    assert list(CHECK.differences({}, {"b": table})) == ["study 'b': not expected"]


def test_results_of_solvers_with_a_time_limit_are_not_compared() -> None:
    """The names of such a row stay, its results are null; every other row keeps its numbers."""
    table = pd.DataFrame({"placement": ["lpt", "auto"], "redundant_experts": [0, 0], "step_time_s": [2e-6, 1e-6],
                          "imbalance": [1.5, 1.25], "cross_rank_bytes_per_step": [7.0, 5.0]})
    rows = CHECK.summary_of(StudyResult("a", "expert_parallel", "", table))["rows"]
    assert rows == [["lpt", 0, 2000, 1_500_000, 7], ["auto", 0, None, None, None]]


@pytest.mark.parametrize(("derived", "catalog", "changed"), [
    ("t4-fp16", "t4", {"bf16"}), ("quadro-rtx-6000-fp16", "quadro-rtx-6000", {"bf16"}), ("rtx-4090-256gb", "rtx-4090", set())])
def test_machines_of_the_scenarios_are_the_catalogs_but_for_what_they_say(derived: str, catalog: str, changed: set[str]) -> None:
    """Links, memories and rates are the catalog's, except the GPU's bf16 rate (its fp16 rate) or the host's size."""
    ours, theirs = load_hardware(str(ROOT / "scenarios" / "machines" / f"{derived}.yaml")), load_hardware(catalog)
    assert ours.links == theirs.links
    for name, device in theirs.devices.items():
        mine, wanted = ours.devices[name].flops_per_s, dict(device.flops_per_s)
        if device.kind == "gpu" and changed:
            wanted["bf16"] = wanted["fp16"]
        assert dict(mine) == wanted
    sizes = {name: memory.num_bytes for name, memory in ours.memories.items() if memory != theirs.memories[name]}
    assert sizes == ({} if changed else {"node0.dram": 256 * GB})


def test_an_unknown_scenario_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """Exit status 2 and the nearest name."""
    assert CHECK.main(["--only", "hybrimo"]) == 2
    assert "hybrimoe" in capsys.readouterr().err
