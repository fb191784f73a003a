"""What an offload program will access, window by window: experts and their tokens, steps, predictions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np

from moesim.cache.prefetch import OraclePrefetch, PopularityPrefetch
from moesim.errors import InputError
from moesim.lowering.batch import StepRecord
from moesim.lowering.offload import OffloadProgram

if TYPE_CHECKING:
    from moesim.cache.policy import AccessStream
    from moesim.cache.prefetch import Prefetcher

WINDOW_USES = 1 << 20
SORT_BELOW = 32
PAD = -1


class Window(NamedTuple):
    """Some steps in a row: the first one's number, and their accesses, one after the other.

    offsets int64[access + 1] into experts int16[use] and tokens int32[use]; step_tokens, context, head_rows and label:
    int64[step].
    """

    first: int
    offsets: np.ndarray
    experts: np.ndarray
    tokens: np.ndarray
    step_tokens: np.ndarray
    context: np.ndarray
    head_rows: np.ndarray
    label: np.ndarray

    @property
    def num_accesses(self) -> int:
        """Number of (step, layer) pairs."""
        return len(self.offsets) - 1


def windows(program: OffloadProgram, most_uses: int = 0) -> Iterator[Window]:
    """Yield the steps of a program in windows of at most `most_uses` expert uses, but at least one step.

    Without `most_uses` they are as long as pays (`WINDOW_USES`).
    """
    most_uses = most_uses or WINDOW_USES
    per_token = program.trace.num_layers * program.trace.top_k
    records, first, size = program.steps, 0, 0
    for number, record in enumerate(records):
        if size and size + record.tokens * per_token > most_uses:
            yield _window(program, records[first:number], first)
            first, size = number, 0
        size += record.tokens * per_token
    yield _window(program, records[first:], first)


def _window(program: OffloadProgram, records: Sequence[StepRecord], first: int) -> Window:
    from moesim.simulate.kernels.offload_stream import fill_stream

    trace = program.trace
    rows = np.concatenate([record.step.rows for record in records])
    ids = trace.expert_ids[rows]
    bounds = np.zeros(len(records) + 1, np.int64)
    bounds[1:] = np.cumsum([len(record.step.rows) for record in records])
    offsets = np.zeros(len(records) * trace.num_layers + 1, np.int64)
    experts, tokens = np.zeros(ids.size, np.int16), np.zeros(ids.size, np.int32)
    count, held = np.zeros(trace.num_experts, np.int32), np.zeros(SORT_BELOW, np.int16)
    uses = fill_stream(ids, bounds, offsets, experts, tokens, count, held)
    context = np.add.reduceat(trace.position[rows].astype(np.int64) + 1, bounds[:-1])
    label = np.array([record.step.index for record in records], np.int64)
    return Window(first, offsets, experts[:uses], tokens[:uses], np.diff(bounds), context,
                  _distinct_requests(records, bounds), label)


def _distinct_requests(records: Sequence[StepRecord], bounds: np.ndarray) -> np.ndarray:
    """int64[step]: how many requests each step holds."""
    requests = np.concatenate([record.step.requests for record in records]).astype(np.int64)
    step = np.repeat(np.arange(len(records)), np.diff(bounds))
    order = np.lexsort((requests, step))
    requests, step = requests[order], step[order]
    fresh = np.ones(len(step), bool)
    fresh[1:] = (requests[1:] != requests[:-1]) | (step[1:] != step[:-1])
    return np.bincount(step[fresh], minlength=len(records))


def predictions(program: OffloadProgram) -> np.ndarray:
    """Return int16[access, width]: what the prefetcher names at each access of the run, -1 padded.

    A prediction depends on the accesses only, so that one array serves every run on the same steps.

    Raises:
        InputError: a prediction outside the model.
    """
    predict = predictor(program)
    return _stack([predict(window) for window in windows(program)])


def predictor(program: OffloadProgram) -> Callable[[Window], np.ndarray]:
    """Return what gives the predictions of a window; those that need no calculation come without a call per access."""
    prefetcher, layers = program.prefetcher, program.trace.num_layers
    if type(prefetcher) is PopularityPrefetch:
        best = _padded([*prefetcher._best[1:], []])
        return lambda window: np.tile(best, (window.num_accesses // layers, 1))
    if type(prefetcher) is OraclePrefetch and _holds(prefetcher._future, program):
        return partial(_next_experts, prefetcher, layers)
    return partial(_asked, program)


def _asked(program: OffloadProgram, window: Window) -> np.ndarray:
    prefetcher, layers = cast("Prefetcher", program.prefetcher), program.trace.num_layers
    found: list[list[int]] = []
    experts, tokens = window.experts.astype(np.int64), window.tokens.astype(np.int64)
    offsets = window.offsets.tolist()
    for access in range(window.num_accesses):
        layer, uses = access % layers, slice(offsets[access], offsets[access + 1])
        last = layer + 1 == layers
        now = window.first * layers + access
        found.append([] if last else prefetcher.predict(layer, experts[uses], tokens[uses], now))
    if any(not 0 <= expert < program.trace.num_experts for row in found for expert in row):
        raise InputError(f"prefetch: the prefetcher names experts outside 0 ... {program.trace.num_experts - 1}")
    return _padded(found)


def _holds(future: AccessStream, program: OffloadProgram) -> bool:
    """Whether a future has an access for every layer of every step, so that no question about it is an error."""
    layers = program.trace.num_layers
    size = len(program.steps) * layers
    return len(future.layers) >= size and bool(np.all(future.layers[:size].reshape(-1, layers) == np.arange(layers)))


def _next_experts(oracle: OraclePrefetch, layers: int, window: Window) -> np.ndarray:
    """int16[access, width]: the first experts of the access after each; nothing after the last layer."""
    future, first = oracle._future, window.first * layers
    begin = future.offsets[first + 1:first + window.num_accesses + 1]
    end = np.append(future.offsets[first + 2:first + window.num_accesses + 1], begin[-1])
    end = np.where(np.arange(window.num_accesses) % layers == layers - 1, begin, end)
    width = min(oracle._width, int((end - begin).max(initial=0)))
    place = begin[:, None] + np.arange(width)
    experts = np.append(future.experts[begin[0]:end.max()], np.int16(PAD))
    return experts[np.where(place < end[:, None], place - begin[0], len(experts) - 1)]


def _padded(rows: Sequence[Sequence[int]]) -> np.ndarray:
    result = np.full((len(rows), max(map(len, rows), default=0)), PAD, np.int16)
    for place, row in enumerate(rows):
        result[place, :len(row)] = row
    return result


def _stack(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Return the rows of all parts, padded to one width."""
    result = np.full((sum(map(len, parts)), max(part.shape[1] for part in parts)), PAD, np.int16)
    first = 0
    for part in parts:
        result[first:first + len(part), :part.shape[1]] = part
        first += len(part)
    return result
