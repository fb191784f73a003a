"""Expert parallelism run for real: right results over real ranks, honest timelines, failures that end the run."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import multiprocessing
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import rank_bodies
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import CheckError, InputError
from moesim.export.perfetto import timeline
from moesim.hardware.cost import CostModel
from moesim.hardware.profile import CalibrationProfile
from moesim.lowering.batch import home_ranks
from moesim.lowering.expert_parallel import ExpertParallelProgram
from moesim.model.spec import AttentionSpec, ModelSpec
from moesim.placement.place import place, problem_from_trace
from moesim.placement.plan import PlacementPlan
from moesim.simulate.result import SimulationResult
from moesim.simulate.simpy_executor import run_simpy
from moesim.traces.split import split_requests
from moesim.traces.steps import Step, closed_loop_steps
from moesim.traces.synth import synthetic_trace
from moesim.traces.trace import RoutingTrace
from moesim.validate import ranks_case, ranks_validate
from moesim.validate.ranks_case import RanksCase, RanksSettings, resolve
from moesim.validate.ranks_fit import busiest_fit, fit_phase, rising_fit
from moesim.validate.ranks_launch import STARTED, _watch, run_ranks
from moesim.validate.ranks_predict import joined, phase_samples, ranks_costs, ranks_machine
from moesim.validate.ranks_reference import check_outputs, reference_outputs
from moesim.validate.ranks_report import decided_pairs, kendall_tau, plan_report, ranks_report
from moesim.validate.ranks_run import LAYER_PHASES, Job, JobRun
from moesim.validate.ranks_schedule import calibration_placements, check_disjoint, random_placement
from moesim.validate.ranks_table import lay_out, measured_tasks
from moesim.validate.ranks_turn import run_jobs_in_turn
from moesim.validate.ranks_validate import RanksRun, validate_ranks
from moesim.validate.ranks_work import step_works
from moesim.validate.ranks_world import RankWeights, RankWorld, WeightsConfig, payload_bytes

torch = pytest.importorskip("torch")

LAYERS, EXPERTS, TOP_K = 2, 8, 3
CONFIG = WeightsConfig("float32", 64, 5)
FAST = RanksSettings(repeats=2, tries=1, timeout_s=60.0)
MODEL = ModelSpec("tiny", LAYERS, tuple(range(LAYERS)), EXPERTS, TOP_K, 16, 24, AttentionSpec(2, 1, 8), 32, weight_bytes=4.0,
                  other_weight_bytes=4.0, activation_bytes=4.0)


def tiny_trace() -> RoutingTrace:
    """A few requests; some tokens use fewer experts than others."""
    trace = synthetic_trace(240, LAYERS, EXPERTS, TOP_K, 16, seed=2)
    ids = trace.expert_ids.copy()
    ids[::5, 0, -1] = -1
    ids[::7, 1, 1:] = -1
    return dataclasses.replace(trace, expert_ids=ids, gate_weights=None)


@functools.cache
def plans_of(num_ranks: int) -> dict[str, PlacementPlan]:
    """The kinds of plan that matter: one home each, copies, copies on one rank, unequal shares."""
    trace, found = split_requests(tiny_trace(), 0.5, 1)[0], {}
    for name, solver, extra in (("contiguous", "contiguous", 0), ("lpt", "lpt", 0), ("affinity", "affinity", 0), ("eplb", "eplb", 4)):
        problem = problem_from_trace(trace, num_ranks=num_ranks, ranks_per_node=num_ranks, redundant_experts=extra)
        found[name] = place(problem, solver, seed=1, time_limit_s=0.1).plan
    found["random"] = random_placement(np.random.default_rng(99), LAYERS, EXPERTS, num_ranks, EXPERTS)
    copies = random_placement(np.random.default_rng(98), LAYERS, EXPERTS, num_ranks, EXPERTS + 4)
    share = copies.share * (1.0 + np.arange(copies.num_slots))
    total = np.zeros((LAYERS, EXPERTS))
    np.add.at(total, (np.arange(LAYERS)[:, None], copies.physical_to_logical), share)
    share /= np.take_along_axis(total, copies.physical_to_logical.astype(np.int64), axis=1)
    found["shares"] = dataclasses.replace(copies, slot_share=share)
    return found


def steps_of(trace: RoutingTrace, max_steps: int = 3) -> list[Step]:
    """Prefill and decode steps."""
    return closed_loop_steps(trace, batch_size=4, max_steps=max_steps, max_prefill_tokens=40, seed=1)


def tiny_case(num_ranks: int = 2, *names: str) -> RanksCase:
    """A whole case; judged and calibrated on different requests."""
    train, test = split_requests(tiny_trace(), 0.5, 1)
    plans = {name: plan for name, plan in plans_of(num_ranks).items() if not names or name in names}
    return RanksCase(MODEL, test, steps_of(test), train, steps_of(train, 8), plans)


def in_turn(case: RanksCase) -> dict[str, JobRun]:
    """Every plan of a case, rank after rank in this process."""
    jobs = [Job(plan.physical_to_logical, tuple(step_works(case.trace, plan, case.steps))) for plan in case.plans.values()]
    machine = ranks_machine(case.num_ranks, "cpu", 1e-5, 1e9)
    return dict(zip(case.plans, run_jobs_in_turn(MODEL, CONFIG, jobs, machine), strict=True))


def references(case: RanksCase) -> list[np.ndarray]:
    """What one process computes, by step."""
    found = reference_outputs(RankWeights(MODEL, CONFIG), case.trace, case.steps, home_ranks(case.trace, case.num_ranks))
    return [rows.numpy() for rows in found]


# ---------------------------------------------------------------- results


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_every_plan_computes_what_one_process_computes(num_ranks: int) -> None:
    """Contiguous, balanced, affine, random, replicated and unequally shared plans give every token its one result."""
    case = tiny_case(num_ranks)
    expected = references(case)
    for name, run in in_turn(case).items():
        works = step_works(case.trace, case.plans[name], case.steps)
        run.check_traffic(works)
        for step, (work, parts) in enumerate(zip(works, run.outputs, strict=True)):
            for rank, found in enumerate(parts):
                check_outputs(expected[step][work.home == rank], found, "float32", f"{name}, step {step}, rank {rank}")


def test_the_reference_is_the_model_token_by_token() -> None:
    """Without its batches: one token and one expert at a time, in double precision, straight from the definition."""
    case = tiny_case(2, "lpt")
    weights = RankWeights(MODEL, CONFIG)
    step, rows = case.steps[-1], references(case)[-1]
    home = home_ranks(case.trace, 2)[step.rows]

    def norm(x: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-5)

    hidden = weights.embedding.numpy()[step.rows % 8191].astype(np.float64)
    for layer in range(LAYERS):
        after = hidden.copy()
        for rank in range(2):
            own = np.flatnonzero(home == rank)
            context = int((case.trace.position[step.rows[own]] + 1).sum())
            seen = torch.from_numpy(norm(hidden[own]).astype(np.float32))
            after[own] += weights.attention[layer].forward(seen, context).detach().numpy()
        hidden = after.copy()
        for token in range(len(hidden)):
            x = norm(after[token])
            scores = weights.routers[layer].numpy().astype(np.float64) @ x
            gates = np.sort(np.exp(scores) / np.exp(scores).sum())[::-1][:TOP_K]
            for gate, expert in zip(gates, case.trace.expert_ids[step.rows[token], layer].tolist(), strict=True):
                if expert >= 0:
                    blob = weights.expert(layer, expert).numpy().astype(np.float64)
                    gate_up, down = blob[: 2 * 24 * 16].reshape(2, 24, 16), blob[2 * 24 * 16 :].reshape(16, 24)
                    inner = gate_up[0] @ x
                    hidden[token] += gate * (down @ (inner / (1 + np.exp(-inner)) * (gate_up[1] @ x)))
    np.testing.assert_allclose(rows, hidden, rtol=1e-4, atol=1e-4)


def test_a_wrong_expert_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """One slot with another expert's weights changes some tokens by more than the tolerance."""
    case = tiny_case(2, "lpt")
    good = RankWorld.hold

    def swapped(self: RankWorld, slots: np.ndarray) -> None:
        wrong = slots.copy()
        wrong[1, [0, 1]] = wrong[1, [1, 0]]
        good(self, wrong)

    monkeypatch.setattr(RankWorld, "hold", swapped)
    work = step_works(case.trace, case.plans["lpt"], case.steps)[0]
    expected, found = references(case)[0], in_turn(case)["lpt"].outputs[0]
    with pytest.raises(CheckError, match=r"rank 0: \d+ of \d+ tokens differ from the single process"):
        check_outputs(expected[work.home == 0], found[0], "float32", "rank 0")


