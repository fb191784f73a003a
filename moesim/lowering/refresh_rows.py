"""The rows of a diffusion study: refresh policies against each other on requests that none was fitted to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moesim.errors import InputError, unknown
from moesim.hardware.cost import CostModel
from moesim.lowering.machine import OffloadMachine
from moesim.lowering.refresh import RefreshProblem, RefreshResult, refresh_problem, run_schedule
from moesim.lowering.refresh_policies import FixedInterval, Never, SkiRental, best_fixed_interval
from moesim.lowering.refresh_schedule import optimal_schedule, train_pattern
from moesim.model.spec import ModelSpec
from moesim.traces.denoise_passes import DenoisePasses, denoise_passes
from moesim.traces.split import split_requests
from moesim.traces.trace import RoutingTrace
from moesim.units import s_from_ns

CAUSAL, TRAINED, OFFLINE = "causal", "trained", "offline"


@dataclass(frozen=True)
class DiffusionSetup:
    """A problem to fit on and one to run on; `tau` and `factor` are those of the policies that have one."""

    train: RefreshProblem
    test: RefreshProblem
    tau: int
    factor: float


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
    return Ran(run_schedule(setup.test, FixedInterval(setup.tau).schedule(setup.test)), setup.tau)


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
    return Ran(run_schedule(setup.test, optimal_schedule(setup.test, common=common).refresh))


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
        if name not in POLICIES:
            raise unknown("refresh policy", name, POLICIES)
    train, test = split_requests(trace, train_fraction, seed)
    parts = denoise_passes(train), denoise_passes(test)
    popularity = parts[0].counts.sum(axis=0)
    problems = [refresh_problem(model, part, passes, machine, cost, budget, popularity=popularity,
                                write_back=write_back, overlap=overlap)
                for part, passes in zip((train, test), parts, strict=True)]
    setup = DiffusionSetup(problems[0], problems[1], tau, factor)
    best_ns = optimal_schedule(setup.test).schedule_ns
    tokens = _decided_tokens(parts[1])
    return [_row(name, setup, best_ns, tokens) for name in policies]


def _decided_tokens(passes: DenoisePasses) -> int:
    first = np.flatnonzero(passes.block_starts)
    return int(passes.active[first].sum())  # at its first pass all tokens of a block are masked, so routed in every mode


def _row(name: str, setup: DiffusionSetup, best_ns: int, tokens: int) -> dict[str, Any]:
    knows, run = POLICIES[name]
    ran = run(setup)
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
        "tokens_per_s": tokens / s_from_ns(result.total_ns),
        "over_optimal": result.schedule_ns / best_ns - 1.0,
    }
