"""StepCost: what one MoE layer of one step costs on a machine, as plain numbers that a solver can use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moesim.errors import InputError
from moesim.placement.step_sample import StepSample
from moesim.units import NS_PER_S

PORT, EGRESS, PAIR = range(3)
CONTENTIONS = ("port", "egress", "pair")


@dataclass(frozen=True)
class TimedSteps(StepSample):
    """Steps that also know when the shared experts release each rank.

    Attributes:
        until_ns: int64[step, layer, rank], from the start of the dispatch until the shared experts of a rank's own
            tokens are done (0: they are done before, or there are none). No plan changes it.
    """

    until_ns: np.ndarray | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        expected = (self.num_steps, self.expert_ids.shape[1])
        if self.until_ns is not None and (self.until_ns.ndim != 3 or self.until_ns.shape[:2] != expected):
            raise InputError(f"steps: until_ns must be [{expected[0]} steps, {expected[1]} layers, rank], got "
                             f"{self.until_ns.shape}")


@dataclass(frozen=True)
class KernelRates:
    """The roofline of an expert kernel: ``overhead + max(padded rows * flops / peak, bytes / memory rate)``.

    The operations and their order are those of `hardware.cost`, so that both round to the same nanosecond.
    """

    overhead_s: float
    task_overhead_s: float
    flops_per_row: float
    flops_per_s: float
    bytes_per_group: float
    bytes_per_row: float
    bytes_per_s: float
    tile_rows: int

    def ns(self, rows: np.ndarray, groups: np.ndarray, largest: np.ndarray) -> np.ndarray:
        """Return int64 like `rows`: the kernel's time; 0 where there are no rows."""
        tile, padding = self.tile_rows, (self.tile_rows - 1) / 2
        big = np.maximum(float(tile), largest + padding)
        several = big + np.maximum((groups - 1) * float(tile), rows - largest + (groups - 1) * padding)
        padded = np.where(groups == 1, np.ceil(rows / tile) * tile, several)
        num_bytes = groups * self.bytes_per_group + rows * self.bytes_per_row
        busy = np.maximum(padded * self.flops_per_row / self.flops_per_s, num_bytes / self.bytes_per_s)
        seconds = self.overhead_s + busy + self.task_overhead_s
        return np.where(rows > 0, np.rint(seconds * NS_PER_S), 0.0).astype(np.int64)


@dataclass(frozen=True)
class PortLevel:
    """One level of the network (inside nodes or between them) as `hardware.collective` costs it.

    Attributes:
        latency_s, bytes_per_s: once per exchange that uses the level; rate of a port.
        port: int32[rank], the port of each rank.
        contention: ``port``, ``egress`` or ``pair``: which wire limits it.
    """

    latency_s: float
    bytes_per_s: float
    port: np.ndarray
    contention: str = "port"

    def busiest(self, sent: np.ndarray) -> np.ndarray:
        """Return int64[...], the most tokens on one wire, of tokens int64[..., rank, rank] of this level alone."""
        count = int(self.port[-1]) + 1
        if count < len(self.port):
            onto = np.zeros((len(self.port), count), np.int64)
            onto[np.arange(len(self.port)), self.port] = 1
            sent = np.einsum("rp,...rs,sq->...pq", onto, sent, onto)
        out, into = sent.sum(axis=-1).max(axis=-1), sent.sum(axis=-2).max(axis=-1)
        return {"port": np.maximum(out, into), "egress": out, "pair": sent.max(axis=(-2, -1))}[self.contention]


@dataclass(frozen=True)
class StepCost:
    """Costs of one MoE layer under home-based dispatch (`lowering.step_cost.step_cost` makes it).

    Attributes:
        kernel_ns: ``(rows, groups, largest_group) -> int``, the expert kernel of one rank, overhead included.
        exchange_ns: ``(float64[rank, rank] bytes, kind) -> int``, one all-to-all, overhead included; kind is
            ``dispatch`` or ``combine``.
        dispatch_token_bytes, combine_token_bytes: bytes of one token sent out and sent back.
        kernel: the same kernel as a roofline, for compiled loops; fitted to `kernel_ns` where that is measured.
        levels: the network as port levels, ``(inside nodes, between nodes)``; None where the machine has none.
        dispatch_overhead_s, combine_overhead_s: the executor's own time per all-to-all.
        efficiency: share of the network's nameplate rate that is reached.
        exact: whether `kernel` and `levels` give the same integers as the two callables.
        source: where the numbers come from (nameplate, measured ...), for the record.
    """

    kernel_ns: Callable[[int, int, int], int]
    exchange_ns: Callable[[np.ndarray, str], int]
    dispatch_token_bytes: float
    combine_token_bytes: float
    kernel: KernelRates
    levels: tuple[PortLevel | None, PortLevel | None]
    dispatch_overhead_s: float = 0.0
    combine_overhead_s: float = 0.0
    efficiency: float = 1.0
    exact: bool = True
    source: str = "nameplate"

    def kernels_ns(self, rows: np.ndarray, groups: np.ndarray, largest: np.ndarray) -> np.ndarray:
        """Return int64 like `rows`: the kernel of each rank, 0 where it has no rows."""
        if self.exact:
            return self.kernel.ns(rows, groups, largest)
        triples = np.stack([rows.ravel(), groups.ravel(), largest.ravel()], axis=1)
        distinct, place = np.unique(triples, axis=0, return_inverse=True)
        times = np.array([self.kernel_ns(*one) if one[0] else 0 for one in distinct.tolist()], np.int64)
        return times[place.ravel()].reshape(rows.shape)

    def exchanges_ns(self, sent: np.ndarray, kind: str, same_node: np.ndarray) -> np.ndarray:
        """Return int64[layer], one all-to-all of tokens int64[layer, source rank, target rank] each.

        Args:
            kind: ``dispatch`` or ``combine`` (`sent` is already the combine's).
            same_node: bool[rank, rank].
        """
        sent = sent * ~np.eye(sent.shape[-1], dtype=bool)
        width = self.dispatch_token_bytes if kind == "dispatch" else self.combine_token_bytes
        if not self.exact:
            return np.array([self.exchange_ns(one * width, kind) if one.any() else 0 for one in sent], np.int64)
        seconds = np.zeros(len(sent))
        for level, mask in zip(self.levels, (same_node, ~same_node), strict=True):
            part = sent * mask
            used = part.any(axis=(1, 2))
            if level is not None and used.any():
                time = level.latency_s + level.busiest(part) * width / level.bytes_per_s
                seconds = np.where(used, np.maximum(seconds, time), seconds)
        overhead = self.dispatch_overhead_s if kind == "dispatch" else self.combine_overhead_s
        return np.where(sent.any(axis=(1, 2)), np.rint((seconds + overhead) * NS_PER_S), 0.0).astype(np.int64)