def test_wrong_traffic_is_found() -> None:
    """A token sent to another rank than the plan says is an error that names step, layer and ranks."""
    case = tiny_case(2, "lpt")
    works = step_works(case.trace, case.plans["lpt"], case.steps)
    run = in_turn(case)["lpt"]
    run.received[1, 0, 0, 1] += 1
    sent = int(works[1].traffic[0].sent[0, 1])
    with pytest.raises(CheckError, match=rf"step 1, layer 0: rank 0 sent {sent + 1} tokens to rank 1, the plan says {sent}"):
        run.check_traffic(works)


def test_outputs_of_another_shape_are_refused() -> None:
    """A lost token is not compared away."""
    with pytest.raises(CheckError, match="shape"):
        check_outputs(np.zeros((3, 2)), np.zeros((2, 2)), "float32", "here")


def test_a_rank_makes_only_its_own_experts() -> None:
    """Weights follow from (seed, layer, expert), whoever makes them, and no rank makes another's."""
    plan = plans_of(2)["contiguous"]
    banks = []
    for rank in range(2):
        world = RankWorld(RankWeights(MODEL, CONFIG), rank, 2)
        world.hold(plan.physical_to_logical)
        banks.append(world.weights._bank)
    assert sorted(banks[0]) == [(layer, expert) for layer in range(2) for expert in range(4)]
    assert not set(banks[0]) & set(banks[1])
    other = RankWeights(MODEL, CONFIG)
    assert all(torch.equal(weights, other.expert(*key)) for key, weights in (banks[0] | banks[1]).items())


