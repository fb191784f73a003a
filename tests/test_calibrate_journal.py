"""The file of an interrupted calibration: nothing of it is lost but a last line that was cut off."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.calibrate.journal import SCHEMA, Journal
from moesim.errors import InputError
from moesim.hardware.profile import TableKey

HEADER = {"model": "m", "machine": {"cores": 2, "torch": "2"}}
KEYS = (TableKey("copy", "dram_to_dram", "contiguous", "", ("bytes",)),
        TableKey("grouped_ffn", "cpu", "h1.ff1", "fp32", ("tokens", "groups", "largest_group")))
RUNS = st.lists(st.tuples(st.sampled_from(KEYS), st.integers(1, 3), st.floats(1e-9, 1e3)), max_size=12)


def write(path: Path, runs: list[tuple[TableKey, int, float]]) -> Journal:
    """Write runs of sizes (n, n, ...) and return the journal."""
    with Journal(path, HEADER) as journal:
        for key, size, seconds in runs:
            journal.add(key, (float(size),) * len(key.axes), seconds)
            journal.spend(journal.spent_s + seconds)
    return journal


@given(RUNS, RUNS)
@settings(deadline=None)
def test_what_was_written_is_taken_up_and_goes_on(first: list, second: list) -> None:
    """Every run in its order, bit for bit, over two interruptions; and the seconds that were spent."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "made" / "a.partial"
        before = write(path, first)
        after = write(path, second)
        assert (after.resumed, after.spent_s) == (True, pytest.approx(sum(run[2] for run in first + second)))
        with Journal(path, HEADER) as again:
            assert again.runs == after.runs
        with Journal(None, HEADER) as plain:
            for key, size, seconds in first + second:
                plain.add(key, (float(size),) * len(key.axes), seconds)
        assert plain.runs == after.runs
        assert all(after.num_runs(key, size) >= len(values) for key, sizes in before.runs.items() for size, values in sizes.items())


@given(RUNS, st.floats(0.0, 1.0))
@settings(deadline=None)
def test_a_file_that_was_cut_off_anywhere_is_taken_up(runs: list, part: float) -> None:
    """Whole lines stay, a torn one is dropped, and what is appended then starts on a line of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.partial"
        write(path, runs)
        data = path.read_bytes()
        cut = data[: round(part * len(data))]
        path.write_bytes(cut)
        whole = cut.count(b"\n")
        kept = [json.loads(text) for text in cut.decode().split("\n")[1:whole]]
        write(path, [(KEYS[0], 1, 0.5)])
        with Journal(path, HEADER) as journal:
            count = sum(len(values) for sizes in journal.runs.values() for values in sizes.values())
        assert count == sum("table" in line for line in kept) + 1


def test_a_killed_run_has_what_was_flushed(tmp_path: Path) -> None:
    """Without being closed: what was written out is there."""
    journal = Journal(tmp_path / "a.partial", HEADER)
    journal.add(KEYS[0], (4096.0,), 0.25)
    journal.spend(1.5)
    journal.flush()
    with Journal(tmp_path / "a.partial", HEADER) as other:
        assert (other.runs, other.spent_s) == ({KEYS[0]: {(4096.0,): [0.25]}}, 1.5)


@pytest.mark.parametrize(("header", "message"), [
    ({"model": "n"}, "of another run: model was 'm' and is 'n'; repeat its command to go on, or delete the file to start anew"),
    ({"machine": {"cores": 2, "torch": "3"}}, "machine.torch was '2' and is '3'"),
    ({"machine": {"cores": 2}}, "machine.torch was '2' and is None"),
    ({"seed": 4}, "seed was None and is 4"),
])
def test_a_file_of_another_run_is_refused(header: dict[str, object], message: str, tmp_path: Path) -> None:
    """The first difference is named, also inside the machine's facts; the file stays as it is."""
    path = tmp_path / "a.partial"
    write(path, [(KEYS[0], 1, 0.5)])
    data = path.read_bytes()
    with pytest.raises(InputError, match=message):
        Journal(path, {**HEADER, **header})
    assert path.read_bytes() == data


RUN = '{"table": ["copy", "x", "", "", ["bytes"]], "size": [1.0], "seconds": 1.0}'


@pytest.mark.parametrize(("line", "message"), [
    ("{", "a.partial:2: not a line of an interrupted calibration; delete the file to start anew"),
    ("[1]", "a.partial:2: not a line of an interrupted calibration"),
    ("{}", "a.partial:2: expected a run"),
    (RUN.replace("1.0}", "0.0}"), "a.partial:2: expected a run"),  # no time at all
    (RUN.replace("1.0}", "NaN}"), "a.partial:2: expected a run"),
    (RUN.replace("1.0}", "true}"), "a.partial:2: expected a run"),
    (RUN.replace("[1.0]", "[1.0, 2.0]"), "a.partial:2: expected a run"),  # more numbers than axes
    (RUN.replace('"copy"', "3"), "a.partial:2: expected a run"),
    (RUN.replace('["bytes"]', '"bytes"'), "a.partial:2: expected a run"),
    ('{"spent_s": -1}', "a.partial:2: expected a run"),
])
def test_a_damaged_line_is_named(line: str, message: str, tmp_path: Path) -> None:
    """File and line; the good lines around it do not hide it."""
    path = tmp_path / "a.partial"
    path.write_text(f"{json.dumps({'schema': SCHEMA, **HEADER})}\n{line}\n{RUN}\n")
    with pytest.raises(InputError, match=message):
        Journal(path, HEADER)


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    """Nothing is appended to it."""
    path = tmp_path / "a.partial"
    path.write_text('{"schema": "moesim.plan/1"}\n')
    with pytest.raises(InputError, match=r"a.partial:1: expected the header of an interrupted calibration .* found schema 'moesim.plan/1'"):
        Journal(path, HEADER)
    assert path.read_text() == '{"schema": "moesim.plan/1"}\n'
