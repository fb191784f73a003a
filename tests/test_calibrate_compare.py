"""Two profiles side by side: ratios, crossings, what one lacks; and one shape predicted from another."""

from __future__ import annotations

import dataclasses
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
from command_line import call, call_json
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from moesim.calibrate.compare import TableComparison, compare_profiles
from moesim.calibrate.transfer import expert_table, transfer_error
from moesim.cli import app
from moesim.errors import InputError
from moesim.hardware.cost import GROUPED_AXES, CostModel
from moesim.hardware.load import load_hardware
from moesim.hardware.profile import CalibrationProfile, MeasuredTable
from moesim.lowering.work import experts_work
from moesim.model.spec import AttentionSpec, ModelSpec
from moesim.report.calibration import comparison_figure

COST = CostModel(load_hardware("h100-sxm"))
GPU0 = "node0.gpu0"
WHOLE = st.integers(1, 40)


def line(times: dict[float, float], op: str = "copy", shape: str = "s") -> MeasuredTable:
    """Return a table over bytes."""
    return MeasuredTable(op, "gpu", shape, "bf16", ("bytes",), tuple((size,) for size in times), tuple(times.values()))


def grouped(times: dict[tuple[int, int, int], float]) -> MeasuredTable:
    """Return an expert table."""
    ordered = sorted(times)
    return MeasuredTable("grouped_ffn", "gpu", "s", "bf16", GROUPED_AXES, tuple(tuple(map(float, size)) for size in ordered),
                         tuple(times[size] for size in ordered))


def profile(*tables: MeasuredTable, name: str = "p") -> CalibrationProfile:
    """Return a profile of these tables."""
    return CalibrationProfile(name, tables, {"source": "test"})


def compared(a: MeasuredTable, b: MeasuredTable) -> TableComparison:
    """Compare two tables of one name."""
    (found,) = compare_profiles(profile(a), profile(b)).tables
    return found


# ---------------------------------------------------------------- one table


def test_a_comparison_golden() -> None:
    """Common sizes by themselves, a size of one within the other's range looked up, beyond it only counted."""
    found = compared(line({1: 1.0, 2: 2.0, 4: 4.0}), line({1: 2.0, 3: 2.0, 4: 2.0, 9: 5.0}))
    assert [(pair.size, pair.seconds_a, pair.seconds_b, pair.measured) for pair in found.pairs] == [
        ((1,), 1.0, 2.0, True), ((2,), 2.0, 2.0, False), ((3,), 3.0, 2.0, False), ((4,), 4.0, 2.0, True)]
    assert (found.only_a, found.only_b) == ((), ((9,),))
    assert (found.num_measured, found.ratios) == (2, (0.5, 1.25, 2.0))


def test_a_crossing_is_where_the_difference_is_zero() -> None:
    """a is ahead by 1 at 10 and behind by 3 at 50: straight between them, even at 20."""
    (crossing,) = compared(line({10: 1.0, 50: 5.0}), line({10: 2.0, 50: 2.0})).crossings
    assert (crossing.axis, crossing.low, crossing.high, crossing.at, crossing.faster_below) == ("bytes", 10, 50, 20, "a")


def test_equal_times_belong_to_neither_side() -> None:
    """A touch is no crossing; through an equal size it is one."""
    touch = compared(line({1: 1.0, 2: 2.0, 3: 3.0}), line({1: 2.0, 2: 2.0, 3: 4.0}))
    assert touch.crossings == ()
    (through,) = compared(line({1: 1.0, 2: 2.0, 3: 3.0}), line({1: 2.0, 2: 2.0, 3: 2.0})).crossings
    assert (through.low, through.high, through.at) == (1, 3, 2)


def test_crossings_of_several_axes_change_one_at_a_time() -> None:
    """Along the groups at fixed tokens and largest group; sizes that differ in two axes are not neighbours."""
    a = grouped({(8, 2, 4): 1.0, (8, 4, 4): 3.0, (16, 4, 9): 1.0})
    b = grouped({(8, 2, 4): 2.0, (8, 4, 4): 2.0, (16, 4, 9): 2.0})
    (crossing,) = compared(a, b).crossings
    assert (crossing.axis, crossing.size, crossing.low, crossing.high, crossing.at) == ("groups", (8, 2, 4), 2, 4, 3)


