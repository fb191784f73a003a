"""Collectives between processes: they give tables, and no failure of a rank makes the others wait."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from moesim.calibrate import run
from moesim.calibrate.collective_worker import MESSAGE_BYTES, OPERATIONS
from moesim.calibrate.collectives import collective_key, collective_keys, measure_collectives
from moesim.calibrate.processes import ProcessError, run_together
from moesim.model.spec import AttentionSpec, ModelSpec

pytest.importorskip("torch")
SLEEP = "import time, pathlib, sys, os; pathlib.Path(sys.argv[1]).write_text(str(os.getpid())); time.sleep(600)"
MODEL = ModelSpec("tiny", 2, (0, 1), 4, 2, 16, 24, AttentionSpec(4, 2, 8), 32)


def python(code: str, *arguments: str) -> list[str]:
    """Return the command that runs this code."""
    return [sys.executable, "-c", code, *arguments]


def ended(file: Path) -> bool:
    """Return whether the process that wrote its id there has ended."""
    try:
        os.kill(int(file.read_text()), 0)
    except ProcessLookupError:
        return True
    return False


def test_processes_that_all_end_well_are_waited_for(tmp_path: Path) -> None:
    """Each has the environment that was given, and has done its work."""
    write = "import os, sys, pathlib; pathlib.Path(sys.argv[1]).write_text(os.environ['MOESIM_WORD'])"
    files = [tmp_path / name for name in ("a", "b")]
    run_together([python(write, str(file)) for file in files], 60.0, {"MOESIM_WORD": "seen"})
    assert [file.read_text() for file in files] == ["seen", "seen"]


def test_a_rank_that_fails_ends_the_others(tmp_path: Path) -> None:
    """Its last words are quoted, and the rank that would have slept for ten minutes is gone."""
    file = tmp_path / "pid"
    fail = "import pathlib, sys, time\nwhile not pathlib.Path(sys.argv[1]).exists() or not pathlib.Path(sys.argv[1]).read_text(): time.sleep(0.01)\n" \
           "print('first'); sys.exit('no such wire')"
    with pytest.raises(ProcessError, match="rank 1 of 2 ended with status 1: no such wire"):
        run_together([python(SLEEP, str(file)), python(fail, str(file))], 60.0)
    assert ended(file)


def test_a_rank_that_does_not_end_is_ended(tmp_path: Path) -> None:
    """The message says which, and after how long."""
    with pytest.raises(ProcessError, match=r"2 ranks: no end after 1 s \(still running: .*0"):
        run_together([python(SLEEP, str(tmp_path / "pid")), python("pass")], 1.0)


def test_an_interruption_ends_all_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while waiting leaves no process behind."""
    file = tmp_path / "pid"

    def stop(seconds: float) -> None:
        if file.exists() and file.read_text():
            raise KeyboardInterrupt
        real(seconds)

    real = time.sleep
    monkeypatch.setattr("moesim.calibrate.processes.time.sleep", stop)
    with pytest.raises(KeyboardInterrupt):
        run_together([python(SLEEP, str(file))], 60.0)
    assert ended(file)


def test_two_ranks_measure_every_collective_and_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real processes over gloo; three runs of each at least, all of a positive time."""
    monkeypatch.setattr("moesim.calibrate.collectives.MEASURE_SHARE", 0.0)  # three passes, no more
    found: dict[tuple[str, float], list[float]] = {}
    for key, size, seconds in measure_collectives("gloo", 2, 120.0, 0):
        assert (key.device, key.shape, key.axes) == ("gloo", "ranks2", ("bytes",))
        found.setdefault((key.op, size[0]), []).append(seconds)
    assert set(found) == {(operation, float(size)) for operation in OPERATIONS for size in MESSAGE_BYTES}
    assert all(len(values) >= 3 and min(values) > 0 for values in found.values())


def test_what_was_measured_before_a_failure_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole lines of the file are yielded, then the failure is raised."""
    def failing(commands: list[list[str]], timeout_s: float, environment: dict[str, str]) -> None:
        folder = Path(commands[0][3])
        (folder / "samples.jsonl").write_text('["all_reduce", 4096, 0.5]\n["all_reduce", 409')
        raise ProcessError("no end")

    monkeypatch.setattr("moesim.calibrate.collectives.run_together", failing)
    found = measure_collectives("gloo", 2, 1.0, 0)
    assert next(found) == (collective_key("all_reduce", "gloo", 2), (4096.0,), 0.5)
    with pytest.raises(ProcessError, match="no end"):
        next(found)
    with pytest.raises(ProcessError, match="there was no time"):
        next(measure_collectives("gloo", 2, -1.0, 0))


def test_ranks_that_fail_are_noted_and_the_others_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two groups one fails: the profile holds the other, with a note; going on measures only what is missing."""
    asked = []

    def made_up(backend: str, ranks: int, seconds: float, seed: int) -> object:
        asked.append(ranks)
        if ranks == 4 and len(asked) == 2:
            raise ProcessError("rank 3 of 4 ended with status 1: no")
        return [(collective_key(operation, backend, ranks), (float(size),), 0.5) for operation in OPERATIONS for size in MESSAGE_BYTES
                for _ in range(3)]

    monkeypatch.setattr(run, "measure_collectives", made_up)
    options = {"device": "cpu", "parts": ("collectives",), "partial": tmp_path / "a.partial", "seconds": 5.0}
    found = run.calibrate(MODEL, **options)  # type: ignore[arg-type]
    assert {table.shape for table in found.tables} == {"ranks2"}
    assert found.fingerprint["notes"] == ["collectives of 4 ranks did not end well, and may lack sizes: rank 3 of 4 ended with status 1: no"]
    again = run.calibrate(MODEL, **options)  # type: ignore[arg-type]
    assert asked == [2, 4, 4]
    assert {table.key for table in again.tables} == {key for keys in collective_keys("cpu").values() for key in keys}
