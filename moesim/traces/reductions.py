"""Counts over a trace, in memory or streamed from a file larger than memory, by compiled loops."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from moesim.errors import InputError, unknown
from moesim.traces import reductions_numpy
from moesim.traces.reductions_state import (
    CoActivation,
    Distinct,
    Lags,
    Load,
    RankLoadMax,
    Reducer,
    StackDistances,
    Transitions,
)
from moesim.traces.row_checks import RowIndex
from moesim.traces.store import TraceHeader, header_of
from moesim.traces.stream import TraceStream
from moesim.traces.trace import RoutingTrace

COMPILED_SELECTIONS = 1 << 23
"""Selections from which a trace is counted by compiled loops; compiling them takes as long as numpy for fewer."""
LAGS = 16
_NEEDS_STEPS = ("distinct", "rank_load_max")


@dataclass(frozen=True)
class Reductions:
    """What `reduce_trace` counted; None for what was not wanted.

    Attributes:
        num_tokens, num_requests: rows of the phase, and their requests.
        load: int64[layer, expert], tokens routed to each expert.
        transitions: int64[layer - 1, expert, expert], tokens with expert i in layer l and j in layer l + 1.
        co_activation: int64[layer, expert, expert], tokens with both in one layer; the diagonal is the load.
        steps: int32[step], the passes of the two arrays below, rising.
        distinct: int32[step, layer], distinct experts.
        rank_load_max: float64[step, layer], picks on the busiest rank under `rank_share`.
        lag_again: int64[lag, layer], picks that the token d = 1, 2, ... tokens later in the request uses again;
            lag_picks: all picks of tokens that have one. Their quotient is the lag curve, at d = 1 the token overlap.
        stack_distances: int64[layer, expert + 1], picks by the number of experts used in the layer since their own
            last use (an LRU cache of C experts hits those below C), rows in order; the last entry: first uses.
        largest_batch, open_groups: the most rows, and the most open requests or steps, held at once.
    """

    num_tokens: int
    num_requests: int
    load: np.ndarray | None = None
    transitions: np.ndarray | None = None
    co_activation: np.ndarray | None = None
    steps: np.ndarray | None = None
    distinct: np.ndarray | None = None
    rank_load_max: np.ndarray | None = None
    lag_again: np.ndarray | None = None
    lag_picks: np.ndarray | None = None
    stack_distances: np.ndarray | None = None
    largest_batch: int = field(default=0, compare=False)
    open_groups: int = field(default=0, compare=False)

    def array(self, name: str) -> np.ndarray:
        """Return an array that was wanted; raises InputError for one that was not counted."""
        found = getattr(self, name, None)
        if not isinstance(found, np.ndarray):
            raise InputError(f"reductions: {name!r} was not counted; name it in `wanted`")
        return found


@dataclass(frozen=True)
class _Options:
    lags: int
    rank_share: np.ndarray | None


_REDUCERS: dict[str, Callable[[TraceHeader, RowIndex, _Options], Reducer]] = {
    "load": lambda header, index, options: Load(header),
    "transitions": lambda header, index, options: Transitions(header),
    "co_activation": lambda header, index, options: CoActivation(header),
    "distinct": lambda header, index, options: Distinct(header, index),
    "rank_load_max": lambda header, index, options: RankLoadMax(header, index, _shares(options, header)),
    "lags": lambda header, index, options: Lags(header, index, options.lags),
    "stack_distances": lambda header, index, options: StackDistances(header),
}


def reduce_trace(source: RoutingTrace | str | os.PathLike[str], wanted: Iterable[str], *, phase: str = "all",
                 lags: int = LAGS, rank_share: np.ndarray | None = None, batch_rows: int | None = None,
                 verify: bool = False) -> Reductions:
    """Count over a trace, a trace file or ``builtin:NAME``; a file is read twice, batch by batch, and checked.

    Held at once: a batch of rows, the counts, and what is known of each request or step (some 60 bytes) and of each
    open one (`distinct`: 4 bytes per layer and expert; `lags`: 16). Per-step results have a row per step.

    Args:
        wanted: of ``load``, ``transitions``, ``co_activation``, ``distinct``, ``rank_load_max``, ``lags``,
            ``stack_distances``.
        phase: "all", or the only phase whose rows count.
        lags: the longest lag, 1 ... 63.
        rank_share: float64[layer, expert, rank], the part of an expert's tokens that each rank serves
            (``rank_load_max``).
        batch_rows: rows of a batch; None: as many as hold `moesim.traces.stream.BATCH_SELECTIONS` selections.
        verify: also compare a file's digest, which reads all its columns.

    Raises:
        InputError: an unknown name or phase, lags out of range, shares of another shape, or a file that breaks a
            rule of `RoutingTrace` (the message names the row).
    """
    names = list(dict.fromkeys(wanted))
    for name in names:
        if name not in _REDUCERS:
            raise unknown("reduction", name, _REDUCERS)
    _check_lags(lags)
    options = _Options(lags, rank_share)
    stream = TraceStream(source, batch_rows=batch_rows, verify=verify)
    if "rank_load_max" in names:
        _shares(options, stream.header)
    index = stream.index(phase, with_steps=any(name in _NEEDS_STEPS for name in names))
    reducers = [_REDUCERS[name](stream.header, index, options) for name in names]
    for rows in stream.batches(phase):
        for reducer in reducers:
            reducer.add(rows)
    arrays: dict[str, np.ndarray] = {}
    for reducer in reducers:
        arrays |= reducer.result()
    for array in arrays.values():
        array.setflags(write=False)
    return Reductions(index.num_rows, index.requests.size, largest_batch=stream.largest_batch,
                      open_groups=max([reducer.open_groups for reducer in reducers], default=0), **arrays)


def is_large(num_selections: int) -> bool:
    """Whether compiled loops count so many selections sooner than numpy, compilation included."""
    return num_selections >= COMPILED_SELECTIONS


def load_counts(trace: RoutingTrace) -> np.ndarray:
    """Return int64[layer, expert]: tokens routed to each expert (padding not counted)."""
    if is_large(trace.expert_ids.size):
        return _count(trace, Load(header_of(trace)))["load"]
    return reductions_numpy.load(trace)


def transition_counts(trace: RoutingTrace) -> np.ndarray:
    """Return int64[layer - 1, expert, expert]: tokens with expert i in layer l and j in layer l + 1."""
    if is_large(trace.expert_ids.size):
        return _count(trace, Transitions(header_of(trace)))["transitions"]
    return reductions_numpy.transitions(trace)


def co_activation(trace: RoutingTrace) -> np.ndarray:
    """Return int64[layer, expert, expert]: tokens with both i and j in one layer; symmetric.

    The diagonal (i with itself) is the expert load.
    """
    if is_large(trace.expert_ids.size):
        return _count(trace, CoActivation(header_of(trace)))["co_activation"]
    return reductions_numpy.co_activation(trace)


def pair_counts(first: np.ndarray, second: np.ndarray, num_experts: int) -> np.ndarray:
    """Return int64[expert, expert] over ids int16[token, k]: tokens with i in `first` and j in `second`."""
    if not is_large(first.size):
        return reductions_numpy.pairs(first, second, num_experts)
    counter = PairCounter(num_experts)
    counter.add(first, second)
    return counter.counts


class PairCounter:
    """Pairs of experts between two columns of routing, part by part."""

    def __init__(self, num_experts: int) -> None:
        self._counts = np.zeros((num_experts + 1, num_experts + 1), np.int64)

    def add(self, first: np.ndarray, second: np.ndarray) -> None:
        """Count the tokens of two columns int16[token, k]."""
        from moesim.traces.kernels.counting import add_pairs

        add_pairs(np.array(first, np.int16, order="C"), np.array(second, np.int16, order="C"), self._counts)

    @property
    def counts(self) -> np.ndarray:
        """int64[expert, expert], the counts so far."""
        return self._counts[1:, 1:].copy()


def _count(trace: RoutingTrace, reducer: Reducer) -> dict[str, np.ndarray]:
    """Reduce a trace in memory, which was checked when it was made and needs no index."""
    for rows in TraceStream(trace).batches():
        reducer.add(rows)
    return reducer.result()


def _check_lags(lags: int) -> None:
    from moesim.traces.kernels.reuse import LAGS_MAX

    if not 1 <= lags <= LAGS_MAX:
        raise InputError(f"lags must be 1 ... {LAGS_MAX}, got {lags}")


def _shares(options: _Options, header: TraceHeader) -> np.ndarray:
    if options.rank_share is None:
        raise InputError("reductions: rank_load_max needs rank_share")
    shares = np.array(options.rank_share, np.float64)
    expected = (header.num_layers, header.num_experts)
    if shares.ndim != 3 or shares.shape[:2] != expected or not shares.shape[2]:
        raise InputError(f"reductions: rank_share must be [layer, expert, rank] with {expected[0]} layers and "
                         f"{expected[1]} experts, got {shares.shape}")
    if not np.all(np.isfinite(shares)) or shares.min() < 0:
        raise InputError("reductions: rank_share must be finite and not negative")
    return shares
