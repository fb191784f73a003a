"""What the compiled offload engine starts from: the program's cache, policy, queues and costs, as arrays."""

from __future__ import annotations

from itertools import chain
from typing import NamedTuple

import numpy as np

from moesim.cache.policies.belady import BeladyBypassPolicy, BeladyPolicy
from moesim.cache.policies.lfu import LfuPolicy, LfuResidentPolicy
from moesim.cache.policies.lru import LruPolicy
from moesim.cache.policies.static import StaticPolicy
from moesim.cache.prefetch import NoPrefetch
from moesim.lowering.graph import KINDS
from moesim.lowering.machine import STAGING_SLOTS
from moesim.lowering.offload import OffloadProgram
from moesim.lowering.offload_policy import MISSES
from moesim.lowering.task_arrays import SOURCE_NAMES
from moesim.simulate import compiled_offload_layout as k
from moesim.units import ns_from_s

# In the order of the codes LRU ... STATIC of `kernels.offload_state`.
POLICY_TYPES = (LruPolicy, LfuPolicy, LfuResidentPolicy, BeladyPolicy, BeladyBypassPolicy, StaticPolicy)
# In the order of the places K_BARRIER ... K_PREFETCH of `kernels.offload_rows`.
ROW_KINDS = ("barrier", "attention", "router", "dense", "head", "shared_expert", "expert", "cpu_expert", "send",
             "receive", "load", "admit", "prefetch")
RANK_BITS = 62


class Future(NamedTuple):
    """Belady's future by key: the rising places of each key's uses, key after key, where each key's begin and end, and
    the first place of each access."""

    uses: np.ndarray
    first: np.ndarray
    last: np.ndarray
    bounds: np.ndarray


def ranks_fit(program: OffloadProgram) -> bool:
    """Return whether the worth of a key and its address fit into one 64-bit rank for as long as the run is."""
    horizon = _horizon(program)
    largest = horizon
    if isinstance(program.cache.policy, LfuPolicy):
        largest = (len(program.steps) + 1) * horizon
    if isinstance(program.cache.policy, BeladyPolicy):
        largest = _never(program)
    return largest << _key_bits(program) < 1 << RANK_BITS


def make_state(program: OffloadProgram, largest: int, *, emit: bool) -> np.ndarray:
    """Return `m` (see `kernels.offload_state`) before the first step.

    Args:
        largest: tokens of the largest step; the tables by tokens reach so far, and `CostTables` fills them.
        emit: whether a task table will be written.
    """
    numbers = _numbers(program, largest, emit=emit)
    regions = _cache_regions(program, numbers) | _wire_regions(program, numbers) | _layer_regions(program, numbers)
    bases = np.cumsum([k.HEAD_CELLS, *(regions[name].size for name in k.REGIONS[:-1])])
    head = np.zeros(k.HEAD_CELLS, np.int64)
    head[:len(k.NUMBERS)] = [numbers[name] for name in k.NUMBERS]
    head[k.KEYS:] = bases
    head[k.LAST_TASK] = -1
    m = np.concatenate([head, *(regions[name].ravel() for name in k.REGIONS)])
    _set_addresses(m)
    return m


def _numbers(program: OffloadProgram, largest: int, *, emit: bool) -> dict[str, int]:
    """The numbers in the head of `m` (wires by their index)."""
    cache, machine, prefetcher = program.cache, program.machine, program.prefetcher
    return {
        "num_layers": cache.num_layers, "num_experts": cache.num_experts,
        "num_chunks": len(program.transfers.chunk_bytes), "num_hops": len(machine.route),
        "num_wires": len(machine.resources()) - k.FIRST_WIRE, "send_wire": machine.out_index - k.FIRST_WIRE,
        "receive_wire": machine.in_index - k.FIRST_WIRE, "policy": POLICY_TYPES.index(type(cache.policy)),
        "miss": MISSES.index(program.policy.miss), "admit": program.policy.admit, "shared": cache.shared,
        "pool_slots": cache.num_slots if cache.shared else cache.slots_per_layer, "num_slots": cache.num_slots,
        "key_bits": _key_bits(program), "horizon": _horizon(program), "never": _never(program),
        "has_shared_expert": program.model.shared_intermediate_size > 0,
        "has_prefetch": prefetcher is not None and type(prefetcher) is not NoPrefetch, "num_sizes": largest + 1,
        "emit": emit}


