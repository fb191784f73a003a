"""What runs in which order: steps under the judged plans, and between them steps under random placements to calibrate on.

The unit is one step. All units of a repetition are shuffled, so that whatever else the machine does meets all plans, and
what they are predicted from, alike; in blocks of one plan after another, the plan that ran first after a pause looked slower.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moesim.errors import CheckError, InputError
from moesim.placement.plan import PlacementPlan
from moesim.traces.steps import Step
from moesim.traces.trace import RoutingTrace
from moesim.validate.ranks_run import Job
from moesim.validate.ranks_work import step_works

CALIBRATION = ""
REDRAWS = 100


@dataclass(frozen=True)
class Unit:
    """One step to run: under a judged plan (its name), or under a random placement (`CALIBRATION`); `place` in its list."""

    repetition: int
    plan: str
    place: int
    job: Job


def random_placement(rng: np.random.Generator, num_layers: int, num_experts: int, num_ranks: int, num_slots: int) -> PlacementPlan:
    """Return a placement drawn at random: every expert once, the other slots filled with random experts."""
    extra = num_slots - num_experts
    rows = [rng.permutation(np.concatenate([np.arange(num_experts), rng.integers(num_experts, size=extra)]))
            for _ in range(num_layers)]
    return PlacementPlan(np.stack(rows), num_ranks, num_experts, {"solver": "random", "for": "calibration"})


def calibration_placements(plans: Mapping[str, PlacementPlan], count: int, rng: np.random.Generator) -> list[PlacementPlan]:
    """Return random placements with the slots of each judged plan in turn, none equal to a judged plan.

    Raises:
        InputError: so few experts that no other placement turned up.
    """
    found = []
    for model in itertools.islice(itertools.cycle(plans.values()), count):
        drawn = (random_placement(rng, model.num_layers, model.num_experts, model.num_ranks, model.num_slots)
                 for _ in range(REDRAWS))
        fresh = next((plan for plan in drawn if not _named_alike(plan, plans)), None)
        if fresh is None:
            raise InputError(f"the plans judged leave no other placement of {model.num_experts} experts to calibrate on")
        found.append(fresh)
    return found


def check_disjoint(
    trace: RoutingTrace,
    steps: Sequence[Step],
    plans: Mapping[str, PlacementPlan],
    calibration_trace: RoutingTrace,
    calibration_steps: Sequence[Step],
    placements: Sequence[PlacementPlan],
) -> None:
    """Raise CheckError if anything that is judged was calibrated on: a token of the trace, or a placement."""
    judged, used = _tokens(trace, steps), _tokens(calibration_trace, calibration_steps)
    if shared := judged & used:
        request, position, _ = min(shared)
        raise CheckError(f"{len(shared)} tokens of the judged steps are also calibrated on, the first is position {position} "
                         f"of request {request}")
    for placement in placements:
        if name := _named_alike(placement, plans):
            raise CheckError(f"plan {name!r} is also calibrated on: its experts lie on the same ranks as a calibration placement's")


def _tokens(trace: RoutingTrace, steps: Sequence[Step]) -> set[tuple[int, int, bytes]]:
    rows = np.unique(np.concatenate([step.rows for step in steps]))
    return {(int(trace.request_id[row]), int(trace.position[row]), trace.expert_ids[row].tobytes()) for row in rows.tolist()}


def _named_alike(placement: PlacementPlan, plans: Mapping[str, PlacementPlan]) -> str:
    """Return the judged plan that puts the same experts on the same ranks in every layer, or an empty text."""
    return next((name for name, plan in plans.items() if np.array_equal(_by_rank(plan), _by_rank(placement))), "")


def _by_rank(plan: PlacementPlan) -> np.ndarray:
    return np.sort(plan.physical_to_logical.reshape(plan.num_layers, plan.num_ranks, -1), axis=2)


def judged_units(trace: RoutingTrace, steps: Sequence[Step], plans: Mapping[str, PlacementPlan], repeats: int) -> list[Unit]:
    """Return every step under every plan, once per repetition."""
    units = []
    for name, plan in plans.items():
        for place, work in enumerate(step_works(trace, plan, steps)):
            job = Job(plan.physical_to_logical, (work,))
            units += [Unit(repetition, name, place, job) for repetition in range(repeats)]
    return units


def calibration_units(
    trace: RoutingTrace, steps: Sequence[Step], placements: Sequence[PlacementPlan], repeats: int, rng: np.random.Generator
) -> list[Unit]:
    """Return one unit per placement, each with a step drawn at random; placements are dealt to the repetitions in turn."""
    units = []
    for place, plan in enumerate(placements):
        step = steps[int(rng.integers(len(steps)))]
        job = Job(plan.physical_to_logical, tuple(step_works(trace, plan, [step])), checked=False)
        units.append(Unit(place % repeats, CALIBRATION, place, job))
    return units


def shuffled(units: Sequence[Unit], rng: np.random.Generator) -> list[Unit]:
    """Return the units repetition by repetition, in random order within each."""
    order = rng.permutation(len(units))
    return sorted((units[place] for place in order), key=lambda unit: unit.repetition)
