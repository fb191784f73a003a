"""The rows of a diffusion study: refresh policies against each other on requests that none was fitted to."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from moesim.errors import InputError, unknown
from moesim.hardware.cost import CostModel
from moesim.lowering.machine import OffloadMachine
from moesim.lowering.refresh import RefreshProblem, RefreshResult, refresh_problem, run_schedule
from moesim.lowering.refresh_policies import FixedInterval, Never, SkiRental, best_fixed_interval
from moesim.lowering.refresh_schedule import BestSchedule, optimal_schedule, train_pattern
from moesim.model.spec import ModelSpec
from moesim.traces.denoise_passes import DenoisePasses, denoise_passes
from moesim.traces.split import split_requests
from moesim.traces.trace import RoutingTrace
from moesim.units import s_from_ns

CAUSAL, TRAINED, OFFLINE = "causal", "trained", "offline"


class Denoised(NamedTuple):
    """A trace and its denoising passes."""

    trace: RoutingTrace
    passes: DenoisePasses


@dataclass(frozen=True)
class DiffusionSetup:
    """A problem to fit on and one to run on, and the best schedule of the second, each layer its own.

    `tau`, `factor` and `reset_at_block` are those of the policies that have one (``interval*``, ``ski-rental``).
    """

    train: RefreshProblem
    test: RefreshProblem
    best: BestSchedule
    tau: int = 4
    factor: float = 1.0
    reset_at_block: bool = True


@dataclass(frozen=True)
class Ran:
    """What a policy did, and the interval that it used or found (None: none)."""

    result: RefreshResult
    tau: int | None = None


def _static(setup: DiffusionSetup) -> Ran:
    return Ran(run_schedule(setup.test, Never().schedule(setup.test)))


def _every_step(setup: DiffusionSetup) -> Ran:
    return Ran(run_schedule(setup.test, FixedInterval(1).schedule(setup.test)), 1)


def _fixed(setup: DiffusionSetup) -> Ran:
    policy = FixedInterval(setup.tau, setup.reset_at_block)
    return Ran(run_schedule(setup.test, policy.schedule(setup.test)), setup.tau)


def _released(setup: DiffusionSetup) -> Ran:
    policy = FixedInterval(setup.tau, every_step_of_first_block=True)
    return Ran(run_schedule(setup.test, policy.schedule(setup.test), contents="released"), setup.tau)


def _best(setup: DiffusionSetup, problem: RefreshProblem, reset: bool) -> Ran:
    _, lengths = np.unique(problem.passes.request, return_counts=True)
    largest = None if reset else int(lengths.max())  # one refresh per request
    tau = best_fixed_interval(problem, reset_at_block=reset, largest=largest).tau
    return Ran(run_schedule(setup.test, FixedInterval(tau, reset).schedule(setup.test)), tau)


def _pattern(setup: DiffusionSetup, common: bool, whole_request: bool = False) -> Ran:
    cycle = int(setup.train.passes.block.max()) + 1 if whole_request else 1
    pattern = train_pattern(setup.train, common=common, blocks_per_cycle=cycle)
    return Ran(run_schedule(setup.test, pattern.schedule(setup.test)))


def _optimal(setup: DiffusionSetup, common: bool) -> Ran:
    best = optimal_schedule(setup.test, common=True) if common else setup.best
    return Ran(run_schedule(setup.test, best.refresh))


# name -> (what it knows, how it is run); `trained` means fitted on the training requests alone
POLICIES: dict[str, tuple[str, Callable[[DiffusionSetup], Ran]]] = {
    "static": (CAUSAL, _static),
    "every-step": (CAUSAL, _every_step),
    "interval": (CAUSAL, _fixed),
    "interval-released": (CAUSAL, _released),
    "interval-trained": (TRAINED, lambda setup: _best(setup, setup.train, True)),
    "interval-continuous-trained": (TRAINED, lambda setup: _best(setup, setup.train, False)),
    "ski-rental": (CAUSAL, lambda setup: Ran(run_schedule(setup.test, SkiRental(setup.factor).schedule(setup.test)))),
    "pattern-trained": (TRAINED, lambda setup: _pattern(setup, False)),
    "pattern-common-trained": (TRAINED, lambda setup: _pattern(setup, True)),
    "plan-trained": (TRAINED, lambda setup: _pattern(setup, False, whole_request=True)),
    "plan-common-trained": (TRAINED, lambda setup: _pattern(setup, True, whole_request=True)),
    "interval-best": (OFFLINE, lambda setup: _best(setup, setup.test, True)),
    "optimal-common": (OFFLINE, lambda setup: _optimal(setup, True)),
    "optimal": (OFFLINE, lambda setup: _optimal(setup, False)),
}


def diffusion_rows(model: ModelSpec, trace: RoutingTrace, machine: OffloadMachine, cost: CostModel,
                   policies: Sequence[str] = tuple(POLICIES), *, budget: int, tau: int = 4, factor: float = 1.0,
                   write_back: bool = False, overlap: bool = True, train_fraction: float = 0.5,
                   seed: int = 0) -> list[dict[str, Any]]:
    """Return a row per policy, in the given order.

    Requests are split: one part gives the popular experts (which are on the GPU at the start, for every policy) and
    everything that is trained; the other part is run. `knows` of a row is ``causal``, ``trained``, or ``offline`` (it
    knows the whole run: a reference, not to be deployed); `over_optimal` is experts and moves over those of the best
    schedule of each layer, minus 1. `tokens_per_s` counts the tokens of the blocks.

    Args:
        budget: GPU experts per layer.
        tau: of ``interval`` and ``interval-released``. factor: of ``ski-rental``.
        write_back, overlap: as in `refresh_costs`.

    Raises:
        InputError: an unknown policy, no policy, or what `refresh_problem` and `denoise_passes` refuse.
    """
    if not policies:
        raise InputError("diffusion: at least one policy is needed")
    for name in policies:
        check_policy(name)
    train, test = (Denoised(part, denoise_passes(part)) for part in split_requests(trace, train_fraction, seed))
    setup = diffusion_setup(model, train, test, machine, cost, budget, write_back=write_back, overlap=overlap)
    setup = dataclasses.replace(setup, tau=tau, factor=factor)
    return [policy_row(name, setup) for name in policies]


def check_policy(name: str) -> None:
    """Raise InputError, with a suggestion, unless there is a refresh policy of this name."""
    if name not in POLICIES:
        raise unknown("refresh policy", name, POLICIES)


def diffusion_setup(model: ModelSpec, train: Denoised, test: Denoised, machine: OffloadMachine, cost: CostModel,
                    budget: int, *, write_back: bool = False, overlap: bool = True) -> DiffusionSetup:
    """Return what the policies of one budget share; the popular experts of `train` are on the GPU at the start of both.

    Raises:
        InputError: what `refresh_problem` and `optimal_schedule` refuse.
    """
    popularity = train.passes.counts.sum(axis=0)
    fit, run = (refresh_problem(model, part.trace, part.passes, machine, cost, budget, popularity=popularity,
                                write_back=write_back, overlap=overlap) for part in (train, test))
    return DiffusionSetup(fit, run, optimal_schedule(run))


def decided_tokens(passes: DenoisePasses) -> int:
    """Return the tokens of all blocks: at its first pass all tokens of a block are masked, so routed in every mode."""
    return int(passes.active[np.flatnonzero(passes.block_starts)].sum())


def run_named(name: str, setup: DiffusionSetup) -> Ran:
    """Run one policy of `POLICIES`."""
    return POLICIES[name][1](setup)


def policy_row(name: str, setup: DiffusionSetup) -> dict[str, Any]:
    """Run one policy and return its row (see `diffusion_rows`)."""
    knows, ran = POLICIES[name][0], run_named(name, setup)
    result, passes = ran.result, setup.test.passes
    calls = int((passes.counts > 0).sum())
    layers, steps = setup.test.num_layers, setup.test.num_steps
    return {
        "policy": name,
        "knows": knows,
        "tau": ran.tau,
        "refreshes_per_block": int(result.refreshed.sum()) / (layers * passes.num_blocks),
        "promotions_per_step": int(result.promotions.sum()) / (layers * steps),
        "miss_rate": int(result.misses.sum()) / calls,
        "experts_s": s_from_ns(int(result.experts_ns.sum())),
        "moves_s": s_from_ns(int(result.move_ns.sum())),
        "other_s": s_from_ns(int(result.other_ns.sum())),
        "total_s": s_from_ns(result.total_ns),
        "step_s": s_from_ns(result.total_ns) / steps,
        "tokens_per_s": decided_tokens(passes) / s_from_ns(result.total_ns),
        "over_optimal": result.schedule_ns / setup.best.schedule_ns - 1.0,
    }
