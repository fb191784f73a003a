"""Arrivals: the type, its file, and the public request traces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from foreign_files import azure, burst_gpt, mooncake, serve_gen, vllm_bench
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moesim.errors import InputError
from moesim.traces.arrivals import Arrivals, arrivals_info, is_arrivals, read_arrivals, write_arrivals
from moesim.traces.importers import import_any


def example(**changes: Any) -> Arrivals:
    """Return three requests."""
    values: dict[str, Any] = {"arrival_s": [0.0, 0.5, 2.0], "prompt_tokens": [10, 20, 30], "output_tokens": [1, 2, 3]}
    return Arrivals(**(values | changes))


def imported(path: Path, **options: Any) -> Arrivals:
    """Import a request trace."""
    found = import_any(path, **options)
    assert isinstance(found, Arrivals)
    return found


@pytest.mark.parametrize(("changes", "words"), [
    ({"arrival_s": []}, "not empty"),
    ({"arrival_s": [0.0, np.nan, 1.0]}, "finite and not negative"),
    ({"arrival_s": [-1.0, 0.0, 1.0]}, "finite and not negative"),
    ({"arrival_s": [0.0, 2.0, 1.0]}, "request 2 arrives before request 1"),
    ({"prompt_tokens": [1, 2]}, "prompt_tokens must be 3 whole numbers"),
    ({"prompt_tokens": [1, 0, 2]}, "prompt_tokens of request 1 is 0, expected 1"),
    ({"output_tokens": [1, 2, 1 << 31]}, "output_tokens of request 2 is 2147483648"),
    ({"output_tokens": [1.0, 2.0, 3.0]}, "output_tokens must be 3 whole numbers"),
])
def test_what_is_no_arrivals(changes: dict[str, Any], words: str) -> None:
    """Each rule has its own message."""
    with pytest.raises(InputError) as error:
        example(**changes)
    assert words in str(error.value)


def test_the_summary_is_that_of_a_count_by_hand() -> None:
    """Rate and lengths; requests at one moment have no rate."""
    found = example().summary()
    assert (found["num_requests"], found["duration_s"], found["requests_per_s"]) == (3, 2.0, 1.0)
    assert (found["mean_prompt_tokens"], found["max_output_tokens"]) == (20.0, 3)
    assert found["gap_coefficient_of_variation"] == pytest.approx(0.5)
    assert example(arrival_s=[1.0] * 3).summary()["requests_per_s"] is None
    with pytest.raises(ValueError, match="read-only"):
        example().arrival_s[0] = 1


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.floats(0, 1e6), st.integers(1, 2**31 - 1), st.integers(1, 2**31 - 1)), min_size=1))
def test_files_keep_everything(tmp_path: Path, rows: list[tuple[float, int, int]]) -> None:
    """What is read is what was written, to the bit."""
    times, prompt, output = zip(*sorted(rows), strict=True)
    arrivals = Arrivals(times, prompt, output, "here", {"a": 1})  # type: ignore[arg-type]
    found = read_arrivals(write_arrivals(arrivals, tmp_path / "a.arrivals.parquet"))
    for name in ("arrival_s", "prompt_tokens", "output_tokens"):
        assert getattr(found, name).tobytes() == getattr(arrivals, name).tobytes()
    assert (found.source, found.metadata) == ("here", {"a": 1})
    assert arrivals_info(tmp_path / "a.arrivals.parquet")["num_rows"] == len(rows)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    """A file that was changed is found by its digest; another artefact is told by its schema."""
    import pyarrow.parquet as pq

    path = write_arrivals(example(), tmp_path / "a.arrivals.parquet")
    assert (is_arrivals(path), is_arrivals(tmp_path)) == (True, False)
    table = pq.read_table(path)
    pq.write_table(table.set_column(0, "arrival_s", [[0.0, 0.6, 2.0]]), path)
    with pytest.raises(InputError, match="do not match the header's digest"):
        read_arrivals(path)
    pq.write_table(table.set_column(0, "arrival_s", [[0.0, -1.0, 2.0]]), path)
    with pytest.raises(InputError, match="finite and not negative"):
        read_arrivals(path)
    pq.write_table(table.replace_schema_metadata({b"moesim": b'{"schema": "moesim.counts/1"}'}), path)
    for read in (read_arrivals, arrivals_info):
        with pytest.raises(InputError, match=r"expected a 'moesim\.arrivals/1' file"):
            read(path)


def test_azure_times_are_exact(tmp_path: Path) -> None:
    """Seven digits of a second survive; zones and the letter T are understood."""
    (tmp_path / "a.csv").write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,4808,10\n"
        "2023-11-16 18:17:04.0319601,3180,8\n2023-11-16T20:17:05+02:00,1,1\n")
    assert imported(tmp_path / "a.csv").arrival_s.tolist() == [0.0, 0.0520001, 1.02004]


def test_requests_are_sorted_and_empty_ones_left_out(tmp_path: Path) -> None:
    """Notes say what was done; the first request that is left is the zero of time."""
    rows = [(3000, 5, 5), (1000, 0, 5), (2000, 6, 6), (4000, 7, 0), (2000, 8, 8)]
    (tmp_path / "m.jsonl").write_text("\n".join(
        json.dumps({"timestamp": t, "input_length": i, "output_length": o}) for t, i, o in rows))
    found = imported(tmp_path / "m.jsonl")
    assert (found.arrival_s.tolist(), found.prompt_tokens.tolist()) == ([0.0, 0.0, 1.0], [6, 8, 5])
    assert found.metadata["first_arrival_s"] == 2.0
    assert found.metadata["notes"] == [
        "left out 2 requests without prompt or without output (failed or cancelled)",
        "sorted by time: the file is not in order of arrival"]


def test_burst_gpt_can_be_filtered(tmp_path: Path) -> None:
    """One model or one kind of log; a failed request is left out."""
    path = burst_gpt(tmp_path)
    path.write_text(path.read_text() + "99,GPT-4,7,8,15,API log\n")
    assert imported(path).num_requests == 5
    assert imported(path, only_model="GPT-4").prompt_tokens.tolist() == [7]
    assert imported(path, log_type="Conversation log").num_requests == 4
    with pytest.raises(InputError, match="no requests"):
        import_any(path, only_model="nobody")


@pytest.mark.parametrize(("make", "old", "new", "words"), [
    (mooncake, '"timestamp": 1000', '"timestamp": "x"', ":2: timestamp: expected a time in seconds, found 'x'"),
    (mooncake, '"input_length": 11', '"input_length": -1', ":2: input_length must be a whole number of tokens"),
    (mooncake, '"input_length": 11', '"other": 1', ":2: input_length must be a whole number of tokens"),
    (azure, "03.5000000,13", "03.5000000,1x3", ":5: ContextTokens must be a whole number"),
    (azure, "2023-11-16 18:17:01", "2023-13-16 18:17:01", ":3: TIMESTAMP: '2023-13-16 18:17:01.5000000' is not a date"),
    (azure, "2023-11-16 18:17:01", "9999-11-16 18:17:01", ":3: TIMESTAMP: expected a year from 1970"),
    (azure, "2023-11-16 18:17:01", "16.11.2023 18:17:01", ":3: TIMESTAMP: expected a time as 2023-11-16"),
    (burst_gpt, "8,ChatGPT", "inf,ChatGPT", ":6: Timestamp: expected a time in seconds, found inf"),
    (burst_gpt, "8,ChatGPT,13,", "8,ChatGPT,13,13,", ":6: expected 6 fields, found 7"),
    (serve_gen, "1,1.5,", "1,one,", ":3: timestamp: expected a time in seconds, found nan"),
    (vllm_bench, '"start_times"', '"begin_times"', "key 'start_times' is missing: save the result with --save-detailed"),
    (vllm_bench, "103.5\n", "103.5, 104.5\n", "have different lengths"),
    (vllm_bench, "102.5", "null", "start_times[2]: expected a time in seconds, found None"),
])
def test_bad_request_traces_are_named(make: Any, old: str, new: str, words: str, tmp_path: Path) -> None:
    """A bad line is named with its number and column."""
    path = make(tmp_path)
    text = path.read_bytes().decode()
    assert old in text
    path.write_bytes(text.replace(old, new, 1).encode())
    with pytest.raises(InputError) as error:
        import_any(path)
    assert words in str(error.value)


@pytest.mark.parametrize(("options", "words"), [
    ({"num_experts": 8}, "num_experts does not apply"), ({"phase": "decode"}, "phase does not apply"),
    ({"model_config": "mixtral-8x7b"}, "model_config does not apply"), ({"skip_rows": 1}, "do not apply")])
def test_options_of_routing_do_not_apply(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    """A request trace has no experts, phases or layers."""
    with pytest.raises(InputError, match=words):
        import_any(mooncake(tmp_path), **options)
