"""In which order a layer's planes are loaded: D2MoE's hottest-expert-bit-first, and the exact best.

A layer is a flow shop of two machines: the link loads items one after the other, the device computes each when its planes are
in. Items of one expert must be loaded from its lowest level up.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np

from moesim.errors import InputError

ORDERS = ("hebf", "id")
MOST_STATES = 1 << 20


class Item(NamedTuple):
    """The choices of one expert at one level: time to load the planes still missing, and time to compute them."""

    expert: int
    level: int
    io_ns: int
    compute_ns: int


def hebf_order(counts: np.ndarray) -> list[tuple[int, int]]:
    """Return (expert, level) in the order of loading: hottest expert bit first (D2MoE, arXiv 2504.15299, HEBF).

    Every expert has a queue of its chosen levels, rising. The head with the most choices goes to the link next. Ties (not in the
    paper): the lower level, then the lower expert.

    Args:
        counts: int[expert, level], choices; a level without any is not loaded for itself.
    """
    queues = {expert: np.flatnonzero(row).tolist() for expert, row in enumerate(counts) if row.any()}
    order = []
    while queues:
        _, level, expert = min((-int(counts[expert, queue[0]]), queue[0], expert) for expert, queue in queues.items())
        order.append((expert, level))
        queues[expert].pop(0)
        if not queues[expert]:
            del queues[expert]
    return order


def id_order(counts: np.ndarray) -> list[tuple[int, int]]:
    """Return (expert, level) by expert id, then level."""
    return [(int(expert), int(level)) for expert, level in np.argwhere(counts)]


def load_order(name: str, counts: np.ndarray) -> list[tuple[int, int]]:
    """Return the order of a name of `ORDERS`; raises InputError for another."""
    if name not in ORDERS:
        raise InputError(f"load order must be one of {', '.join(ORDERS)}, got {name!r}")
    return hebf_order(counts) if name == "hebf" else id_order(counts)


def makespan_ns(items: Iterable[Item]) -> int:
    """Return when the last item is computed: loads in this order, each computed when it is in and the device is free."""
    loaded = computed = 0
    for item in items:
        loaded += item.io_ns
        computed = max(computed, loaded) + item.compute_ns
    return computed


def best_order(items: Sequence[Item]) -> list[Item]:
    """Return an order of least makespan, by dynamic programming over how far each expert's queue has got.

    What has been loaded fixes how long the link took; the device is then free the earlier the better. So of all orders that
    load the same items the one that is computed first suffices. (Computing in the order of loading is optimal: a device that
    never waits with work at hand ends as early as any.)

    Raises:
        InputError: more than about a million states.
    """
    chains: dict[int, list[Item]] = {}
    for item in sorted(items):
        chains.setdefault(item.expert, []).append(item)
    queues = list(chains.values())
    if math.prod(len(queue) + 1 for queue in queues) > MOST_STATES:
        raise InputError(f"best order: {len(queues)} experts with {len(items)} items are too many for the exact search")
    came_from = _forward(queues)
    state, order = tuple(len(queue) for queue in queues), []
    while any(state):
        place = came_from[state]
        state = (*state[:place], state[place] - 1, *state[place + 1:])
        order.append(queues[place][state[place]])
    return order[::-1]


def _forward(queues: Sequence[Sequence[Item]]) -> Mapping[tuple[int, ...], int]:
    """Return, for every state, the queue whose item came last on the way there that ends first."""
    done: dict[tuple[int, ...], int] = {(0,) * len(queues): 0}
    came_from: dict[tuple[int, ...], int] = {}
    for state in product(*(range(len(queue) + 1) for queue in queues)):
        loaded = sum(item.io_ns for queue, count in zip(queues, state, strict=True) for item in queue[:count])
        for place, count in enumerate(state):
            if not count:
                continue
            before = (*state[:place], count - 1, *state[place + 1:])
            end = max(done[before], loaded) + queues[place][count - 1].compute_ns
            if state not in came_from or end < done[state]:
                done[state], came_from[state] = end, place
    return came_from
