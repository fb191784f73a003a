"""Which executor runs a program: SimPy, the reference, or the compiled engines, which give the same table.

The compiled side has three engines. A specialised one where it knows the program (offloaded inference; expert
parallelism lowered without Python per task), the generic one for every other program. ``auto`` is the compiled side, with
SimPy until it has been compiled on this machine (`compile_ahead`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from moesim.errors import unknown
from moesim.lowering.graph import Program
from moesim.simulate.compile_ahead import compile_in_background, compiled_ready
from moesim.simulate.execution import Execution

if TYPE_CHECKING:
    from moesim.lowering.offload import OffloadProgram
    from moesim.simulate.compiled_offload_times import OffloadTimes

AUTO, SIMPY, COMPILED = "auto", "simpy", "compiled"
EXECUTORS = (AUTO, SIMPY, COMPILED)


def executor_of(name: str = AUTO) -> Callable[[Program], Execution]:
    """Return the executor of a name; raises InputError for an unknown one."""
    if name not in EXECUTORS:
        raise unknown("executor", name, EXECUTORS)
    return {AUTO: execute, SIMPY: _simpy, COMPILED: execute_compiled}[name]


def execute(program: Program) -> Execution:
    """Run a program on the compiled side; on SimPy, and compile beside it, while that is not ready."""
    if compiled_ready():
        return execute_compiled(program)
    compile_in_background()
    return _simpy(program)


def execute_compiled(program: Program) -> Execution:
    """Run a program on the engine that knows it best; compiles it first where that is still to be done."""
    from moesim.lowering import expert_parallel_arrays
    from moesim.simulate import compiled_offload
    from moesim.simulate.compiled_executor import execute_arrays, execute_program

    if compiled_offload.supports(program):
        return compiled_offload.execute_offload(cast("Any", program))
    if expert_parallel_arrays.supports(program):
        return execute_arrays(expert_parallel_arrays.lower_steps(cast("Any", program)))
    return execute_program(program)


def offload_predictions(program: OffloadProgram) -> np.ndarray | None:
    """Return what a program's prefetcher names, for all its runs on other machines; None where the engine does not know it."""
    from moesim.simulate import compiled_offload

    known = program.prefetcher is not None and compiled_offload.supports(program)
    return compiled_offload.predictions(program) if known else None


def offload_times(program: OffloadProgram, predictions: np.ndarray | None = None) -> OffloadTimes:
    """Run an offload program without a task table; programs of foreign policies get theirs from the generic engine.

    `predictions` are those of `offload_predictions`; None: the prefetcher is asked.
    """
    from moesim.simulate import compiled_offload
    from moesim.simulate.compiled_offload_times import times_of

    if compiled_offload.supports(program):
        return compiled_offload.offload_times(program, predictions)
    return times_of(program, execute(program))


def _simpy(program: Program) -> Execution:
    from moesim.simulate.simpy_executor import execute_simpy

    return execute_simpy(program)