# ---------------------------------------------------------------- what is sent, and when


def test_works_are_what_the_lowering_counts() -> None:
    """Tokens of every task of the lowered program, from the works alone."""
    case = tiny_case(4)
    for plan in case.plans.values():
        works = step_works(case.trace, plan, case.steps)
        program = ExpertParallelProgram(MODEL, case.trace, case.steps, plan, CostModel(ranks_machine(4, "cpu", 1e-5, 1e9)))
        tasks = run_simpy(program)
        for kind, rank, step, layer, tokens in tasks[["kind", "rank", "step", "layer", "tokens"]].itertuples(index=False):
            work = works[step]
            if kind in ("attention", "router"):
                assert tokens == work.tokens[rank]
            elif kind == "head":
                assert tokens == work.heads[rank]
            elif kind == "experts":
                assert tokens == work.expert_loads(layer)[rank, 0]
            elif kind in ("dispatch", "combine"):
                assert tokens == work.traffic[layer].sent.sum()
        assert sum(work.tokens.sum() for work in works) == sum(len(step.rows) for step in case.steps)


def marks_of(tasks: pd.DataFrame, num_ranks: int, steps: list[Step]) -> np.ndarray:
    """The marks that ranks would make in a simulated run: who has no task in a phase is done with it at once."""
    rows = {(kind, rank, step, layer): end for kind, rank, step, layer, end
            in tasks[["kind", "rank", "step", "layer", "end_ns"]].itertuples(index=False)}
    marks = np.zeros((num_ranks, len(steps), 2 + LAYERS * len(LAYER_PHASES)), np.int64)
    started = 0
    for place_, step in enumerate(steps):
        marks[:, place_, 0] = started
        for mark in range(1, marks.shape[2]):
            layer, phase = divmod(mark - 1, len(LAYER_PHASES))
            kind, layer = (LAYER_PHASES[phase], layer) if layer < LAYERS else ("head", -1)
            for rank in range(num_ranks):
                who = -1 if kind in ("dispatch", "combine") else rank
                marks[rank, place_, mark] = rows.get((kind, who, step.index, layer), marks[rank, place_, mark - 1])
        started = marks[:, place_].max()
    return marks


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_a_simulated_run_comes_back_from_its_marks(num_ranks: int) -> None:
    """Marks of a simulated run give its task table, nanosecond for nanosecond; a gap between steps changes nothing."""
    case = tiny_case(num_ranks)
    for plan in case.plans.values():
        program = ExpertParallelProgram(MODEL, case.trace, case.steps, plan,
                                        CostModel(ranks_machine(num_ranks, "cpu", 1e-5, 1e9)))
        tasks = run_simpy(program)
        marks = marks_of(tasks, num_ranks, case.steps)
        marks[:, 1:] += 1000
        found = measured_tasks(program.graph, case.steps, lay_out(marks + 77))
        pd.testing.assert_frame_equal(found, tasks)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(1, 2), st.integers(1, 2), st.integers(0, 10**6))
