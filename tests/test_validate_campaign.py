"""A campaign of predictions and real runs: its statistics, what keeps calibration and judgement apart, and one small real round."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from moesim.errors import CheckError, InputError
from moesim.hardware.cost import CostModel
from moesim.hardware.profile import MeasuredTable
from moesim.scenario.schema import Point
from moesim.validate.campaign import OffloadCampaign, OffloadCase, check_apart, run_round
from moesim.validate.campaign_kernels import held_out_sizes, table_outcomes
from moesim.validate.campaign_probe import two_sided
from moesim.validate.campaign_report import (
    Outcome,
    Target,
    case_summaries,
    family_summaries,
    from_rows,
    order_of,
    target_lines,
    tau_b,
    to_rows,
)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=2, max_size=12))
def test_tau_is_scipys(pairs: list[tuple[int, int]]) -> None:
    """Kendall's tau-b, ties included; nothing where one side never changes."""
    predicted, measured = zip(*pairs, strict=True)
    expected = stats.kendalltau(predicted, measured).statistic
    found = tau_b(predicted, measured)
    assert math.isnan(expected) == math.isnan(found)
    assert math.isnan(expected) or found == pytest.approx(expected)


def outcomes(measured: dict[str, list[float]], predicted: dict[str, float]) -> list[Outcome]:
    """Rounds of cases of one family."""
    return [Outcome("f", name, number, predicted[name], value, {"expert": predicted[name] - value})
            for name, values in measured.items() for number, value in enumerate(values)]


def test_errors_wander_and_order_by_hand() -> None:
    """Two cases over three rounds: medians, percentiles, spread, and a pair that the measurement decides."""
    found = outcomes({"a": [1.0, 1.1, 1.2], "b": [2.0, 2.0, 2.0]}, {"a": 1.1, "b": 2.2})
    cases = {case.case: case for case in case_summaries(found)}
    assert cases["a"].error == 0 and cases["b"].error == pytest.approx(0.1)  # noqa: PT018
    assert cases["a"].spread_s == pytest.approx(0.2)
    family, = family_summaries(found)
    errors = [0.1, 0.0, abs(1.1 / 1.2 - 1), 0.1, 0.1, 0.1]
    assert family.median == pytest.approx(np.median(errors))
    assert family.p95 == pytest.approx(np.percentile(errors, 95))
    assert order_of(list(cases.values())).tau_decided == 1.0
    worst = [case.case for case in case_summaries(found)]
    assert worst == ["b", "a"]


def test_a_target_gives_way_to_the_machines_wander_only() -> None:
    """An error above its target is missed on a steady machine, and forgiven where the same runs differ by more."""
    steady = outcomes({"a": [1.0, 1.0, 1.0]}, {"a": 1.05})
    shaky = outcomes({"a": [1.0, 1.2, 0.8]}, {"a": 1.05})
    met = [target_lines(family_summaries(rows)[0], Target(0.02))[0].met for rows in (steady, shaky)]
    assert met == [False, True]


def test_rows_survive_being_written() -> None:
    """What was kept is read back; anything else is refused."""
    found = outcomes({"a": [1.0, 2.0]}, {"a": 1.5})
    assert from_rows(to_rows(found), "x") == found
    with pytest.raises(InputError, match="expected outcomes"):
        from_rows([{"family": "f"}], "x")
    with pytest.raises(InputError, match="positive and finite"):
        Outcome("f", "a", 0, 1.0, 0.0)


def test_what_is_judged_may_not_be_calibrated_on() -> None:
    """A request or a size on both sides ends the campaign with its name."""
    check_apart(judged={"x": "request 1"}, calibrated={"y": "request 2"}, what="requests")
    with pytest.raises(CheckError, match="requests are judged and calibrated on: request 1"):
        check_apart(judged={"x": "request 1"}, calibrated={"x": "request 9"}, what="requests")
    table = MeasuredTable("copy", "dram", "", "", ("bytes",), ((1.0,), (2.0,), (3.0,)), (1e-3, 2e-3, 3e-3))
    with pytest.raises(CheckError, match="sizes are judged"):
        table_outcomes(table, table, [(2.0,)], "f", 0)


