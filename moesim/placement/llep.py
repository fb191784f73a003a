"""LLEP: least-loaded expert parallelism, a spill plan for every batch (Nguyen et al., arXiv 2601.17111)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.errors import InputError, unknown

GATES = ("ranks", "experts")


@dataclass(frozen=True)
class Part:
    """Tokens `start` ... `end` - 1 of an expert, in the order of all its tokens, are computed on `rank`."""

    expert: int
    rank: int
    start: int
    end: int


@dataclass(frozen=True)
class Transfer:
    """The weights of an expert are copied from its own rank to another for this batch."""

    expert: int
    source: int
    target: int


@dataclass(frozen=True)
class SpillPlan:
    """Who computes what in one layer of one batch. `spilled` False: the gate let ordinary expert parallelism be."""

    parts: tuple[Part, ...]
    transfers: tuple[Transfer, ...]
    spilled: bool

    def rank_load(self, num_ranks: int) -> np.ndarray:
        """Return int64[rank], tokens that each rank computes."""
        load = np.zeros(num_ranks, np.int64)
        for part in self.parts:
            load[part.rank] += part.end - part.start
        return load

    def foreign_experts(self, num_ranks: int) -> np.ndarray:
        """Return int64[rank], experts whose weights a rank receives: the scratch memory it needs."""
        return np.bincount([one.target for one in self.transfers], minlength=num_ranks).astype(np.int64)


def spill_plan(load: np.ndarray, native: np.ndarray, num_ranks: int, *, alpha: float = 1.0, min_tokens: int = 1024,
               gate: float = 1.3, gate_on: str = "ranks") -> SpillPlan:
    """Return LLEP's plan for one layer of a batch (the paper's algorithm 2 to 4, its experiments' parameters).

    If the largest over the mean load is below `gate` (its lambda), every expert stays on its own rank. Otherwise, by
    falling load: a rank keeps what fits under ``m_alpha = floor(alpha tokens / ranks)`` beside the native experts that
    are still to come; the rest goes, chunk by chunk, to the rank with the least assigned and pending tokens that has
    room, no chunk under `min_tokens` (its m) except a last one; where no rank has room, the least loaded takes all.

    Args:
        load: int[expert], tokens of the batch.
        native: int[expert], the rank that holds each expert.
        num_ranks: ranks.
        alpha: tokens per rank at most, over the mean.
        min_tokens: fewest tokens worth a matrix product.
        gate: largest over mean load from which spilling starts; 0: always.
        gate_on: ``ranks`` (the code's reading) or ``experts`` (the paper's).

    Raises:
        InputError: parameters out of range or arrays that do not match.
    """
    load, native = np.asarray(load, np.int64), np.asarray(native, np.int64)
    _check(load, native, num_ranks, alpha, min_tokens, gate, gate_on)
    ranks = np.bincount(native, weights=load, minlength=num_ranks).astype(np.int64)
    judged = ranks if gate_on == "ranks" else load
    if judged.max() < gate * judged.mean() or num_ranks == 1 or not load.any():
        used = np.flatnonzero(load).tolist()
        return SpillPlan(tuple(Part(e, int(native[e]), 0, int(load[e])) for e in used), (), False)
    room = _Room(np.zeros(num_ranks, np.int64), ranks, int(alpha * load.sum() / num_ranks), min_tokens)
    parts: list[Part] = []
    for expert in np.argsort(-load, kind="stable").tolist():
        if load[expert]:
            parts += room.place(expert, int(native[expert]), int(load[expert]))
    moved = dict.fromkeys((p.expert, p.rank) for p in parts if p.rank != native[p.expert])
    return SpillPlan(tuple(parts), tuple(Transfer(e, int(native[e]), rank) for e, rank in moved), True)


@dataclass
class _Room:
    """Tokens assigned to each rank, native tokens still to come, the cap, and the smallest chunk."""

    assigned: np.ndarray
    pending: np.ndarray
    cap: int
    min_tokens: int

    def place(self, expert: int, own: int, tokens: int) -> list[Part]:
        """Assign an expert's tokens; the next of its rank's pending ones are its own."""
        self.pending[own] -= tokens
        kept = min(tokens, max(0, self.cap - int(self.assigned[own] + self.pending[own])))
        parts = [Part(expert, own, 0, kept)] if kept else []
        self.assigned[own] += kept
        start = kept
        while start < tokens:
            rank, chunk = self._next(own, tokens - start)
            parts.append(Part(expert, rank, start, start + chunk))
            self.assigned[rank] += chunk
            start += chunk
        return parts

    def _next(self, own: int, rest: int) -> tuple[int, int]:
        """Return the rank that takes the next chunk, and the chunk."""
        total = self.assigned + self.pending
        others = [rank for rank in np.argsort(total, kind="stable").tolist() if rank != own]
        for rank in others:
            chunk = min(rest, self.cap - int(total[rank]))
            if chunk > 0 and (chunk >= self.min_tokens or chunk == rest):
                return rank, chunk
        return others[0], rest


def _check(load: np.ndarray, native: np.ndarray, num_ranks: int, alpha: float, min_tokens: int, gate: float,
           gate_on: str) -> None:
    if gate_on not in GATES:
        raise unknown("gate_on", gate_on, GATES)
    if load.ndim != 1 or load.shape != native.shape or not load.size or load.min() < 0:
        raise InputError(f"llep: load and native must be [expert], loads not negative, got {load.shape}, {native.shape}")
    if native.min() < 0 or native.max() >= num_ranks:
        raise InputError(f"llep: native ranks must be 0 ... {num_ranks - 1}")
    if not (alpha >= 1 and min_tokens >= 1 and 0 <= gate < float("inf")):
        raise InputError(f"llep: needs alpha >= 1, min_tokens >= 1 and gate >= 0, got {alpha}, {min_tokens}, {gate}")