def test_phases_follow_one_another(num_ranks: int, num_steps: int, layers: int, seed: int) -> None:
    """Whatever the ranks' clocks say: no gap, no overlap, collectives shared, and the end is the last rank's own."""
    rng = np.random.default_rng(seed)
    taken = rng.integers(0, 1000, (num_ranks, num_steps, 2 + layers * len(LAYER_PHASES)))
    marks = 10**6 + np.arange(num_steps)[None, :, None] * 10**6 + taken.cumsum(axis=2)
    found = lay_out(marks)
    for step in range(num_steps):
        start = 0 if step == 0 else found.step_end[step - 1]
        now = np.full(num_ranks, start)
        order = [(kind, layer) for layer in range(layers) for kind in LAYER_PHASES] + [("head", 0)]
        for kind, layer in order:
            span = found.spans[kind][:, step, layer]
            if kind in ("dispatch", "combine"):
                assert len(set(map(tuple, span.tolist()))) == 1
                assert span[0, 0] == now.max()
            else:
                assert span[:, 0].tolist() == now.tolist()
            assert np.all(span[:, 1] > span[:, 0])
            now = span[:, 1]
        assert found.step_end[step] == now.max()
        real = marks[:, step].max() - marks[:, step, 0].max()
        assert real <= found.step_end[step] - start <= max(real, 0) + marks.shape[2]  # each phase takes at least 1 ns


def test_marks_that_are_not_whole_layers_are_refused() -> None:
    """A truncated record is an error."""
    with pytest.raises(CheckError, match="6 marks"):
        lay_out(np.zeros((2, 1, 6), np.int64))


# ---------------------------------------------------------------- prediction


def true_cost(num_ranks: int, slow: float) -> CostModel:
    """A machine whose phases are rising lines, `slow` times as long."""
    corners = {"attention": ((1.0, 1.0), (50.0, 900.0)), "router": ((1.0,), (50.0,)), "head": ((1.0,), (20.0,)),
               "experts": ((1.0, 1.0, 1.0), (150.0, 8.0, 60.0))}
    lines = {"attention": (2e-4, 3e-6, 1e-7), "router": (1e-4, 1e-6), "head": (3e-4, 2e-5),
             "experts": (1e-4, 4e-5, 2e-4, 1e-5)}
    template = template_cost(num_ranks)
    tables = []
    for table in template.profile.tables:
        kind = "experts" if table.op == "grouped_ffn" else table.op
        if kind in corners:
            sizes = tuple(itertools.product(*zip(*corners[kind], strict=True)))
            seconds = tuple(slow * float(np.dot(lines[kind], (1.0, *size))) for size in sizes)
            table = dataclasses.replace(table, sizes=sizes, seconds=seconds, spread=(), samples=())
        else:
            table = dataclasses.replace(table, seconds=(slow * (7e-4 if table.shape == "dispatch" else 1e-9),))
        tables.append(table)
    return CostModel(ranks_machine(num_ranks, "cpu", slow * 3e-4, 2e8 / slow), CalibrationProfile("true", tuple(tables)))


def template_cost(num_ranks: int) -> CostModel:
    """Any cost model of ranks: its tables have the names that the lowering asks for."""
    case = tiny_case(num_ranks, "lpt")
    works = step_works(case.trace, case.plans["lpt"], case.steps)
    rng = np.random.default_rng(0)
    marks = rng.integers(1, 1000, (num_ranks, len(works), 2 + LAYERS * len(LAYER_PHASES))).cumsum(axis=2)
    return ranks_costs(MODEL, [phase_samples(MODEL, works, lay_out(marks))], "cpu")[0]


def simulated(case: RanksCase, trace: RoutingTrace, steps: list[Step], plan: PlacementPlan, cost: CostModel) -> pd.DataFrame:
    """The task table of steps on a machine."""
    program = ExpertParallelProgram(MODEL, trace, steps, plan, cost, dispatch_bytes=payload_bytes(MODEL) / MODEL.hidden_size)
    return run_simpy(program)


