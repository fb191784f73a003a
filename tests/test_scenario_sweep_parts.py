"""The parts of a sweep: axes from text, the folder that resumes, the picture."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from moesim.errors import InputError
from moesim.hardware.load import load_hardware
from moesim.report.plots import png_bytes
from moesim.report.sweep import MAX_LINES, sweep_figure
from moesim.scenario.load import load_scenario
from moesim.scenario.schema import OffloadStudy
from moesim.scenario.sweep_axes import Axis, check_axes, machine_values, parse_axis, swept_points
from moesim.scenario.sweep_store import open_sweep, read_sweep


def test_axes_from_text() -> None:
    """Lists keep their order and types; ranges have exact ends, equal steps or equal ratios."""
    assert parse_axis("policy=lru, static") == Axis("policy", ("lru", "static"))
    assert parse_axis("slots_per_layer=8,16").values == (8, 16)
    assert parse_axis("x=lin(1, 3, 5)").values == (1.0, 1.5, 2.0, 2.5, 3.0)
    values = parse_axis("pcie.bytes_per_s=log(8e9,64e9,4)").values
    assert np.allclose(np.array(values, float), [8e9, 16e9, 32e9, 64e9], rtol=1e-12)


@pytest.mark.parametrize(("text", "message"), [
    ("pcie", "expected KEY=VALUE"), ("=1", "expected KEY=VALUE"), ("a=", "expected KEY=VALUE"),
    ("a=1,1", "named twice"), ("a=1,,2", "empty"), ("a=log(0,1,3)", "positive numbers"),
    ("a=lin(1,2,1)", "count of at least 2"), ("a=lin(x,2,3)", "two numbers"),
])
def test_axes_that_are_none(text: str, message: str) -> None:
    """A wrong axis is named as it was written."""
    with pytest.raises(InputError, match=message):
        parse_axis(text)


@pytest.mark.parametrize(("axes", "points", "measured", "message"), [
    (("pcie.bytes_per_sec",), True, False, "--vary pcie.bytes_per_sec: neither.*pcie.bytes_per_s"),
    (("policy",), False, False, "--vary policy: neither"),
    (("pcie.bytes_per_s", "pcie.bytes_per_s"), True, False, "given twice"),
    (("pcie.bytes_per_s",), True, True, "profile has measured times"),
])
def test_axes_that_do_not_fit(axes: tuple[str, ...], points: bool, measured: bool, message: str) -> None:
    """Keys are checked against the machine and the study before anything runs."""
    with pytest.raises(InputError, match=message):
        check_axes([Axis(key, (1.0, 2.0)) for key in axes], load_hardware("rtx-4090"), points=points, measured=measured)


def test_machine_numbers_must_be_numbers() -> None:
    """A word where a rate belongs is refused."""
    with pytest.raises(InputError, match=r"--vary pcie.bytes_per_s: expected numbers, got 'fast'"):
        check_axes([Axis("pcie.bytes_per_s", ("fast",))], load_hardware("rtx-4090"), points=True, measured=False)


def test_point_keys_replace_the_studys_own(folder: Path) -> None:
    """Points are the study's with the axis's values; each once; a value that no point takes is refused by its key."""
    study = load_scenario(folder / "tiny.yaml").study("one-gpu")
    assert isinstance(study, OffloadStudy)
    points = swept_points(study, [Axis("slots_per_layer", (3, 5)), Axis("pcie.bytes_per_s", (1e9,))])
    assert [(point.policy, point.slots_per_layer) for point in points] == [
        ("lru", 3), ("lru", 5), ("static", 3), ("static", 5)]
    assert swept_points(study, []) == study.expand()
    with pytest.raises(InputError, match=r"--vary policy: .*'lruu'"):
        swept_points(study, [Axis("policy", ("lruu",))])
    with pytest.raises(InputError, match="--vary slots_per_layer: "):
        swept_points(study, [Axis("slots_per_layer", (0,))])


def test_machines_are_every_combination() -> None:
    """The last machine axis changes fastest; point axes take no part."""
    axes = [Axis("a.b", (1.0, 2.0)), Axis("policy", ("lru",)), Axis("c.d", (3.0, 4.0))]
    assert machine_values(axes) == [{"a.b": a, "c.d": c} for a in (1.0, 2.0) for c in (3.0, 4.0)]
    assert machine_values([]) == [{}]


def test_a_folder_fills_part_by_part_and_resumes(tmp_path: Path) -> None:
    """What is there stays; a sweep that lacks parts cannot be read; the rows come back in order."""
    folder = open_sweep(tmp_path / "x.sweep", {"axes": {"a": [1]}}, 3)
    folder.write(1, pd.DataFrame({"a": [2]}))
    again = open_sweep(tmp_path / "x.sweep", {"axes": {"a": [1]}}, 3)
    assert again.missing() == [0, 2]
    with pytest.raises(InputError, match="2 of 3 parts are missing"):
        read_sweep(tmp_path / "x.sweep")
    again.write(0, pd.DataFrame({"a": [1]}))
    again.write(2, pd.DataFrame({"a": [3]}))
    assert read_sweep(tmp_path / "x.sweep")["a"].tolist() == [1, 2, 3]


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    """Another sweep, a folder with files, and a broken part are named, not overwritten."""
    open_sweep(tmp_path / "x.sweep", {"axes": {"a": [1]}}, 1)
    with pytest.raises(InputError, match="holds another sweep"):
        open_sweep(tmp_path / "x.sweep", {"axes": {"a": [2]}}, 1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="is no sweep; it is left as it is"):
        open_sweep(tmp_path / "mine", {}, 1)
    folder = open_sweep(tmp_path / "x.sweep", {"axes": {"a": [1]}}, 1)
    folder.part(0).write_bytes(b"PAR1 not really")
    with pytest.raises(InputError, match=r"part-000000.parquet: not a Parquet table"):
        read_sweep(tmp_path / "x.sweep")


def rows_of(num_lines: int) -> pd.DataFrame:
    """A sweep over a rate; line i is i + 1 times as fast."""
    rates = [8e9, 16e9, 64e9]
    return pd.DataFrame([{"pcie.bytes_per_s": rate, "policy": "lru", "slots_per_layer": line,
                          "tokens_per_s": (line + 1) * math.log(rate)} for line in range(num_lines) for rate in rates])


def test_the_picture_draws_the_best_lines() -> None:
    """A line per choice, labelled by what differs, fastest first, on a log axis where the values span a decade."""
    axes = [("pcie.bytes_per_s", (8e9, 16e9, 64e9))]
    axis = sweep_figure(rows_of(3), axes).axes[0]
    assert [line.get_label() for line in axis.lines] == [f"slots per layer {n}" for n in (2, 1, 0)]
    assert axis.lines[0].get_ydata().tolist() == [3 * math.log(rate) for rate in (8e9, 16e9, 64e9)]
    assert axis.get_xscale() == "log"
    many = sweep_figure(rows_of(MAX_LINES + 5), axes)
    assert len(many.axes[0].lines) == MAX_LINES
    assert f"best {MAX_LINES} of {MAX_LINES + 5}" in many.axes[0].get_title(loc="left")
    assert png_bytes(many).startswith(b"\x89PNG")


def test_no_picture_without_an_axis_of_numbers() -> None:
    """Only names were varied: there is no x axis."""
    with pytest.raises(InputError, match="no axis of at least two numbers"):
        sweep_figure(rows_of(1), [("policy", ("lru", "lfu")), ("pcie.bytes_per_s", (8e9,))])