@given(st.dictionaries(WHOLE, WHOLE, min_size=1, max_size=8), st.dictionaries(WHOLE, WHOLE, min_size=1, max_size=8))
def test_no_size_is_lost_and_sides_are_alike(first: dict[int, int], second: dict[int, int]) -> None:
    """Every size of both is paired or counted; swapped, the ratio is the reciprocal and the crossings stay."""
    a, b = (line({size: float(times[size]) for size in sorted(times)}) for times in (first, second))
    found, swapped = compared(a, b), compared(b, a)
    looked_up = len(found.pairs) - found.num_measured
    assert 2 * found.num_measured + looked_up + len(found.only_a) + len(found.only_b) == len(first) + len(second)
    assert {pair.size[0] for pair in found.pairs if pair.measured} == set(first) & set(second)
    assert [pair.ratio for pair in swapped.pairs] == pytest.approx([1 / pair.ratio for pair in found.pairs])
    assert [(one.low, one.high) for one in swapped.crossings] == [(one.low, one.high) for one in found.crossings]
    assert all(one.faster_below != other.faster_below for one, other in zip(found.crossings, swapped.crossings, strict=True))
    assert all(one.low <= one.at <= one.high for one in found.crossings)
    signs = [pair.ratio > 1 for pair in found.pairs if pair.ratio != 1]
    assert len(found.crossings) == sum(x != y for x, y in pairwise(signs))


@given(st.dictionaries(WHOLE, WHOLE, min_size=1, max_size=8), st.sampled_from([0.25, 0.5, 2.0, 8.0]))
def test_a_profile_that_is_slower_throughout(times: dict[int, int], factor: float) -> None:
    """Times multiplied by a factor: that ratio at every size, no crossing."""
    a = line({size: float(times[size]) for size in sorted(times)})
    found = compared(a, dataclasses.replace(a, seconds=tuple(factor * value for value in a.seconds)))
    assert found.ratios == (factor, factor, factor)
    assert found.crossings == ()


# ---------------------------------------------------------------- whole profiles


def test_tables_that_only_one_has_are_named() -> None:
    """By operation, device, shape, dtype and axes; sizes that do not meet make a table without a ratio."""
    a = profile(line({1: 1.0}), line({1: 1.0}, "router"), line({1: 1.0}, shape="wide"))
    b = profile(line({5: 1.0}), line({1: 1.0}, "head"))
    found = compare_profiles(a, b)
    assert [key[0] for key in found.only_a] == ["router", "copy"]
    assert found.only_b == (("head", "gpu", "s", "bf16", ("bytes",)),)
    (shared,) = found.tables
    assert (shared.ratios, shared.only_a, shared.only_b) == (None, ((1,),), ((5,),))
    with pytest.raises(InputError, match="no size that both know, so nothing to draw"):
        comparison_figure(found)


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    """Two profiles on disk."""
    a = profile(line({1: 1.0, 4: 4.0}), grouped({(8, 2, 4): 1.0, (8, 4, 4): 3.0}), line({1: 1.0}, "head"), name="first")
    b = profile(line({1: 2.0, 4: 2.0}), grouped({(8, 2, 4): 2.0, (8, 4, 4): 3.0}), name="second")
    return tuple(str(one.write(tmp_path / f"{one.name}.profile.json")) for one in (a, b))  # type: ignore[return-value]