def _cache_regions(program: OffloadProgram, numbers: dict[str, int]) -> dict[str, np.ndarray]:
    """Keys, slots and Belady's future; places of uses are still counted from the first."""
    future = _future(program)
    free_slots, num_free = _free_slots(program, numbers["pool_slots"])
    keys = np.full((numbers["num_layers"] * numbers["num_experts"], k.KEY_CELLS), -1, np.int64)
    keys[:, k.K_SLOT] = program.cache._slot
    keys[:, k.K_USES] = future.first
    policy = program.cache.policy
    if isinstance(policy, StaticPolicy):
        keys[sorted(policy._members), k.K_USES] = 1
    worth = np.zeros(len(keys), np.int64)
    if isinstance(policy, BeladyPolicy):
        used = future.first < future.last
        worth[:] = -numbers["never"]
        worth[used] = -1 - future.uses[future.first[used]]
    keys[:, k.K_RANK] = (worth << numbers["key_bits"]) + k.HEAD_CELLS + np.arange(len(keys)) * k.KEY_CELLS
    ranks = np.full(numbers["num_slots"], k.PROTECTED, np.int64)
    resident = keys[keys[:, k.K_SLOT] >= 0]
    ranks[resident[:, k.K_SLOT]] = resident[:, k.K_RANK]
    return {"keys": keys, "ranks": ranks, "free_slots": free_slots, "num_free": num_free,
            "slot_fetch": np.full(numbers["num_slots"] + STAGING_SLOTS, -1, np.int64), "use_end": future.last,
            "bounds": future.bounds, "uses": future.uses}


def _wire_regions(program: OffloadProgram, numbers: dict[str, int]) -> dict[str, np.ndarray]:
    """Copies, wires and the route; wires are still named by their index."""
    hops, chunks = numbers["num_hops"], numbers["num_chunks"]
    places = 1 + chunks * (hops - 1)
    fetches = np.full((_num_fetches(numbers), k.F_HOPS + 2 * hops + places * k.NODE_CELLS), -1, np.int64)
    fetches[:, k.F_RUNNING] = 0
    hop = k.F_HOPS + 2 * hops + k.N_HOP + k.NODE_CELLS * np.arange(places)
    fetches[:, hop] = np.concatenate([[0], np.tile(np.arange(1, hops), chunks)])
    wires = np.full((numbers["num_wires"], k.WIRE_CELLS), -1, np.int64)
    wires[:, k.W_END] = 0
    hop_ns, hop_source = _hops(program)
    return {"fetches": fetches, "wires": wires, "route": np.array(program.machine.route_indexes, np.int64) - k.FIRST_WIRE,
            "hop_ns": hop_ns, "hop_source": hop_source, "chunk_bytes": np.array(program.transfers.chunk_bytes, np.int64),
            "copies": np.zeros(3 * hops * chunks, np.int64)}


def _layer_regions(program: OffloadProgram, numbers: dict[str, int]) -> dict[str, np.ndarray]:
    """What one layer needs for itself, the counts, and the tables by tokens."""
    experts, sizes = numbers["num_experts"], numbers["num_sizes"]
    chains = np.zeros((experts, k.CHAIN_CELLS), np.int64)
    chains[:, k.H_SEND + k.N_HOP], chains[:, k.H_RECEIVE + k.N_HOP] = k.SENDING, k.RECEIVING
    lists = dict.fromkeys(("ahead_list", "late", "misses", "staged"), experts)
    lists |= {"cpu_queue": 2 * experts, "stage_queue": 2 * experts, "awaited": experts + 1,
              "users": max(numbers["num_chunks"] + 1, numbers["num_wires"])}
    lists |= {"counts": numbers["num_layers"] * k.NUM_COUNTS, "works": k.NUM_WORKS * sizes * k.WORK_CELLS}
    lists |= dict.fromkeys(("on_cpu", "cpu_done", "asked"), sizes)
    layers = np.full(program.model.num_layers, -1, np.int64)
    layers[list(program.model.moe_layers)] = np.arange(program.model.num_moe_layers)
    return {"chains": chains, "layers": layers, "kinds": np.array([KINDS.index(name) for name in ROW_KINDS], np.int64),
            **{name: np.full(experts, -1, np.int64) for name in ("wanted", "ahead")},
            **{name: np.zeros(size, np.int64) for name, size in lists.items()}}


