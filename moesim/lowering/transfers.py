"""Copies of experts into slots: chunked, promotable, cancellable; a slot is not overwritten while in use."""

from __future__ import annotations

from dataclasses import dataclass

from moesim.hardware.cost import CostModel
from moesim.hardware.work import Cost
from moesim.lowering.graph import PRIORITY_DEMAND, ExecutorView, TaskGraph
from moesim.lowering.machine import STAGING_SLOTS, OffloadMachine
from moesim.units import ns_from_s


@dataclass
class _Fetch:
    """One expert's copy: per chunk the tasks over the links of the route; `demanded` once something waits for it."""

    chunks: list[list[int]]
    slot: int
    demanded: bool

    def last_hops(self) -> list[int]:
        return [hops[-1] for hops in self.chunks]


class Transfers:
    """Emits copy tasks and remembers which are under way.

    `view` must be set before use (a program does so when its executor starts it).
    """

    def __init__(
        self,
        graph: TaskGraph,
        machine: OffloadMachine,
        cost: CostModel,
        expert_bytes: int,
        chunks: int,
        num_slots: int,
        num_experts: int,
    ) -> None:
        self.graph, self.machine, self.cost, self.num_experts = graph, machine, cost, num_experts
        self.num_chunks = chunks
        self.chunk_bytes = self.cut(expert_bytes)
        self.view: ExecutorView | None = None
        self._fetches: dict[int, _Fetch] = {}
        self._users: dict[int, list[int]] = {}
        self._staging = [num_slots + place for place in range(STAGING_SLOTS)]
        self._overhead_s = cost.task_overhead("load").seconds
        self._prices: dict[int, list[tuple[Cost, int]]] = {}
        self._hop_costs = [[hop for hop, _ in self._price(size)] for size in self.chunk_bytes]
        self._hop_ns = [[ns for _, ns in self._price(size)] for size in self.chunk_bytes]

    def cut(self, num_bytes: int) -> list[int]:
        """Return the chunks of a copy of `num_bytes`, in bytes."""
        base, extra = divmod(num_bytes, self.num_chunks)
        return [base + (place < extra) for place in range(self.num_chunks) if base + (place < extra)]

    def _price(self, num_bytes: int) -> list[tuple[Cost, int]]:
        """Return cost and ns of one chunk on each link of the route."""
        if num_bytes not in self._prices:
            hops = [self.cost.copy(link.name, num_bytes) for link in self.machine.route]
            self._prices[num_bytes] = [(hop, ns_from_s(hop.seconds + self._overhead_s)) for hop in hops]
        return self._prices[num_bytes]

    def seconds(self) -> float:
        """Seconds to fetch one expert with nothing in the way (all chunks over the slowest link, one over the others)."""
        per_link = [sum(hops[place].seconds for hops in self._hop_costs) for place in range(len(self.machine.route))]
        first = [hop.seconds for hop in self._hop_costs[0]]
        return max(per_link) + sum(first) - max(first)

    def staging_slot(self) -> int:
        """Return the staging slots in turn (for experts that are used once and not kept)."""
        self._staging.append(self._staging.pop(0))
        return self._staging[-1]

    def use(self, slot: int, task: int) -> None:
        """Note that a task reads a slot; the next copy into the slot waits for it."""
        self._users.setdefault(slot, []).append(task)

    def fetch(
        self,
        key: int,
        slot: int,
        kind: str,
        priority: int,
        after: int,
        step: int,
        *,
        resident: bool = True,
        num_bytes: int | None = None,
    ) -> int:
        """Emit the copy of one expert into a slot; returns the task that ends it.

        Args:
            after: the decision that asks for the copy. resident: whether the expert stays known (False: staging).
            num_bytes: of another version of the expert (None: the model's).
        """
        first_hop = self._first_hop(key)
        deps = [after, *self._awaited(key)]
        users = [task for task in self._users.get(slot, []) if not self._view.is_done(task)]
        sizes = self.chunk_bytes if num_bytes is None else self.cut(num_bytes)
        chunks = [
            self._copy_chunk(key, slot, kind, priority, [*deps, *users], step, place, size, first_hop)
            for place, size in enumerate(sizes)
        ]
        fetch = _Fetch(chunks, slot, demanded=kind == "load")
        self._users[slot] = fetch.last_hops()
        if resident:
            self._fetches[key] = fetch
        return self._arrival(fetch) if fetch.demanded else fetch.last_hops()[-1]

    def _copy_chunk(
        self, key: int, slot: int, kind: str, priority: int, deps: list[int], step: int, place: int, size: int, first: int
    ) -> list[int]:
        """Emit the copies of one chunk over the links of the route; returns their tasks."""
        layer, expert = divmod(key, self.num_experts)
        hops: list[int] = []
        for resource, (cost, ns) in list(zip(self.machine.route_indexes, self._price(size), strict=True))[first:]:
            task = self.graph.add(
                kind, resource, ns, deps, priority=priority, step=step, layer=layer, expert=expert, slot=slot,
                chunk=place, num_bytes=size, source=cost.source)
            deps, hops = [task], [*hops, task]
        return hops

    def _first_hop(self, key: int) -> int:
        """Return the link of the route at which a copy begins: later than 0 where a memory on the way holds the expert."""
        del key
        return 0

    def _awaited(self, key: int) -> list[int]:
        """Return what a copy waits for where a memory on the way is still receiving the expert."""
        del key
        return []

    def write_back(self, key: int, slot: int, after: int, step: int) -> None:
        """Copy an expert that leaves its slot back to the slow memory, chunk by chunk, with nobody waiting.

        The newcomer may land at the same time: it goes through a buffer of its own (Mixtral-offloading's swap).
        """
        layer, expert = divmod(key, self.num_experts)
        for place, size in enumerate(self.chunk_bytes):
            cost, ns = self._price(size)[-1]
            self.graph.add(
                "write_back", self.machine.back_index, ns, [after], priority=PRIORITY_DEMAND, step=step, layer=layer,
                expert=expert, slot=slot, chunk=place, num_bytes=size, source=cost.source)

    def _arrival(self, fetch: _Fetch) -> int:
        last = fetch.last_hops()
        return last[0] if len(last) == 1 else self.graph.barrier(last)

    @property
    def _view(self) -> ExecutorView:
        assert self.view is not None
        return self.view

    def has_arrived(self, key: int) -> bool:
        """Whether no copy of this expert is under way (it finished by now, or there never was one)."""
        fetch = self._fetches.get(key)
        if fetch is None:
            return True
        if all(self._view.is_done(task) for task in fetch.last_hops()):
            del self._fetches[key]
            return True
        return False

    def in_background(self, key: int) -> bool:
        """Whether an expert is under way and nothing waits for it."""
        return not self.has_arrived(key) and not self._fetches[key].demanded

    def promote(self, key: int, priority: int) -> list[int]:
        """Give what is left of a copy a new priority; returns what to wait for (nothing if it has arrived)."""
        if self.has_arrived(key):
            return []
        fetch = self._fetches[key]
        fetch.demanded = True
        for hops in fetch.chunks:
            for task in hops:
                if not self._view.is_started(task):
                    self._view.set_priority(task, priority)
        return [self._arrival(fetch)]

    def cancel_rest(self, key: int) -> bool:
        """Cancel the chunks that have not started; returns whether the expert will now never arrive."""
        if self.has_arrived(key):
            return False
        fetch = self._fetches[key]
        waiting = [task for hops in fetch.chunks for task in reversed(hops) if not self._view.is_started(task)]
        if not waiting:
            return False
        for task in waiting:
            self._view.cancel(task)
        gone = set(waiting)
        self._users[fetch.slot] = [task for hops in fetch.chunks for task in hops[-1:] + hops[:-1] if task not in gone]
        del self._fetches[key]
        return True

    def forget(self, key: int) -> None:
        """An expert loses its slot: stop its copy, unless something already waits for it."""
        fetch = self._fetches.get(key)
        if fetch is None:
            return
        if not fetch.demanded:
            self.cancel_rest(key)
        self._fetches.pop(key, None)