def test_the_compare_verb(files: tuple[str, str], tmp_path: Path) -> None:
    """A table for people, all pairs for programs, a figure on demand."""
    text = call("calibrate", "compare", *files)
    assert "b = second over a = first" in text
    assert "only a: head gpu s bf16" in text
    facts = call_json("calibrate", "compare", *files, "--figure", str(tmp_path / "x.png"))
    copies = next(row for row in facts["tables"] if row["op"] == "copy")
    assert (copies["ratios"], copies["num_measured"]) == ([0.5, 1.25, 2.0], 2)
    assert copies["crossings"][0]["at"] == 2
    assert facts["only_a"] == [["head", "gpu", "s", "bf16", ["bytes"]]]
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_one_operation_can_be_chosen(files: tuple[str, str]) -> None:
    """--op keeps one; a name that neither has is an error with a suggestion."""
    facts = call_json("calibrate", "compare", *files, "--op", "copy")
    assert ([row["op"] for row in facts["tables"]], facts["only_a"]) == (["copy"], [])
    done = CliRunner().invoke(app, ["calibrate", "compare", *files, "--op", "copi"])
    assert (done.exit_code, "unknown operation of profile 'first' 'copi'. Did you mean 'copy'" in done.stderr) == (2, True)


def test_the_figure_is_the_same_every_time(files: tuple[str, str]) -> None:
    """Equal comparisons give equal bytes."""
    a, b = (profile(line({1: 1.0, 4: 4.0})), profile(line({1: 2.0, 4: 2.0})))
    assert comparison_figure(compare_profiles(a, b)) == comparison_figure(compare_profiles(a, b))


# ---------------------------------------------------------------- one shape from another


def small(width: int) -> ModelSpec:
    """Return a model with experts of this width."""
    return ModelSpec("m", 2, (0, 1), 8, 2, 1024, width, AttentionSpec(4, 2, 16), 32)


SIZES = ((2, 2, 1), (16, 8, 2), (64, 8, 8))


def nameplate(model: ModelSpec, factor: float = 1.0) -> MeasuredTable:
    """Return a table of the nameplate's own times, times a factor."""
    return grouped({size: factor * COST.grouped_ffn(GPU0, experts_work(model, *size)).seconds for size in SIZES})


def test_a_machine_that_is_slower_by_a_factor_everywhere_is_predicted() -> None:
    """Three times the nameplate for both shapes: no error, while the nameplate alone is off by two thirds."""
    narrow, wide = small(4096), small(8192)
    error = transfer_error(nameplate(narrow, 3.0), partial(experts_work, narrow), nameplate(wide, 3.0),
                           partial(experts_work, wide), COST, GPU0)
    assert (error.median, error.largest) == pytest.approx((0, 0), abs=1e-12)
    assert error.inside == pytest.approx((0, 0), abs=1e-12)
    assert (error.num_sizes, error.num_inside, error.nameplate_median) == (3, 3, pytest.approx(2 / 3))


def test_an_error_of_the_held_out_shape_is_found() -> None:
    """The same shape at 1.25 of its time: predicted 20 % too low at every size."""
    model = small(4096)
    error = transfer_error(nameplate(model), partial(experts_work, model), nameplate(model, 1.25),
                           partial(experts_work, model), COST, GPU0)
    assert (error.median, error.largest) == pytest.approx((0.2, 0.2))


def test_sizes_beyond_the_known_ones_are_counted_apart() -> None:
    """A held-out size larger than any known one is not within the range."""
    model = small(4096)
    known = grouped(dict.fromkeys(SIZES[:2], 1.0))
    error = transfer_error(known, partial(experts_work, model), nameplate(model), partial(experts_work, model), COST, GPU0)
    assert (error.num_sizes, error.num_inside) == (3, 2)


def test_what_cannot_be_held_out_is_refused() -> None:
    """Other axes, a cost model that has a profile, a profile without one expert table."""
    model = small(4096)
    work = partial(experts_work, model)
    with pytest.raises(InputError, match="needs two tables over tokens, groups and largest group"):
        transfer_error(line({1: 1.0}), work, nameplate(model), work, COST, GPU0)
    with pytest.raises(InputError, match="and the nameplate alone"):
        transfer_error(nameplate(model), work, nameplate(model), work, CostModel(COST.hardware, profile()), GPU0)
    with pytest.raises(InputError, match="'p' has 0 tables of grouped_ffn, expected one"):
        expert_table(profile(line({1: 1.0})))
