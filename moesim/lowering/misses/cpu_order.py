"""The order of the CPU's experts: rows out, compute, results back, a flow shop of three machines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moesim.lowering.misses.makespan import CpuJob, results_ns

MOST_STATES = 20_000


@dataclass(frozen=True)
class CpuOrder:
    """The jobs' kinds in order, when the last result is back, and what is proven.

    `bound_ns`: no order ends before it, or before the time that was said to be enough.
    """

    kinds: tuple[int, ...]
    end_ns: int
    bound_ns: int


def best_cpu_order(jobs: Sequence[CpuJob], counts: Sequence[int], loads_end: int, enough_ns: int,
                   below_ns: int | None = None) -> CpuOrder:
    """Return the best order of `counts[k]` jobs of each kind; any order is enough that ends by `enough_ns`.

    Known rules first; where none of them is enough, all orders, one job after the other, keeping of equal sets of jobs the
    unbeaten times only and dropping what cannot end before the best, or before `below_ns`. Beyond `MOST_STATES` of one length
    the search gives up.
    """
    rows = [kind for kind, number in enumerate(counts) for _ in range(number)]
    best = min(_rules(jobs, rows), key=lambda order: _end(jobs, order, loads_end))
    end = _end(jobs, best, loads_end)
    if end <= enough_ns:
        return CpuOrder(tuple(best), end, end)
    below = end if below_ns is None else min(end, below_ns)
    found, complete = _search(jobs, counts, loads_end, below)
    if found is None:
        return CpuOrder(tuple(best), end, below if complete else min(enough_ns, below))
    end = _end(jobs, found, loads_end)
    return CpuOrder(tuple(found), end, end)


def _end(jobs: Sequence[CpuJob], order: Sequence[int], loads_end: int) -> int:
    return max(results_ns([jobs[kind] for kind in order], loads_end), default=0)


def _rules(jobs: Sequence[CpuJob], rows: list[int]) -> Iterator[list[int]]:
    """Yield orders that are best where one machine dominates, or two.

    By short ways at both ends (the CPU dominates); Johnson's rule on two machines, and on the sums of Campbell, Dudek and Smith
    (Management Science 16(10), 1970); rising and then falling (best where the CPU's part is each job's longest and
    longer jobs are longer on every machine: Smith, Panwalkar, Dudek, Naval Research Logistics Quarterly 23, 1976).
    """
    ways = sorted(rows, key=lambda kind: jobs[kind].there_ns + jobs[kind].back_ns)
    yield ways[:1] + ways[2:] + ways[1:2]
    yield _johnson(rows, [job.there_ns for job in jobs], [job.cpu_ns for job in jobs])
    yield _johnson(rows, [job.cpu_ns for job in jobs], [job.back_ns for job in jobs])
    yield _johnson(rows, [job.there_ns + job.cpu_ns for job in jobs], [job.cpu_ns + job.back_ns for job in jobs])
    yield ways[::2] + ways[1::2][::-1]


def _johnson(rows: list[int], first: list[int], second: list[int]) -> list[int]:
    """Return Johnson's order on two machines."""
    return sorted(rows, key=lambda kind: (0, first[kind]) if first[kind] <= second[kind] else (1, -second[kind]))


@dataclass(frozen=True)
class _State:
    """A beginning of an order: when the CPU and the link back are free."""

    computed: int
    link: int
    order: tuple[int, ...]


def _search(jobs: Sequence[CpuJob], counts: Sequence[int], loads_end: int, below: int) -> tuple[list[int] | None, bool]:
    """Return an order that ends below `below`, the best there is, and whether all were looked through."""
    level = {(0,) * len(counts): [_State(0, loads_end, ())]}
    for _ in range(sum(counts)):
        following: dict[tuple[int, ...], list[_State]] = {}
        for placed, states in level.items():
            for kind in range(len(jobs)):
                if placed[kind] < counts[kind]:
                    _extend(jobs, counts, placed, states, kind, below, following)
        level = following
        if sum(map(len, level.values())) > MOST_STATES:
            return None, False
    orders = [list(state.order) for states in level.values() for state in states]
    best = min(orders, key=lambda order: _end(jobs, order, loads_end), default=None)
    return (best if best is not None and _end(jobs, best, loads_end) < below else None), True


def _extend(jobs: Sequence[CpuJob], counts: Sequence[int], placed: tuple[int, ...], states: list[_State], kind: int, below: int,
            following: dict[tuple[int, ...], list[_State]]) -> None:
    """Put one more job of a kind behind each state, if that can still end below `below`."""
    after = tuple(number + (each == kind) for each, number in enumerate(placed))
    left = [each for each in range(len(jobs)) for _ in range(counts[each] - after[each])]
    sent = sum(jobs[each].there_ns * number for each, number in enumerate(after))
    for state in states:
        computed = max(state.computed, sent) + jobs[kind].cpu_ns
        back_ns = jobs[kind].back_ns
        link = max(state.link, computed) + back_ns if back_ns else state.link
        if _least_end(jobs, left, sent, computed, link) < below:
            _keep(following.setdefault(after, []), _State(computed, link, (*state.order, kind)))


def _least_end(jobs: Sequence[CpuJob], left: list[int], sent: int, computed: int, link: int) -> int:
    """Return a time before which no order of the jobs left can be done."""
    if not left:
        return computed  # the link may be busy with loads only
    rest = [jobs[kind] for kind in left]
    begins = max(computed, sent + min(job.there_ns for job in rest))
    return max(begins + sum(job.cpu_ns for job in rest) + min(job.back_ns for job in rest),
               sent + sum(job.there_ns for job in rest) + min(job.cpu_ns + job.back_ns for job in rest),
               link + sum(job.back_ns for job in rest) if any(job.back_ns for job in rest) else 0)


def _keep(front: list[_State], state: _State) -> None:
    """Add a state to those of the same jobs, unless one of them is nowhere later; drop those that it beats."""
    if any(other.computed <= state.computed and other.link <= state.link for other in front):
        return
    front[:] = [other for other in front if not (state.computed <= other.computed and state.link <= other.link)]
    front.append(state)
