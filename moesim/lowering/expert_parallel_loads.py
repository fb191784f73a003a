"""StepLoads: what expert-parallel steps ask of a machine, in tokens; made once for many machines.

It depends on the trace, the plan, the steps and which ranks share nodes and ports; not on rates, latencies, kernels,
efficiency or bytes per value. `expert_parallel_prices` puts times to it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from moesim.errors import InputError
from moesim.hardware.cost_arrays import SCOPES, ports
from moesim.hardware.spec import HardwareSpec
from moesim.lowering.expert_parallel import ExpertParallelProgram
from moesim.placement.plan import PlacementPlan

_CHUNK_IDS = 1 << 17  # selections that are copied together out of the trace: they should stay in a core's cache
_WORD = 64


@dataclass(frozen=True)
class StepLoads:
    """Tokens of every step, by rank and by wire; read-only arrays. Layers count MoE layers.

    Attributes:
        tokens, context, heads: int64[step, rank], rows at home on each rank, cached tokens that they attend to,
            requests whose last row is among them.
        expert_tokens, expert_groups, expert_largest: int32[step, layer, rank], rows of each rank's experts, slots
            with rows, rows of the fullest slot.
        wires: int64[step, layer, scope, 3], tokens (once per rank reached) that the busiest port of each scope
            (`SCOPES`) sends, receives, and that pass between an ordered pair of ports (-1: not counted).
        moved: int64[step, layer, scope], tokens sent over each scope; stayed: int64[step, layer], those at home.
        sent: int32[step, layer, rank, rank], from home rank to expert rank, or None.
        port: int64[scope, rank]; ranks_per_node: where the wires are.

    Raises:
        InputError: arrays that do not fit each other.
    """

    tokens: np.ndarray
    context: np.ndarray
    heads: np.ndarray
    expert_tokens: np.ndarray
    expert_groups: np.ndarray
    expert_largest: np.ndarray
    wires: np.ndarray
    moved: np.ndarray
    stayed: np.ndarray
    port: np.ndarray
    ranks_per_node: int
    sent: np.ndarray | None = None

    def __post_init__(self) -> None:
        steps, ranks = self.tokens.shape
        layers = self.expert_tokens.shape[1]
        by_rank, by_layer, scopes = (steps, ranks), (steps, layers), len(SCOPES)
        expected: dict[str, tuple[int, ...]] = {
            **dict.fromkeys(("context", "heads"), by_rank), "wires": (*by_layer, scopes, 3),
            **dict.fromkeys(("expert_tokens", "expert_groups", "expert_largest"), (*by_layer, ranks)),
            "moved": (*by_layer, scopes), "stayed": by_layer, "port": (scopes, ranks)}
        if self.sent is not None:
            expected["sent"] = (*by_layer, ranks, ranks)
        for name, shape in expected.items():
            if getattr(self, name).shape != shape:
                raise InputError(f"step loads: {name} must be {shape}, got {getattr(self, name).shape}")
        for part in fields(self):
            if isinstance(value := getattr(self, part.name), np.ndarray):
                value.setflags(write=False)

    @property
    def num_steps(self) -> int:
        """Number of steps."""
        return self.tokens.shape[0]

    @property
    def num_layers(self) -> int:
        """Number of MoE layers."""
        return self.expert_tokens.shape[1]

    @property
    def num_ranks(self) -> int:
        """Number of ranks."""
        return self.tokens.shape[1]

    @property
    def imbalance(self) -> np.ndarray:
        """float64[step], rows of the busiest rank over the mean, both summed over layers (1 without rows)."""
        busiest, mean = self.expert_tokens.max(axis=2).sum(axis=1), self.expert_tokens.mean(axis=2).sum(axis=1)
        return np.divide(busiest, mean, out=np.ones(len(mean)), where=mean > 0)

    def check_hardware(self, hardware: HardwareSpec) -> None:
        """Raise InputError unless nodes and ports of `hardware` are those that were counted."""
        if (hardware.num_ranks, hardware.ranks_per_node) != (self.num_ranks, self.ranks_per_node):
            raise InputError(f"step loads: counted for {self.num_ranks} ranks, {self.ranks_per_node} per node; "
                             f"hardware {hardware.name!r} has {hardware.num_ranks}, {hardware.ranks_per_node} per node")
        for scope, own in zip(SCOPES, self.port, strict=True):
            fabric = hardware.fabric(scope)
            if fabric is not None and not np.array_equal(own, ports(hardware, fabric)):
                raise InputError(f"step loads: counted with other {scope} ports than hardware {hardware.name!r} has "
                                 f"({fabric.ranks_per_port} ranks per port)")
            if fabric is not None and fabric.contention == "pair" and (self.wires[..., 2] < 0).any():
                raise InputError(f"step loads: pairs of ports were not counted, and fabric {fabric.name!r} needs them")


def step_loads(program: ExpertParallelProgram, *, keep_sent: bool | None = None,
               pairs: bool | None = None) -> StepLoads:
    """Return the loads of all steps of a program.

    Args:
        program: any for which `expert_parallel_arrays.supports` holds; it is not run and not changed.
        keep_sent: keep who sends what (4 bytes per step, layer and pair of ranks): costs under a route efficiency
            other than 1, or with bytes per token whose sums float64 rounds, need it. None: if the program's do.
        pairs: count pairs of ports too: fabrics whose contention is ``pair`` need them. None: if the program's do.

    Raises:
        InputError: a step with rows that the trace does not have.
    """
    return LoadCounter(program, keep_sent=keep_sent, pairs=pairs).count(0, len(program.steps))


class LoadCounter:
    """Counts the loads of any run of steps of one program; its tables are made once.

    Args as `step_loads`.
    """

    def __init__(self, program: ExpertParallelProgram, *, keep_sent: bool | None = None,
                 pairs: bool | None = None) -> None:
        hardware = program.cost.hardware
        if pairs is None:
            pairs = any(fabric.contention == "pair" for fabric in hardware.fabrics)
        if keep_sent is None:
            widths = (program.dispatch_bytes, program.model.activation_bytes)
            most = max((len(record.step.rows) for record in program.steps), default=0) * program.plan.num_ranks
            keep_sent = program.cost.route_efficiency != 1 or not all(
                sums_exactly(program.model.hidden_size * width, most) for width in widths)
        self._trace, self._home, self._num_ranks = program.trace, program.home, program.plan.num_ranks
        self._steps = [record.step for record in program.steps]
        self._choice = _choice(program.plan)
        self.port = scope_ports(hardware)
        self._per_node = hardware.ranks_per_node
        self._net = _net(self.port, np.arange(self._num_ranks) // self._per_node, pairs, keep_sent)
        self._pairs, self._keep = pairs, keep_sent

    def count(self, first: int, last: int) -> StepLoads:
        """Return the loads of steps ``first ... last - 1``."""
        from moesim.lowering.kernels.expert_parallel_loads import count_ranks

        steps = self._steps[first:last]
        starts = np.concatenate([[0], np.cumsum([len(step.rows) for step in steps])]).astype(np.int64)
        rows = np.concatenate([np.zeros(0, np.int64), *(step.rows for step in steps)])
        self._check_rows(rows)
        home = self._home[rows].astype(np.uint32)
        requests = np.concatenate([np.zeros(0, np.int64), *(step.requests for step in steps)]).astype(np.int64)
        ranks = np.zeros((3, len(steps), self._num_ranks), np.int64)
        cells = np.zeros((2, 1 << int(np.diff(starts).max(initial=0)).bit_length() + 1), np.int64)
        count_ranks(home, self._trace.position[rows].astype(np.int64), requests, starts, ranks[0], ranks[1], ranks[2],
                    cells[0], cells[1])
        found = self._empty(len(steps))
        self._reduce(rows, home, starts, found)
        return StepLoads(ranks[0], ranks[1], ranks[2], found.tokens, found.groups, found.largest, found.wires,
                         found.moved, found.stayed, self.port, self._per_node, found.sent if self._keep else None)

    def _check_rows(self, rows: np.ndarray) -> None:
        if rows.size and not (rows.min() >= 0 and rows.max() < self._trace.num_tokens):
            raise InputError(f"step loads: the steps have rows {rows.min()} ... {rows.max()}, the trace has "
                             f"{self._trace.num_tokens} tokens")

    def _empty(self, steps: int) -> Any:
        from moesim.lowering.kernels.expert_parallel_loads import Loads

        shape = (steps, self._trace.num_layers)
        kept = (*shape, self._num_ranks, self._num_ranks) if self._keep else (0, 0, 0, 0)
        tokens, groups, largest = (np.zeros((*shape, self._num_ranks), np.int32) for _ in range(3))
        wires = np.zeros((*shape, len(SCOPES), 3), np.int64)
        wires[..., 2] = 0 if self._pairs else -1
        return Loads(tokens, groups, largest, wires, np.zeros((*shape, len(SCOPES)), np.int64),
                     np.zeros(shape, np.int64), np.zeros(kept, np.int32))

    def _reduce(self, rows: np.ndarray, home: np.ndarray, starts: np.ndarray, found: Any) -> None:
        """Run the compiled loop over chunks of whole steps, whose selections are copied together."""
        from moesim.lowering.kernels.expert_parallel_loads import reduce_steps

        most = max(1, _CHUNK_IDS // (self._trace.num_layers * self._trace.top_k))
        scratch, step = self._scratch(int(np.diff(starts).max(initial=0))), 0
        while step < len(starts) - 1:
            after = max(step + 1, int(np.searchsorted(starts, starts[step] + most, side="right")) - 1)
            own = slice(starts[step], starts[after])
            ids = by_layer(np.take(self._trace.expert_ids, rows[own], axis=0))
            reduce_steps(ids, home[own], starts[step:after + 1] - starts[step], self._choice, self._net, found,
                         scratch, step)
            step = after

    def _scratch(self, most: int) -> Any:
        from moesim.lowering.kernels.expert_parallel_loads import GROUP, PLANES, Scratch

        experts, slots = self._choice.first.shape[1], self._choice.after.shape[1]
        masks = np.zeros((self._net.reach.shape[1], -(-most // GROUP) * GROUP), np.uint64)
        count = int(self.port.max()) + 1
        return Scratch(np.zeros(experts, np.uint32), np.zeros(experts, np.int32), np.zeros(experts, np.uint64),
                       np.zeros(slots, np.int32), masks, np.zeros(PLANES, np.uint64), np.zeros(_WORD, np.int64),
                       np.zeros((2, count), np.int64), np.zeros((self._num_ranks, self._num_ranks), np.int32),
                       np.zeros((len(SCOPES), count, count), np.int64))


def by_layer(expert_ids: np.ndarray) -> np.ndarray:
    """Return int16[layer, token, k], contiguous, of int16[token, layer, k]."""
    tokens, layers, width = expert_ids.shape
    cells = expert_ids.view(f"V{expert_ids.itemsize * width}").reshape(tokens, layers)  # numpy moves cells whole
    return np.ascontiguousarray(cells.T).view(expert_ids.dtype).reshape(layers, tokens, width)


def sums_exactly(token_bytes: float, most: int) -> bool:
    """Return whether float64 holds every sum of up to `most` times `token_bytes`, in whatever order it is made."""
    return float(token_bytes).as_integer_ratio()[0] * most < 2**53


def scope_ports(hardware: HardwareSpec) -> np.ndarray:
    """Return int64[scope, rank], the port of each rank (its own where a scope has no fabric)."""
    own = np.arange(hardware.num_ranks)
    fabrics = [hardware.fabric(scope) for scope in SCOPES]
    return np.stack([own if fabric is None else ports(hardware, fabric) for fabric in fabrics])


def _net(port: np.ndarray, node: np.ndarray, pairs: bool, keep: bool) -> Any:
    from moesim.lowering.kernels.expert_parallel_loads import Ports

    same = node[:, None] == node[None, :]
    own = np.eye(len(node), dtype=bool)
    reach = np.stack([_words(mask) for mask in (same & ~own, ~same)])
    used = np.asarray(reach.any(axis=(1, 2)))
    return Ports(reach, _words(own), port.astype(np.uint32), node.astype(np.int64), used, pairs, keep)


def _words(mask: np.ndarray) -> np.ndarray:
    """Return uint64[word, row]: the bits of bool[row, rank]."""
    padded = np.zeros((len(mask), -(-mask.shape[1] // _WORD) * _WORD), np.uint64)
    padded[:, :mask.shape[1]] = mask
    weights = np.uint64(1) << np.arange(_WORD, dtype=np.uint64)
    return np.ascontiguousarray((padded.reshape(len(mask), -1, _WORD) * weights).sum(axis=2, dtype=np.uint64).T)


def _choice(plan: PlacementPlan) -> Any:
    """Return how `placement.metrics.slot_of_token` chooses, as tables; experts count from 1, 0 is padding."""
    from moesim.lowering.kernels.expert_parallel_loads import Choice

    none = np.full((plan.num_layers, 1), plan.num_slots)
    order = np.argsort(plan.physical_to_logical, axis=1, kind="stable")  # slots by expert, rising
    copies = plan.replica_count.astype(np.int64)
    begin = np.cumsum(copies, axis=1) - copies
    first = np.take_along_axis(order, begin, axis=1)
    held = np.take_along_axis(plan.physical_to_logical, order, axis=1)
    follows = np.concatenate([held[:, 1:] == held[:, :-1], np.zeros((plan.num_layers, 1), bool)], axis=1)
    after = np.empty_like(order)
    following = np.where(follows, np.roll(order, -1, axis=1), np.take_along_axis(first, held, axis=1))
    np.put_along_axis(after, order, following, axis=1)
    rank = np.append(plan.slot_rank, 0).astype(np.uint32)
    bit = np.uint64(1) << (rank % _WORD).astype(np.uint64)
    bit[-1] = 0
    upto, replicas = _shares(plan)
    return Choice(np.concatenate([none, first], axis=1).astype(np.uint32),
                  np.concatenate([after, none], axis=1).astype(np.uint32), upto, replicas,
                  np.concatenate([np.zeros_like(none), copies], axis=1), rank // np.uint32(_WORD), bit)


def _shares(plan: PlacementPlan) -> tuple[np.ndarray, np.ndarray]:
    """Return cumulated shares and slots [layer, 1 + expert, replica]; empty under an even split."""
    if plan.slot_share is None:
        return np.zeros((0, 0, 0)), np.zeros((0, 0, 0), np.uint32)
    table = plan.logical_to_physical
    share = np.take_along_axis(plan.slot_share[:, None], np.maximum(table, 0), axis=2)
    upto = np.cumsum(np.where(table >= 0, share, 0.0), axis=2)
    ahead = ((0, 0), (1, 0), (0, 0))
    return np.pad(upto, ahead), np.pad(np.maximum(table, 0), ahead).astype(np.uint32)
