"""The best split of a layer by CP-SAT, where there are too many splits to look at each.

Integers count the experts of each kind on the CPU. The device's constraints are those of the timing model with loads in the best
order; the CPU's are the lower bounds of `kinds.cpu_bounds`, so the program's bound holds for every order, and the split
that it finds is then given its best order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moesim.errors import SolverError
from moesim.lowering.misses.exact import BestSplit, finished
from moesim.lowering.misses.kinds import Kinds, cpu_bounds, device_ends

if TYPE_CHECKING:
    from ortools.sat.python import cp_model

MOST_WORK = 10.0  # CP-SAT's deterministic seconds, so that the answer does not depend on the machine


def programmed(kinds: Kinds, starts: Sequence[tuple[int, ...]], most_work: float = MOST_WORK) -> BestSplit:
    """Return the best split found, `starts` included, and the bound that CP-SAT proved.

    Raises:
        SolverError: CP-SAT found nothing.
    """
    from ortools.sat.python import cp_model

    started = min((_finished(kinds, split) for split in starts), key=lambda split: split.makespan_ns)
    model = cp_model.CpModel()
    on_cpu = [model.new_int_var(0, size, f"cpu{kind}") for kind, size in enumerate(kinds.sizes)]
    makespan = model.new_int_var(0, started.makespan_ns, "makespan")
    _add_device(model, kinds, on_cpu, makespan)
    _add_cpu(model, kinds, on_cpu, makespan)
    model.minimize(makespan)
    for variable, number in zip(on_cpu, started.on_cpu, strict=True):
        model.add_hint(variable, number)
    solver = cp_model.CpSolver()
    solver.parameters.num_workers, solver.parameters.random_seed = 1, 0
    solver.parameters.max_deterministic_time = most_work
    if solver.solve(model) not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        raise SolverError(f"CP-SAT found no split of a layer: {solver.status_name()}")
    found = _finished(kinds, tuple(solver.value(variable) for variable in on_cpu))
    best = min(started, found, key=lambda split: split.makespan_ns)
    bound = min(best.makespan_ns, round(solver.best_objective_bound))
    return BestSplit(best.on_cpu, best.order, best.makespan_ns, bound)


def _finished(kinds: Kinds, split: tuple[int, ...]) -> BestSplit:
    column = np.array(split, np.int64)[:, None]
    device_end, loads_end = device_ends(kinds, column)
    bound = np.maximum(device_end, cpu_bounds(kinds, column, loads_end))
    return finished(kinds, split, int(device_end[0]), int(loads_end[0]), int(bound[0]))


def _add_device(model: cp_model.CpModel, kinds: Kinds, on_cpu: list[Any], makespan: Any) -> None:
    """The makespan holds shared expert, residents and loaded experts, and what follows each load."""
    on_gpu = [size - number for size, number in zip(kinds.sizes, on_cpu, strict=True)]
    model.add(makespan >= kinds.shared_ns + sum(
        gpu * number for gpu, number in zip(kinds.gpu_ns, on_gpu, strict=True)))
    order = kinds.load_order()
    loads: Any = 0
    for place, kind in enumerate(order):
        number, gpu = on_gpu[kind], kinds.gpu_ns[kind]
        later = sum(kinds.gpu_ns[each] * on_gpu[each] for each in order[place + 1:])
        any_ = model.new_bool_var(f"loads{kind}")
        model.add(number >= 1).only_enforce_if(any_)
        model.add(number == 0).only_enforce_if(~any_)
        model.add(makespan >= kinds.load_ns * (loads + any_) + gpu * number + later)
        model.add(makespan >= kinds.load_ns * (loads + number) + gpu * any_ + later)
        loads = loads + number
    model.add(makespan >= kinds.load_ns * loads)


def _add_cpu(model: cp_model.CpModel, kinds: Kinds, on_cpu: list[Any], makespan: Any) -> None:
    """The makespan holds each of the bounds on the CPU's side."""
    assert kinds.jobs is not None
    used = model.new_bool_var("used")
    model.add(sum(on_cpu) >= 1).only_enforce_if(used)
    model.add(sum(on_cpu) == 0).only_enforce_if(~used)
    there, cpu, back = zip(*kinds.jobs, strict=True)
    loads = sum(size - on_cpu[kind] for kind, size in enumerate(kinds.sizes) if not kinds.resident[kind])
    first, last = _chosen(model, on_cpu, used), _chosen(model, on_cpu, used)
    single = model.new_bool_var("single")
    model.add(sum(on_cpu) <= 1).only_enforce_if(single)
    for kind, number in enumerate(on_cpu):
        model.add(first[kind] + last[kind] <= number + single)
    model.add(makespan >= _dot(cpu, on_cpu) + _dot(there, first) + _dot(back, last))
    after, before = _chosen(model, on_cpu, used), _chosen(model, on_cpu, used)
    model.add(makespan >= _dot(there, on_cpu) + _dot([c + b for c, b in zip(cpu, back, strict=True)], after))
    model.add(makespan >= _dot(back, on_cpu) + _dot([t + c for t, c in zip(there, cpu, strict=True)], before))
    model.add(makespan >= kinds.load_ns * loads + _dot(back, on_cpu))


def _chosen(model: cp_model.CpModel, on_cpu: list[Any], used: Any) -> list[Any]:
    """Return booleans of which one is true, that of a kind on the CPU; none where there is none."""
    chosen = [model.new_bool_var("") for _ in on_cpu]
    model.add(sum(chosen) == used)
    for flag, number in zip(chosen, on_cpu, strict=True):
        model.add(flag <= number)
    return chosen


def _dot(times: Sequence[int], variables: list[Any]) -> Any:
    return sum(time * variable for time, variable in zip(times, variables, strict=True))
