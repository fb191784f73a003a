"""The benchmarks' counts of work: exact, seeded, and checked against what SimPy and plain code count."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import simpy

from moesim.simulate.simpy_executor import run_simpy

FOLDER = Path(__file__).parent.parent / "benchmarks"

# tasks, SimPy events, decisions of the smallest size of each case. A change here is a change of the model or of
# its lowering: say so in CHANGES.md under [RESULTS].
COUNTS = {
    "layered graph": (13000, 25525, 1),
    "offload, OLMoE": (3976, 6869, 257),
    "offload, DeepSeek-V3": (6044, 10009, 233),
    "8 ranks, OLMoE": (1764, 3333, 4),
    "64 ranks, DeepSeek-V3": (15471, 20190, 1),
}

# Hits of 2,560 accesses, by policy: a pool of 32 slots per layer, set semantics.
CACHE_HITS = {
    "lru": 1455, "lfu": 1489, "lfu-resident": 1493, "belady": 1703, "belady-bypass": 1704, "static": 1647}


def module(name: str) -> ModuleType:
    """Import a script of benchmarks/, which is no package."""
    spec = importlib.util.spec_from_file_location(f"moesim_benchmark_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found
    spec.loader.exec_module(found)
    return found


simulation, cache = module("simulation"), module("cache")


@pytest.mark.parametrize("case", COUNTS)
def test_counts_of_work(case: str) -> None:
    """The smallest size of each case has exactly this many tasks, events and decisions."""
    run = simulation.measure(case, 1)
    assert (run.tasks, run.events, run.decisions) == COUNTS[case]


def test_expert_parallel_tasks_are_those_of_the_formula() -> None:
    """4 steps x (16 layers x (attention, router, experts on 8 ranks, 2 exchanges, 1 barrier) + 8 heads + 1 barrier)."""
    tasks, _, decisions = COUNTS["8 ranks, OLMoE"]
    assert tasks == 4 * (16 * (3 * 8 + 2 + 1) + 8 + 1)
    assert decisions == 4


def test_every_case_is_pinned() -> None:
    """No case of the benchmark lacks its counts."""
    assert list(COUNTS) == list(simulation.CASES)


@pytest.mark.parametrize("case", ["layered graph", "offload, OLMoE"])
def test_events_are_those_that_simpy_handles(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The count from the task table equals the number of times SimPy's own loop takes an event."""
    taken = [0]

    class Counting(simpy.Environment):
        def step(self) -> None:
            super().step()  # raises EmptySchedule, uncounted, when nothing is left
            taken[0] += 1

    monkeypatch.setattr(simpy, "Environment", Counting)
    tasks = run_simpy(simulation.CASES[case](1))
    assert simulation.count_events(tasks) == taken[0]


def test_the_layered_graph_grows_as_it_says() -> None:
    """Size n has n times the tasks: 200 layers of 64 tasks and a barrier; both parts of the run take time."""
    tasks = [simulation.measure("layered graph", size) for size in (1, 2)]
    assert [run.tasks for run in tasks] == [200 * 65, 400 * 65]
    assert all(run.lowering_s > 0 and run.execution_s > 0 for run in tasks)


def test_engines_agree_on_hits(tmp_path: Path) -> None:
    """Compiled, Python, OrderedDict, the curves and libcachesim (where installed) count the same hits; exact integers."""
    lines = cache.make_lines(cache.make_stream(20), tmp_path)
    found = cache.time_lines(lines, 1)
    hits = {name: count for name, (_, count) in found.items()}
    assert hits[cache.REFERENCE] == hits[cache.ORDERED_DICT] > 0
    apart = {name.partition(":")[0]: count for name, count in hits.items() if name.endswith("compiled, a pool per layer")}
    assert apart == CACHE_HITS
    groups = {line.agrees for line in lines if line.agrees}
    assert all(sum(line.agrees == group for line in lines) > 1 for group in groups)


def test_engines_that_disagree_stop_the_benchmark() -> None:
    """A table of times of things that do not do the same work is refused."""
    lines = [cache.Line("one", lambda: 1, "same"), cache.Line("two", lambda: 2, "same")]
    with pytest.raises(SystemExit, match="the hits differ between runs, or between engines"):
        cache.time_lines(lines, 1)


def test_a_missed_cache_target_is_said() -> None:
    """Too slow in itself, or against libcachesim, is a miss; other lines ask nothing."""
    lru, theirs = "lru: compiled, a pool per layer", "lru: libcachesim LRU in C, one pool"
    assert cache.verdict(lru, {lru: (0.01, 1)}, 1_000_000) == ("90 M/s", True)
    assert not cache.verdict(lru, {lru: (0.02, 1)}, 1_000_000)[1]
    assert cache.verdict(lru, {lru: (0.01, 1), theirs: (0.041, 1)}, 1_000_000)[1]
    assert not cache.verdict(lru, {lru: (0.01, 1), theirs: (0.039, 1)}, 1_000_000)[1]
    assert cache.verdict("static: compiled, a pool per layer", {}, 1) == ("", True)


@pytest.mark.parametrize(
    ("script", "arguments", "text"),
    [
        (simulation.main, ["--repeats", "0"], "--repeats must be at least 1, got 0"),
        (simulation.main, ["--fast"], "unrecognized arguments: --fast"),
        (cache.main, ["--quik"], "unrecognized arguments: --quik"),
    ],
)
def test_wrong_arguments_are_refused(
    script: Callable[[list[str]], None], arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A wrong option ends before anything is measured, with what is wrong on stderr."""
    with pytest.raises(SystemExit):
        script(arguments)
    assert text in capsys.readouterr().err
