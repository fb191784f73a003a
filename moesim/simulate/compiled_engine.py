"""The memory of the compiled executor, and how it grows: arrays in Python, loops in `kernels/`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from moesim.errors import CheckError
from moesim.lowering.graph import Resource
from moesim.lowering.task_arrays import TaskArrays
from moesim.simulate.execution import plain

if TYPE_CHECKING:
    from moesim.simulate.kernels.generic_state import State

MAX_LANES = 1 << 30
PER_TASK = ("node", "duration", "priority", "ready", "start", "woken")


class Rows(NamedTuple):
    """New tasks: int32[task], int64[task], int64[task], int64[task + 1], int64[...]; `deps` in rows of the engine."""

    resource: np.ndarray
    duration_ns: np.ndarray
    priority: np.ndarray
    offsets: np.ndarray
    deps: np.ndarray


def rows_of(arrays: TaskArrays, deps: np.ndarray | None = None) -> Rows:
    """Return the columns of tasks in the types that the kernels were compiled for."""
    return Rows(
        plain(arrays.resource, np.int32), plain(arrays.duration_ns, np.int64), plain(arrays.priority, np.int64),
        plain(arrays.dep_offsets, np.int64), plain(arrays.deps if deps is None else deps, np.int64))


class Engine:
    """Tasks of one run and the clock. A task is named by its row, which `compact` may change.

    Raises (from `register`): CheckError for a task on a resource that does not exist.
    """

    def __init__(self, resources: Sequence[Resource]) -> None:
        from moesim.simulate.kernels import generic, generic_compact, generic_queues
        from moesim.simulate.kernels import generic_state as k

        self._k, self._loop, self._queues, self._compact = k, generic, generic_queues, generic_compact.compact
        size = len(resources)
        self._lanes = sum(resource.capacity for resource in resources)
        counters = np.zeros(k.NUM_COUNTERS, np.int64)
        counters[k.BARRIER] = -1
        self.state: State = k.State(
            node=np.empty((0, 4), np.int32), edge=np.empty((0, 2), np.int32), woken=np.empty(0, np.int32),
            **{name: np.empty(0, np.int64) for name in ("duration", "priority", "ready", "start")},
            tree=np.empty((0, 2), np.int32), running=np.empty((0, 2), np.int64), counters=counters,
            free=np.array([min(resource.capacity, MAX_LANES) for resource in resources], np.int32),
            touched=np.zeros(size, np.uint8), touch=np.empty(size, np.int32), waiting=np.zeros(size, np.uint64),
            roots=np.full(size, -1, np.int32), ends=np.full((size, 2), -1, np.int32),
            classes=np.zeros(k.MAX_CLASSES, np.int64))
        self._counters = counters

    def __len__(self) -> int:
        return int(self._counters[self._k.NUM_TASKS])

    @property
    def now_ns(self) -> int:
        """The current time."""
        return int(self._counters[self._k.NOW])

    @property
    def in_heaps(self) -> bool:
        """Whether the queues are heaps (many priorities, or changes of priority) and no longer lists."""
        return bool(self._counters[self._k.IN_HEAPS])

    def register(self, rows: Rows) -> None:
        """Take over new tasks; what they need is looked at by `advance`."""
        worst = int(rows.resource.max(initial=-1))
        if worst >= len(self.state.free):
            raise CheckError(f"a task names resource {worst}; there are {len(self.state.free)}")
        self._know_priorities(rows.priority)
        self._make_room(len(rows.resource), len(rows.deps))
        self._loop.register(self.state, *rows)

    def advance(self, first: int, awaited: int) -> bool:
        """Look at the tasks from row `first` on and go on until `awaited` is done (True) or nothing runs (False)."""
        return bool(self._loop.advance(self.state, first, awaited))

    def columns(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return ready, start, end and priority, int64[row], and bool[row], whether cancelled; views, until it goes on."""
        state, size = self.state, len(self)
        start = state.start[:size]
        end = np.where(start >= 0, start + state.duration[:size], -1)
        cancelled = state.node[:size, self._k.UNMET] > self._k.CANCELLED_UNMET // 2
        return state.ready[:size], start, end, state.priority[:size], cancelled

    def compact(self) -> None:
        """Forget the tasks that are done; the others keep their order and get the rows from 0 on."""
        self._compact(self.state)

    # ------------------------------------------------------------ what a decision may change

    def cancel(self, row: int) -> None:
        """Withdraw a task that has not started and that nothing waits for."""
        if self.in_heaps and self._is_queued(row):
            self._queues.withdraw(self.state, row)
        self.state.node[row, self._k.UNMET] = self._k.CANCELLED_UNMET

    def is_cancelled(self, row: int) -> bool:
        """Whether a task was cancelled."""
        return bool(self.state.node[row, self._k.UNMET] > self._k.CANCELLED_UNMET // 2)

    def children(self, row: int) -> list[int]:
        """Return the tasks that wait for one, ascending."""
        found, edge = set(), int(self.state.node[row, self._k.EDGE])
        while edge >= 0:
            following, child = self.state.edge[edge].tolist()
            found.add(child)
            edge = following
        return sorted(found)

    def set_priority(self, row: int, priority: int) -> None:
        """Change the priority of a task that has not started."""
        if self._is_queued(row) and not self.is_cancelled(row):
            self._use_heaps()
            self._queues.change_priority(self.state, row, priority)
            return
        self._know_priorities(np.array([priority], np.int64))
        self.state.priority[row] = priority
        self._set_class(row, priority)

    def _is_queued(self, row: int) -> bool:
        """Whether a task that has not started is in a queue: ready, but not only since this instant."""
        return 0 <= int(self.state.ready[row]) < self.now_ns

    def _set_class(self, row: int, priority: int) -> None:
        code, bits = int(self.state.node[row, self._k.CODE]), int(self._counters[self._k.CLASS_BITS])
        if code >= 0 and not self.in_heaps:
            known = self.state.classes[:self._counters[self._k.NUM_CLASSES]]
            self.state.node[row, self._k.CODE] = (code >> bits << bits) | int(np.searchsorted(known, priority))

    # ------------------------------------------------------------ queues and memory

    def _know_priorities(self, priority: np.ndarray) -> None:
        """Give every priority a class, or go over to heaps if there are too many."""
        if self.in_heaps:
            return
        found, num_classes = np.empty(self._k.MAX_CLASSES + 1, np.int64), int(self._counters[self._k.NUM_CLASSES])
        count = self._queues.new_priorities(self.state.classes, num_classes, priority, found)
        if count + num_classes > self._k.MAX_CLASSES:
            self._use_heaps()
        elif count:
            self._set_classes(np.union1d(self.state.classes[:num_classes], found[:count]))

    def _set_classes(self, known: np.ndarray) -> None:
        """Make room for classes between those there are: lists and codes move to their new places."""
        state, old = self.state, self.state.classes[:self._counters[self._k.NUM_CLASSES]]
        old_bits, bits = int(self._counters[self._k.CLASS_BITS]), int(len(known) - 1).bit_length()
        place = np.searchsorted(known, old).astype(np.int32)
        ends = np.full((len(state.free), 1 << bits, 2), -1, np.int32)
        ends[:, place] = state.ends.reshape(len(state.free), -1, 2)[:, :len(old)]
        codes = state.node[:len(self), self._k.CODE]
        queued = codes >= 0
        codes[queued] = (codes[queued] >> old_bits << bits) | place[codes[queued] & ((1 << old_bits) - 1)]
        state.waiting[:] = ((ends[:, :len(known), 0] >= 0) << np.arange(len(known), dtype=np.uint64)).sum(
            axis=1, dtype=np.uint64)
        state.classes[:len(known)] = known
        self._counters[self._k.CLASS_BITS], self._counters[self._k.NUM_CLASSES] = bits, len(known)
        self.state = state._replace(ends=ends.reshape(-1, 2))

    def _use_heaps(self) -> None:
        if not self.in_heaps:
            self.state = self.state._replace(tree=np.full((len(self.state.node), 2), -1, np.int32))
            self._queues.lists_to_heaps(self.state)

    def _make_room(self, tasks: int, edges: int) -> None:
        state, size, num_edges = self.state, len(self), int(self._counters[self._k.NUM_EDGES])
        if size + tasks <= len(state.node) and num_edges + edges <= len(state.edge):
            return
        names = (*PER_TASK, "tree") if self.in_heaps else PER_TASK
        grown = {name: _grown(getattr(state, name), size, size + tasks) for name in names}
        lanes = min(self._lanes, len(grown["node"]))
        grown["running"] = _grown(state.running, int(self._counters[self._k.NUM_RUNNING]), lanes)
        grown["edge"] = _grown(state.edge, num_edges, num_edges + edges)
        self.state = state._replace(**grown)


def _grown(array: np.ndarray, used: int, needed: int) -> np.ndarray:
    """Return an array with room for `needed` entries and the first `used` of it; it at least doubles."""
    if len(array) >= needed:
        return array
    larger = np.empty((max(needed, 2 * len(array)), *array.shape[1:]), array.dtype)
    larger[:used] = array[:used]
    return larger
