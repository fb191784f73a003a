"""The scenarios that ship: each is read strictly and has an expected summary; quick ones are run and compared."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from moesim.scenario.load import load_scenario

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
@pytest.mark.parametrize("name", [name for name in NAMES if name not in (*QUICK, "quickstart", "expert-parallel")])
def test_all_scenarios_come_out_as_committed(name: str) -> None:
    """Every row of the others, those whose plans depend on a time limit apart."""
    assert CHECK.check(name) == []


def test_a_difference_is_told_with_its_place() -> None:
    """Study, row, column, expected and got; a study too many or too few as well."""
    table = {"columns": ["policy", "tpot_ns"], "rows": [["lru", 5], ["lfu", 7]]}
    other = {"columns": ["policy", "tpot_ns"], "rows": [["lru", 5], ["lfu", 8]]}
    assert list(CHECK.differences({"a": table}, {"a": other})) == ["study 'a', row 1 (lfu): tpot_ns: expected 7, got 8"]
    assert list(CHECK.differences({"a": table}, {})) == ["study 'a': expected, but not run"]
    assert list(CHECK.differences({}, {"b": table})) == ["study 'b': not expected"]


def test_an_unknown_scenario_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """Exit status 2 and the nearest name."""
    assert CHECK.main(["--only", "hybrimo"]) == 2
    assert "hybrimoe" in capsys.readouterr().err