def _set_addresses(m: np.ndarray) -> None:
    """Turn indexes into addresses, link the free copies, and tell places in queues whose they are."""
    view(m, k.ROUTE)[:] = m[k.WIRES] + view(m, k.ROUTE) * k.WIRE_CELLS
    for wire in (k.SEND_WIRE, k.RECEIVE_WIRE):
        m[wire] = m[k.WIRES] + m[wire] * k.WIRE_CELLS
    if m[k.POLICY] in (k.BELADY, k.BELADY_BYPASS):
        view(m, k.KEYS, k.KEY_CELLS)[:, k.K_USES] += m[k.USES]
        view(m, k.USE_END)[:] += m[k.USES]
    places = 1 + m[k.NUM_CHUNKS] * (m[k.NUM_HOPS] - 1)
    first_place = k.F_HOPS + 2 * m[k.NUM_HOPS]
    fetches = view(m, k.FETCHES, int(first_place + places * k.NODE_CELLS))
    address = m[k.FETCHES] + np.arange(len(fetches)) * fetches.shape[1]
    fetches[:, k.F_NEXT], m[k.FREE_FETCH] = np.append(address[1:], -1), address[0]
    fetches[:, first_place + k.N_OWNER::k.NODE_CELLS] = address[:, None]
    chains = view(m, k.CHAINS, k.CHAIN_CELLS)
    address = m[k.CHAINS] + np.arange(len(chains)) * k.CHAIN_CELLS
    chains[:, k.H_SEND + k.N_OWNER], chains[:, k.H_RECEIVE + k.N_OWNER] = address, address


def view(m: np.ndarray, region: int, *shape: int) -> np.ndarray:
    """Return a region of `m` as [..., *shape], to read or to write."""
    last = m[region + 1] if region + 1 < k.HEAD_CELLS else len(m)
    return m[m[region]:last].reshape(-1, *shape) if shape else m[m[region]:last]


def _num_fetches(numbers: dict[str, int]) -> int:
    """One copy per slot, what still runs of cancelled ones, and those of one layer that pass through."""
    return numbers["num_slots"] + numbers["num_wires"] + numbers["num_experts"] + 1


def _key_bits(program: OffloadProgram) -> int:
    """Bits of the largest address of a key (keys come first)."""
    return (k.HEAD_CELLS + k.KEY_CELLS * program.cache.num_layers * program.cache.num_experts).bit_length()


def _horizon(program: OffloadProgram) -> int:
    return len(program.steps) * program.cache.num_layers + 2


def _never(program: OffloadProgram) -> int:
    policy = program.cache.policy
    return _horizon(program) + (policy._offsets[-1] if isinstance(policy, BeladyPolicy) else 0)


def _future(program: OffloadProgram) -> Future:
    policy, num_keys = program.cache.policy, program.cache.num_layers * program.cache.num_experts
    if not isinstance(policy, BeladyPolicy):
        nothing = np.zeros(num_keys, np.int64)
        return Future(np.zeros(0, np.int64), nothing, nothing.copy(), np.zeros(1, np.int64))
    last = np.cumsum([len(uses) for uses in policy._uses], dtype=np.int64)
    uses = np.fromiter(chain.from_iterable(policy._uses), np.int64, int(last[-1]))
    return Future(uses, np.concatenate([[0], last[:-1]]), last, np.array(policy._offsets, np.int64))


def _free_slots(program: OffloadProgram, pool_slots: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the heaps of free slots, one after the other, and their sizes."""
    pools = program.cache._free
    free = np.zeros((len(pools), pool_slots), np.int64)
    for pool, slots in enumerate(pools):
        free[pool, :len(slots)] = slots
    return free, np.array([len(slots) for slots in pools], np.int64)


def _hops(program: OffloadProgram) -> tuple[np.ndarray, np.ndarray]:
    """int64[chunk, hop]: nanoseconds and sources (codes into `SOURCE_NAMES`) of the copies of one expert."""
    cost = program.cost.uncounted()
    overhead_s = cost.task_overhead("load").seconds
    costs = [[cost.copy(link.name, size) for link in program.machine.route] for size in program.transfers.chunk_bytes]
    hop_ns = [[max(1, ns_from_s(hop.seconds + overhead_s)) for hop in hops] for hops in costs]
    sources = [[SOURCE_NAMES.index(hop.source) for hop in hops] for hops in costs]
    return np.array(hop_ns, np.int64), np.array(sources, np.int64)