def test_held_out_sizes_leave_the_ends_and_every_row() -> None:
    """Every second size, never the first or last of all, and no row or column whole."""
    sizes = [tuple(map(float, pair)) for pair in itertools.product((1, 2, 4, 8), (1, 2, 4))]
    held = held_out_sizes(sizes)
    assert sizes[0] not in held
    assert sizes[-1] not in held
    for axis, value in itertools.product((0, 1), (1.0, 2.0, 4.0)):
        line = [size for size in sizes if size[axis] == value]
        assert 0 < len(held & set(line)) < len(line)


def test_predictions_from_a_table_are_its_interpolation() -> None:
    """Fitted on a line, the held-out sizes of another line are off by its slope; those beyond the fit are left out."""
    fitted = MeasuredTable("copy", "dram", "", "", ("bytes",), ((1.0,), (3.0,)), (1e-3, 3e-3))
    judged = MeasuredTable("copy", "dram", "", "", ("bytes",), ((2.0,), (9.0,)), (4e-3, 9e-3))
    found = table_outcomes(fitted, judged, [(2.0,), (9.0,)], "f", 0)
    assert [(one.case, one.error) for one in found] == [("bytes 2", pytest.approx(-0.5))]


def small_campaign() -> OffloadCampaign:
    """Three cases of the tiny model of the validation tests."""
    pytest.importorskip("torch")
    from test_validate import small_case, world_of

    from moesim.validate.offload import OffloadValidation

    offload = small_case(steps=8)
    machine = two_sided(offload.machine)
    offload = dataclasses.replace(offload, machine=machine)
    other = dataclasses.replace(offload, test=offload.train, train=offload.test, steps=offload_steps(offload))
    points = {"load": Point("lru", 2), "cpu": Point("lru", 2, miss="cpu"), "all": Point("lru", 6)}
    cases = tuple(OffloadCase(name, "tiny", "cpu" if name == "cpu" else "plain", lambda cost, p=point: offload.program(p, cost))
                  for name, point in points.items())
    dry = {"plain": lambda cost: other.program(points["load"], cost), "cpu": lambda cost: other.program(points["cpu"], cost)}
    shared = OffloadValidation(
        offload.model, offload.test, offload.steps, machine, world_of(offload, 12), cases[0].build, dry["plain"], "cpu", 12,
        tuple(offload.program(points["load"], CostModel(machine.hardware)).transfers.chunk_bytes), with_cpu=True)
    return OffloadCampaign(shared, cases, dry, other.test, other.steps)


def offload_steps(offload: object) -> list:
    """Steps of the training requests."""
    from moesim.traces.steps import closed_loop_steps

    return closed_loop_steps(offload.train, batch_size=1, max_steps=8, include_prefill=False, repeat=True)  # type: ignore[attr-defined]


def test_a_real_round_is_predicted_within_a_wide_band() -> None:
    """Every case is run once and predicted; tasks here take microseconds, so that only an explosion is an error."""
    campaign = small_campaign()
    found = run_round(campaign, 0, probe_rounds=4, seed=1)
    assert sorted(one.case for one in found) == ["all", "cpu", "load"]
    assert all(1 / 20 < one.predicted_s / one.measured_s < 20 for one in found)
    assert all(sum(one.kinds.values()) == pytest.approx(one.predicted_s - one.measured_s) for one in found)
    with pytest.raises(CheckError, match="requests are judged"):
        dataclasses.replace(campaign, dry_trace=campaign.shared.trace, dry_steps=campaign.shared.steps)
    with pytest.raises(InputError, match="mechanism"):
        dataclasses.replace(campaign, dry={"plain": campaign.dry["plain"]})