def test_a_machine_of_rising_lines_is_predicted() -> None:
    """Calibrated under random placements on other tokens of a machine that gets slower, each repetition is predicted to one percent."""
    case, num_ranks = tiny_case(2), 2
    slow = (1.0, 1.7, 0.8)
    rng = np.random.default_rng(4)
    repetitions = []
    for factor in slow:
        parts = []
        for plan in calibration_placements(case.plans, 24, rng):
            steps = [case.calibration_steps[int(rng.integers(len(case.calibration_steps)))]]
            works = step_works(case.calibration_trace, plan, steps)
            tasks = simulated(case, case.calibration_trace, steps, plan, true_cost(num_ranks, factor))
            parts.append(phase_samples(MODEL, works, lay_out(marks_of(tasks, num_ranks, steps))))
        repetitions.append(joined(parts))
    costs = ranks_costs(MODEL, repetitions, "cpu")
    for factor, cost in zip(slow, costs, strict=True):
        for plan in case.plans.values():
            expected = simulated(case, case.trace, case.steps, plan, true_cost(num_ranks, factor))["end_ns"].max()
            found = simulated(case, case.trace, case.steps, plan, cost)["end_ns"].max()
            assert found == pytest.approx(expected, rel=1e-2)
    assert cost.source_counts()["nameplate"] == 0


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6))
def test_fits_recover_rising_lines(seed: int) -> None:
    """Coefficients and scales of an exact maximum over ranks, with one pause in it."""
    rng = np.random.default_rng(seed)
    true = rng.uniform(0.5, 2.0, 3)
    terms = [np.concatenate([np.ones((60, 2, 1)), rng.uniform(1, 9, (60, 2, 2))], axis=2) for _ in range(2)]
    seconds = [scale * (load @ true).max(axis=1) for scale, load in zip((1.0, 3.0), terms, strict=True)]
    seconds[0][7] *= 50
    found = fit_phase(terms, seconds)
    assert found.samples == 120
    np.testing.assert_allclose(found.scales[:, None] * found.coefficients, np.outer((1.0, 3.0), true), rtol=2e-2)


def test_the_busiest_rank_is_the_fits_own() -> None:
    """The rank with the most rows is not the slowest where slots cost more than rows."""
    rng = np.random.default_rng(0)
    terms = np.concatenate([np.ones((80, 2, 1)), rng.uniform(1, 9, (80, 2, 2))], axis=2)
    true = np.array([1.0, 0.1, 3.0])
    np.testing.assert_allclose(busiest_fit(terms, (terms @ true).max(axis=1)), true, rtol=1e-6)


def test_no_term_falls() -> None:
    """Times that fall with a size are predicted as constant, and never as nothing."""
    terms = np.stack([np.ones(30), np.arange(30.0)], axis=1)
    constant, slope = rising_fit(terms, 5.0 - 0.1 * np.arange(30))
    assert slope == 0
    assert 2.0 < constant < 5.0


# ---------------------------------------------------------------- nothing judged is calibrated on


def test_calibration_on_judged_tokens_is_refused() -> None:
    """One common token is enough, and it is named."""
    case = tiny_case(2, "lpt")
    mixed = [*case.calibration_steps, dataclasses.replace(case.steps[0], rows=case.steps[0].rows[:1])]
    both = dataclasses.replace(case.trace)
    row = int(case.steps[0].rows[0])
    text = rf"1 tokens .* position {case.trace.position[row]} of request {case.trace.request_id[row]}"
    with pytest.raises(CheckError, match=text):
        check_disjoint(case.trace, case.steps, case.plans, both, mixed[-1:], [])


def test_calibration_on_a_judged_placement_is_refused() -> None:
    """Also when its slots stand in another order on the same ranks."""
    case = tiny_case(2, "lpt")
    plan = case.plans["lpt"]
    turned = PlacementPlan(plan.physical_to_logical.reshape(LAYERS, 2, -1)[:, :, ::-1].reshape(LAYERS, -1), 2, EXPERTS)
    arguments = (case.trace, case.steps, case.plans, case.calibration_trace, case.calibration_steps)
    with pytest.raises(CheckError, match="'lpt' is also calibrated on"):
        check_disjoint(*arguments, [turned])
    check_disjoint(*arguments, calibration_placements(case.plans, 5, np.random.default_rng(0)))


def test_placements_are_drawn_until_they_are_new() -> None:
    """With three placements of two experts' worth judged, the draw gives the fourth; with all judged there is none."""
    rows = [np.array([[0, 1], [0, 1]]), np.array([[0, 1], [1, 0]]), np.array([[1, 0], [0, 1]]), np.array([[1, 0], [1, 0]])]
    plans = {str(n): PlacementPlan(row, 2, 2) for n, row in enumerate(rows)}
    first = dict(list(plans.items())[:3])
    (found,) = calibration_placements(first, 1, np.random.default_rng(0))
    assert found.physical_to_logical.tolist() == rows[3].tolist()
    with pytest.raises(InputError, match="no other placement of 2 experts"):
        calibration_placements(plans, 1, np.random.default_rng(0))


# ---------------------------------------------------------------- processes


@pytest.fixture(scope="module")
def real_run() -> RanksRun:
    """Two ranks in processes of their own, four plans."""
    return validate_ranks(tiny_case(2, "contiguous", "random", "affinity", "shares"), FAST)


