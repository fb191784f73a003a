"""Which executor runs: the choice, the way there while nothing is compiled, and every shipped scenario on both sides."""

from __future__ import annotations

import dataclasses
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import moesim.simulate.compile_ahead as ahead
from moesim.errors import InputError
from moesim.lowering.graph import Program
from moesim.placement.plan import PlacementPlan
from moesim.scenario.expert_parallel import ExpertParallelSetup
from moesim.scenario.inputs import load_inputs
from moesim.scenario.load import load_scenario
from moesim.scenario.offload import OffloadSetup
from moesim.scenario.schema import ExpertParallelStudy, OffloadStudy
from moesim.simulate.executors import execute, execute_compiled, executor_of
from moesim.simulate.run import simulate
from moesim.simulate.simpy_executor import execute_simpy
from moesim.simulate.small_cases import small_programs

SHIPPED = Path(__file__).parent.parent / "scenarios"
# those of the engines, and published systems that between them use every part of an offload program
QUICK = ("quickstart", "expert-parallel", "hybrimoe", "flashmoe", "hobbit")
SCENARIOS = [pytest.param(path, id=path.stem, marks=() if path.stem in QUICK else pytest.mark.slow)
             for path in sorted(SHIPPED.glob("*.yaml")) if path.stem != "diffusion-llada2-mini"]
MAX_STEPS = 6


def shortened(study: Any) -> Any:
    """The study with a few steps, which is all that the executors differ in."""
    return study.model_copy(update={"workload": study.workload.model_copy(update={"max_steps": MAX_STEPS, "warmup_steps": 0})})


def programs(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield a maker of every program that a scenario's studies lower: all points; expert parallelism with spare slots too."""
    scenario = load_scenario(path)
    inputs = load_inputs(scenario)
    for study in scenario.studies:
        if isinstance(study, OffloadStudy):
            setup = OffloadSetup(inputs, shortened(study))
            for point in study.expand():
                yield f"{study.name} {point}", lambda s=setup, p=point: s.offload.program(p, s.cost)
        elif isinstance(study, ExpertParallelStudy):
            planned = ExpertParallelSetup(inputs, shortened(study))
            for redundant in (0, planned.hardware.num_ranks):
                plan = round_robin(planned, redundant)
                yield f"{study.name} +{redundant}", lambda s=planned, p=plan: s.program(p)


def round_robin(setup: ExpertParallelSetup, redundant: int) -> PlacementPlan:
    """Experts in turn, some of them twice."""
    problem = setup.problem(redundant)
    row = [slot % problem.num_experts for slot in range(problem.num_slots)]
    return PlacementPlan([row] * problem.num_layers, problem.num_ranks, problem.num_experts)


@pytest.mark.parametrize("path", SCENARIOS)
def test_every_shipped_scenario_is_the_same_on_both_sides(path: Path) -> None:
    """All tables of all programs, row for row, and the summaries."""
    compared = 0
    for name, make in programs(path):
        reference, compiled = (simulate(make(), executor=executor) for executor in (execute_simpy, execute_compiled))
        assert set(reference.tables) == set(compiled.tables)
        for table, frame in reference.tables.items():
            pd.testing.assert_frame_equal(frame, compiled.tables[table], check_exact=True, obj=f"{name}: {table}")
        assert compiled.summary == reference.summary, name
        compared += 1
    assert compared >= 2


def test_the_small_cases_are_the_same_on_both_sides() -> None:
    """What compiling ahead runs is right, too."""
    for one, other in zip(small_programs(), small_programs(), strict=True):
        pd.testing.assert_frame_equal(execute_simpy(one).table(), execute_compiled(other).table(), check_exact=True)


def test_executors_go_by_name() -> None:
    """The names of the command line; a misspelt one is named."""
    assert executor_of("compiled") is execute_compiled
    assert executor_of() is execute
    assert executor_of("simpy")(next(small_programs())).table().equals(execute_simpy(next(small_programs())).table())
    with pytest.raises(InputError, match=r"unknown executor 'simpi'.*simpy"):
        executor_of("simpi")


@dataclasses.dataclass
class Started:
    """Stands in for Popen and remembers what it was asked to start."""

    calls: list[list[str]] = dataclasses.field(default_factory=list)

    def __call__(self, arguments: list[str], **options: Any) -> None:
        self.calls.append(arguments)


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Started]:
    """A machine on which nothing is compiled yet, and that starts no process."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("MOESIM_BACKGROUND_COMPILE")
    started = Started()
    monkeypatch.setattr(subprocess, "Popen", started)
    for cached in (ahead._marker, ahead._once):
        cached.cache_clear()
    yield started
    for cached in (ahead._marker, ahead._once):
        cached.cache_clear()


def test_simpy_answers_while_nothing_is_compiled(fresh: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first run starts compiling once and uses SimPy; once the marker is there the compiled side runs."""
    used: list[str] = []
    monkeypatch.setattr("moesim.simulate.executors._simpy", lambda program: used.append("simpy"))
    monkeypatch.setattr("moesim.simulate.executors.execute_compiled", lambda program: used.append("compiled"))
    program: Program = next(small_programs())
    execute(program)
    execute(program)
    assert used == ["simpy", "simpy"]
    assert [call[1:] for call in fresh.calls] == [["-m", "moesim.simulate.compile_ahead"]]
    ahead._marker().parent.mkdir(parents=True)
    ahead._marker().write_text("")
    execute(program)
    assert used[-1] == "compiled"


def test_compiling_now_leaves_the_marker(fresh: Started) -> None:
    """`moesim compile` runs the small cases; after it `auto` is the compiled side."""
    assert not ahead.compiled_ready()
    assert ahead.compile_now() == ahead._marker()
    assert ahead.compiled_ready()


def test_the_background_can_be_switched_off(fresh: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    """No process is started where the variable says so."""
    monkeypatch.setenv("MOESIM_BACKGROUND_COMPILE", "0")
    ahead.compile_in_background()
    assert not fresh.calls


def test_another_version_of_a_kernel_is_another_marker(fresh: Started, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The marker's name goes by what the compiled code depends on."""
    before = ahead._digest()
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    assert ahead._digest() != before
