"""The reductions one by one: each takes the rows of a trace batch by batch and holds its counts."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from moesim.traces.groups import Slots, grown
from moesim.traces.row_checks import RowIndex
from moesim.traces.store import TraceHeader
from moesim.traces.stream import TraceRows


class Reducer(Protocol):
    """Takes the batches of a trace in order."""

    @property
    def open_groups(self) -> int:
        """Groups that had state at once."""

    def add(self, rows: TraceRows) -> None:
        """Take the next rows."""

    def result(self) -> dict[str, np.ndarray]:
        """Return the arrays by the names of `Reductions`."""


class Load:
    """Expert load."""

    open_groups = 0

    def __init__(self, header: TraceHeader) -> None:
        self.counts = np.zeros((header.num_layers, header.num_experts + 1), np.int64)

    def add(self, rows: TraceRows) -> None:
        """Count picks."""
        from moesim.traces.kernels.counting import add_load

        add_load(rows.expert_ids, self.counts)

    def result(self) -> dict[str, np.ndarray]:
        """Return `load`."""
        return {"load": self.counts[:, 1:].copy()}


class Transitions:
    """Pairs of experts in neighbouring layers."""

    open_groups = 0

    def __init__(self, header: TraceHeader) -> None:
        side = header.num_experts + 1
        self.counts = np.zeros((header.num_layers - 1, side, side), np.int64)

    def add(self, rows: TraceRows) -> None:
        """Count pairs."""
        from moesim.traces.kernels.counting import add_transitions

        add_transitions(rows.expert_ids, self.counts)

    def result(self) -> dict[str, np.ndarray]:
        """Return `transitions`."""
        return {"transitions": self.counts[:, 1:, 1:].copy()}


class CoActivation:
    """Pairs of experts in one layer."""

    open_groups = 0

    def __init__(self, header: TraceHeader) -> None:
        side = header.num_experts + 1
        self.counts = np.zeros((header.num_layers, side, side), np.int64)

    def add(self, rows: TraceRows) -> None:
        """Count pairs."""
        from moesim.traces.kernels.counting import add_co_activation

        add_co_activation(rows.expert_ids, self.counts)

    def result(self) -> dict[str, np.ndarray]:
        """Return `co_activation`."""
        return {"co_activation": self.counts[:, 1:, 1:].copy()}


class Distinct:
    """Distinct experts of each forward pass and layer."""

    def __init__(self, header: TraceHeader, index: RowIndex) -> None:
        self._steps, self._slots = index.steps, Slots(index.steps.last_row)
        self._stamp = np.zeros((0, header.num_layers, header.num_experts), np.int32)
        self.counts = np.zeros((index.steps.size, header.num_layers), np.int32)

    @property
    def open_groups(self) -> int:
        """Passes open at once."""
        return self._slots.used

    def add(self, rows: TraceRows) -> None:
        """Count experts that are new in their pass."""
        from moesim.traces.kernels.steps import add_distinct

        step = self._steps.index(rows.step)
        slot = self._slots.assign(step, rows.row)
        self._stamp = grown(self._stamp, self._slots.used, -1)
        add_distinct(rows.expert_ids, step, slot, self._stamp, self.counts)

    def result(self) -> dict[str, np.ndarray]:
        """Return `distinct` in order of steps."""
        order = np.argsort(self._steps.ids)
        return {"steps": self._steps.ids[order], "distinct": self.counts[order]}


class RankLoadMax:
    """Rows of the busiest rank of each forward pass and layer, under shares of experts on ranks."""

    def __init__(self, header: TraceHeader, index: RowIndex, rank_share: np.ndarray) -> None:
        layers, num_ranks = header.num_layers, rank_share.shape[2]
        self._steps, self._slots = index.steps, Slots(index.steps.last_row)
        layer, expert, rank = np.nonzero(rank_share)
        self._rank, self._share = rank.copy(), rank_share[layer, expert, rank]
        starts = np.arange(layers)[:, None] * header.num_experts + np.arange(header.num_experts + 1)
        self._first = np.searchsorted(layer * header.num_experts + expert, starts)
        self._stamp = np.zeros((0, layers, num_ranks), np.int32)
        self._load = np.zeros((0, layers, num_ranks))
        self.largest = np.zeros((index.steps.size, layers))

    @property
    def open_groups(self) -> int:
        """Passes open at once."""
        return self._slots.used

    def add(self, rows: TraceRows) -> None:
        """Add picks to the ranks of their experts."""
        from moesim.traces.kernels.steps import add_rank_load

        step = self._steps.index(rows.step)
        slot = self._slots.assign(step, rows.row)
        self._stamp = grown(self._stamp, self._slots.used, -1)
        self._load = grown(self._load, self._slots.used)
        add_rank_load(rows.expert_ids, step, slot, self._first, self._rank, self._share, self._stamp, self._load,
                      self.largest)

    def result(self) -> dict[str, np.ndarray]:
        """Return `rank_load_max` in order of steps."""
        order = np.argsort(self._steps.ids)
        return {"steps": self._steps.ids[order], "rank_load_max": self.largest[order]}


class Lags:
    """Picks used again d tokens later in the same request."""

    def __init__(self, header: TraceHeader, index: RowIndex, lags: int) -> None:
        from moesim.traces.kernels.reuse import LAGS_MAX, Recent

        layers, experts = header.num_layers, header.num_experts
        self._requests, self._slots = index.requests, Slots(index.requests.last_row)
        self._fill, self._kind = {"when": -LAGS_MAX - 1}, Recent
        self._recent = Recent(
            np.zeros((0, layers, experts), np.uint64), np.zeros((0, layers, experts), np.int64),
            np.zeros((0, lags, layers), np.int64), np.zeros(0, np.int64), np.zeros(0, np.int64))
        self._again, self._without = np.zeros((layers, lags), np.int64), np.zeros((layers, lags), np.int64)
        self._total = np.zeros(layers, np.int64)

    @property
    def open_groups(self) -> int:
        """Requests open at once."""
        return self._slots.used

    def add(self, rows: TraceRows) -> None:
        """Compare each row with those before it in its request."""
        from moesim.traces.kernels.reuse import add_lags

        request = self._requests.index(rows.request_id)
        slot = self._slots.assign(request, rows.row)
        self._recent = self._kind(*(grown(array, self._slots.used, self._fill.get(name, 0))
                                    for name, array in self._recent._asdict().items()))
        is_last = rows.row == self._requests.last_row[request]
        add_lags(rows.expert_ids, slot, is_last, self._recent, self._again, self._total, self._without)

    def result(self) -> dict[str, np.ndarray]:
        """Return `lag_again` and `lag_picks`."""
        return {"lag_again": self._again.T.copy(), "lag_picks": (self._total[:, None] - self._without).T.copy()}


class StackDistances:
    """LRU stack distances, rows in order, one stack per layer."""

    open_groups = 0

    def __init__(self, header: TraceHeader) -> None:
        layers, experts = header.num_layers, header.num_experts
        self._stack, self._below = np.zeros((layers, experts), np.int16), np.zeros(experts, np.int16)
        self._size, self._stamp = np.zeros(layers, np.int64), np.zeros(experts + 1, np.int64)
        self.counts = np.zeros((layers, experts + 1), np.int64)

    def add(self, rows: TraceRows) -> None:
        """Look each pick up and move it to the front."""
        from moesim.traces.kernels.reuse import add_stack_distances

        add_stack_distances(rows.expert_ids, self._stack, self._size, self._stamp, self._below, self.counts)

    def result(self) -> dict[str, np.ndarray]:
        """Return `stack_distances`."""
        return {"stack_distances": self.counts.copy()}