def test_ranks_in_processes_are_validated(real_run: RanksRun) -> None:
    """The results were checked on the way; the report has every plan, and its kinds sum to the end to end."""
    report = real_run.report
    assert set(report.plans) == {"contiguous", "random", "affinity", "shares"}
    for one in report.plans.values():
        kinds = one.kinds.set_index("kind")
        assert {"attention", "router", "dispatch", "experts", "combine", "head"} <= set(kinds.index)
        assert len(one.runs) == FAST.repeats
        assert (kinds[["predicted_s", "measured_s"]] >= 0).all().all()
        assert list(kinds.index)[-1] == "end to end"
    assert report.ranking["measured_relative"].mean() == pytest.approx(1.0)
    assert -1 <= report.kendall_tau <= 1 or np.isnan(report.kendall_tau)
    assert 0 <= report.decided_right <= report.decided <= 6
    assert any("gloo" in note for note in report.notes)
    assert multiprocessing.active_children() == []


def test_measured_and_predicted_have_one_form(real_run: RanksRun) -> None:
    """The same tasks with the same labels, other times; a timeline lays one over the other."""
    for name, guess in real_run.predicted.items():
        real = real_run.measured[name]
        assert list(real.tasks.columns) == list(guess.tasks.columns)
        same = ["task", "kind", "resource", "rank", "step", "layer", "tokens", "num_bytes"]
        pd.testing.assert_frame_equal(real.tasks[same], guess.tasks[same])
        assert set(real.tables) == set(guess.tables)
        path = real.tables["critical_path"]
        assert path["time_ns"].sum() == real.makespan_ns
        runs = real_run.report.plans[name].runs
        assert real.makespan_ns / 1e9 == pytest.approx(runs["measured_s"].iloc[-1])
        assert guess.makespan_ns / 1e9 == pytest.approx(runs["predicted_s"].iloc[-1])
        assert timeline(guess, overlay=real)["traceEvents"]
        assert guess.summary["cost_sources"].keys() <= {"measured", "interpolated", "extrapolated"}


def test_the_report_is_written(real_run: RanksRun, tmp_path: Path) -> None:
    """One JSON file with every plan, no number that JSON does not have."""
    body = json.loads(real_run.report.write(tmp_path / "x.validation.json").read_text())
    assert body["schema"] == "moesim.ranks_validation/1"
    assert body["median_error"] == pytest.approx(real_run.report.median_error)
    assert set(body["plans"]) == set(real_run.report.plans)
    assert len(real_run.report.kinds) == sum(len(plan["kinds"]) for plan in body["plans"].values())


@pytest.mark.slow
def test_four_ranks_in_processes() -> None:
    """Four ranks compute the right results wherever their cores are; fewer cores than ranks are told."""
    report = validate_ranks(tiny_case(4), FAST).report
    assert set(report.plans) == set(tiny_case(4).plans)
    assert any("share" in note for note in report.notes) == (ranks_case.num_cores() < 4)


def test_rank_after_rank_on_one_device() -> None:
    """Sequential mode checks the same results; its collectives take exactly what was stated, in run and prediction."""
    case = tiny_case(2, "lpt", "eplb")
    stated = dataclasses.replace(FAST, mode="sequential", modelled_latency_s=1e-3, modelled_bytes_per_s=1e6)
    run = validate_ranks(case, stated)
    assert any("sequential" in note for note in run.report.notes)
    for name, plan in case.plans.items():
        works = step_works(case.trace, plan, case.steps)
        sizes = {"dispatch": payload_bytes(MODEL), "combine": 16 * 4.0}
        for kind, size in sizes.items():
            expected = sum(1e-3 + work.busiest_tokens(layer) * size / 1e6 for work in works for layer in range(LAYERS))
            for result in (run.predicted[name], run.measured[name]):
                tasks = result.tasks[(result.tasks["kind"] == kind) & (result.tasks["resource"] != "")]
                assert tasks["duration_ns"].sum() / 1e9 == pytest.approx(expected, rel=1e-6)


def test_progress_is_told() -> None:
    """Every step that ran is counted, from nothing to all."""
    told: list[tuple[str, float, float]] = []
    case = tiny_case(2, "lpt")
    validate_ranks(case, dataclasses.replace(FAST, mode="sequential", repeats=1), lambda *step: told.append(step))
    running = [(done, total) for stage, done, total in told if "running" in stage]
    assert running == [(done, 6) for done in range(7)]  # three judged steps, three calibrated on


# ---------------------------------------------------------------- processes that fail


