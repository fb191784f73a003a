"""The SimPy executor: the reference that the others must agree with, tie rule included.

At one instant SimPy handles events of lower priority number first. Completions are timeouts (priority 1);
everything that follows from them at that instant, the program's decisions and the dispatch of
queues, waits for one `settle` event of priority 9. So the order is completions, decisions, dispatch.
"""

from __future__ import annotations

import pandas as pd
import simpy
from simpy.events import EventPriority

from moesim.lowering.graph import Program
from moesim.simulate.execution import Execution
from moesim.simulate.scheduler import Scheduler

SETTLE_PRIORITY = EventPriority(9)


class SimpyExecutor:
    """Runs one program once in simulated time."""

    def __init__(self, program: Program) -> None:
        self._env = simpy.Environment()
        self._graph = program.graph
        self._scheduler = Scheduler(program, lambda: int(self._env.now))
        self._free = [resource.capacity for resource in self._graph.resources]
        self._settling = False

    def run(self) -> Execution:
        """Run to the end; raises CheckError for tasks that can never run."""
        self._settle_soon()
        self._env.run()
        return self._scheduler.execution()

    def _settle_soon(self) -> None:
        if not self._settling:
            self._settling = True
            event = simpy.Event(self._env)
            event._ok, event._value = True, None
            event.callbacks.append(self._settle)
            self._env.schedule(event, priority=SETTLE_PRIORITY)

    def _settle(self, _: simpy.Event) -> None:
        self._settling = False
        self._scheduler.advance()
        for resource in range(len(self._free)):
            self._dispatch(resource)

    def _dispatch(self, resource: int) -> None:
        while self._free[resource] and (task := self._scheduler.pop(resource)) is not None:
            self._free[resource] -= 1
            timeout = self._env.timeout(self._graph.duration_ns[task], value=task)
            timeout.callbacks.append(self._finish)

    def _finish(self, timeout: simpy.Event) -> None:
        task = int(timeout.value)  # type: ignore[arg-type]
        self._free[self._graph.resource[task]] += 1
        self._scheduler.complete(task)
        self._settle_soon()


def execute_simpy(program: Program) -> Execution:
    """Run a program on SimPy (integer nanoseconds)."""
    return SimpyExecutor(program).run()


def run_simpy(program: Program) -> pd.DataFrame:
    """Run a program on SimPy and return its ``tasks`` table (integer nanoseconds)."""
    return execute_simpy(program).table()