def test_ranks_meet_and_exchange() -> None:
    """Each rank hears every other, on one thread; whole lists arrive in order of rank."""
    heard = []
    run_ranks(rank_bodies.exchange, [10, 20], backend="gloo", timeout_s=60, on_message=lambda rank, body: heard.append((rank, body)))
    assert sorted(heard) == [(0, (0, 1, [10, 20])), (1, (1, 1, [10, 20]))]


@pytest.mark.parametrize(("how", "message"), [
    ("raise", r"rank 1 failed: ValueError: no such expert here; the other ranks were stopped"),
    ("kill", r"rank 1 ended without a word \(exit code -9\)"),
    ("hang", r"rank 0 failed: .*time.*rank 1 still ran"),
])
def test_a_rank_that_fails_ends_the_run(how: str, message: str) -> None:
    """One line that names the rank, in time, and no process left."""
    began_s = time.monotonic()
    with pytest.raises(CheckError, match=message) as failure:
        run_ranks(rank_bodies.fail, ["", how], backend="gloo", timeout_s=2.0, on_message=lambda *_: None)
    assert "\n" not in str(failure.value)
    assert multiprocessing.active_children() == []
    assert time.monotonic() - began_s < 120  # it would wait 600 s


def test_silence_ends_the_run() -> None:
    """A rank that has started and says nothing is not waited for."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    theirs.send((STARTED, None))
    with pytest.raises(CheckError, match=r"rank 0 said nothing for 0\.1 s"):
        _watch([ours], [], 0.1, lambda *_: None)


# ---------------------------------------------------------------- reports and input


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=2, max_size=6))
def test_order_is_judged_by_pairs(pairs: list[tuple[int, int]]) -> None:
    """Kendall's tau-b and the decided pairs, counted pair by pair."""
    predicted, measured = (np.array(column, float) for column in zip(*pairs, strict=True))
    both = list(itertools.combinations(range(len(pairs)), 2))
    signs = [(np.sign(predicted[a] - predicted[b]), np.sign(measured[a] - measured[b])) for a, b in both]
    untied = [sum(1 for sign in signs if sign[side]) for side in (0, 1)]
    found = kendall_tau(predicted, measured)
    if all(untied):
        assert found == pytest.approx(sum(p * m for p, m in signs) / np.sqrt(untied[0] * untied[1]))
    else:
        assert np.isnan(found)
    apart = [(p, m) for (a, b), (p, m) in zip(both, signs, strict=True)
             if max(predicted[a], predicted[b]) > 1.05 * min(predicted[a], predicted[b])]
    assert decided_pairs(predicted, measured) == (len(apart), sum(p == m for p, m in apart))


def path_of(**time_ns: int) -> pd.DataFrame:
    """A critical path of one resource."""
    return pd.DataFrame({"resource": "r", "kind": list(time_ns), "time_ns": list(time_ns.values()), "num_tasks": 1})


def test_a_plans_report_by_hand() -> None:
    """Medians over repetitions by kind, errors end to end; a kind that one run lacks counts as nothing there."""
    report = plan_report([path_of(experts=100, dispatch=50)] * 3,
                         [path_of(experts=80, dispatch=40), path_of(experts=100, dispatch=50, wait=10), path_of(experts=120, dispatch=60)])
    kinds = report.kinds.set_index("kind")
    assert kinds.loc["experts", ["predicted_s", "measured_s"]].tolist() == pytest.approx([1e-7, 1e-7])
    assert kinds.loc["experts", "spread"] == pytest.approx(0.4)
    assert kinds.loc["wait", ["measured_s", "error"]].tolist() == [0, 0]
    assert kinds.loc["end to end", "error"] == pytest.approx(150 / 160 - 1)
    assert report.runs["error"].tolist() == pytest.approx([150 / 120 - 1, 150 / 160 - 1, 150 / 180 - 1])


def test_one_pause_does_not_reorder_plans() -> None:
    """Plans are ranked by their steps' medians over repetitions; every pair here is decided, by hand."""
    one = plan_report([path_of(experts=100)] * 3, [path_of(experts=100)] * 3)
    guess = {"a": [1.0, 1.0], "b": [1.2, 1.2], "c": [1.5, 1.5]}
    real = {"a": [[1.0, 9.0], [1.0, 1.0], [1.0, 1.0]], "b": [[1.1, 1.1], [8.0, 1.1], [1.1, 1.1]], "c": [[1.05, 1.05]] * 3}
    seconds = {name: (np.array([guess[name]] * 3), np.array(real[name])) for name in guess}
    report = ranks_report(dict.fromkeys(guess, one), seconds, dict.fromkeys(guess, 0.0), (), {})
    assert report.ranking["measured_s"].tolist() == pytest.approx([2.0, 2.2, 2.1])
    assert (report.decided, report.decided_right) == (3, 2)
    assert report.kendall_tau == pytest.approx(1 / 3)
    assert report.ranking["error"].iloc[0] == pytest.approx((2.0 / 7.4) / (2.0 / 6.3) - 1)


@pytest.mark.parametrize(("change", "message"), [
    ({"mode": "sequentiel"}, "Did you mean 'sequential'"),
    ({"dtype": "float64"}, "unknown dtype"),
    ({"repeats": 0}, "repeats must be at least 1, got 0"),
    ({"tries": 0}, "tries must be at least 1"),
    ({"calibration_share": 0.0}, "calibration_share must be positive"),
    ({"timeout_s": float("nan")}, "timeout_s must be positive"),
    ({"modelled_latency_s": -1.0}, "modelled_latency_s must not be negative"),
    ({"seed": -1}, "seed must not be negative"),
])
def test_bad_settings_are_refused(change: dict[str, object], message: str) -> None:
    """Each with the value and what was expected."""
    with pytest.raises(InputError, match=message):
        RanksSettings(**change)  # type: ignore[arg-type]


def test_bad_cases_are_refused() -> None:
    """Plans of other sizes, models with parts that have no kernel, nothing to do."""
    case = tiny_case(2, "lpt")
    other = PlacementPlan(np.tile(np.arange(EXPERTS), (LAYERS, 1)), 4, EXPERTS)
    with pytest.raises(InputError, match=r"plan 'b' has 4 ranks, 2 layers x 8 experts; .* 2 ranks"):
        dataclasses.replace(case, plans={**case.plans, "b": other})
    with pytest.raises(InputError, match="at least 2 ranks"):
        dataclasses.replace(case, plans={"a": PlacementPlan(np.tile(np.arange(EXPERTS), (LAYERS, 1)), 1, EXPERTS)})
    with pytest.raises(InputError, match="without shared experts"):
        dataclasses.replace(case, model=MODEL.replace(shared_intermediate_size=8))
    with pytest.raises(InputError, match="needs a plan, steps"):
        dataclasses.replace(case, steps=[])


@pytest.mark.parametrize(("mode", "device", "gpus", "expected"), [
    ("auto", "cpu", 0, ("processes", "cpu")),
    ("sequential", "cpu", 0, ("sequential", "cpu")),
    ("auto", "cuda", 1, ("sequential", "cuda")),
    ("auto", "cuda", 4, ("processes", "cuda")),
])
def test_the_mode_follows_the_machine(
    monkeypatch: pytest.MonkeyPatch, mode: str, device: str, gpus: int, expected: tuple[str, str]
) -> None:
    """Processes wherever each rank has a device; rank after rank where not."""
    monkeypatch.setattr(ranks_case, "torch_device", lambda name: name)
    monkeypatch.setattr(ranks_case, "_num_gpus", lambda: gpus)
    assert resolve(RanksSettings(mode=mode, device=device), 2) == expected


def test_processes_need_a_gpu_for_each_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says how many there are and what to do."""
    monkeypatch.setattr(ranks_case, "torch_device", lambda name: name)
    monkeypatch.setattr(ranks_case, "_num_gpus", lambda: 1)
    with pytest.raises(InputError, match="2 ranks need as many GPUs, torch sees 1; use mode sequential"):
        resolve(RanksSettings(mode="processes", device="cuda"), 2)


def test_a_model_too_large_is_refused() -> None:
    """Before any process is started."""
    case = tiny_case(2, "lpt")
    huge = MODEL.replace(hidden_size=1 << 14, expert_intermediate_size=1 << 20, attention=AttentionSpec(2, 1, 8))
    with pytest.raises(InputError, match="of memory are free"):
        validate_ranks(dataclasses.replace(case, model=huge), FAST)


def test_wrong_results_end_a_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    """A validation whose ranks compute something else reports no times."""
    case = tiny_case(2, "lpt")
    honest = ranks_validate.reference_outputs
    monkeypatch.setattr(ranks_validate, "reference_outputs", lambda *arguments: [rows + 0.01 for rows in honest(*arguments)])
    with pytest.raises(CheckError, match=r"plan 'lpt', step \d, rank 0: \d+ of \d+ tokens differ"):
        validate_ranks(case, dataclasses.replace(FAST, mode="sequential"))


def test_results_are_simulation_results(real_run: RanksRun) -> None:
    """They can be written like any other."""
    assert all(isinstance(result, SimulationResult) for result in (*real_run.predicted.values(), *real_run.measured.values()))
