"""The counts and samples behind `trace_stats`, from a trace in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moesim.traces.reductions import PairCounter, load_counts, pair_counts, transition_counts
from moesim.traces.trace import RoutingTrace

_CHUNK_SELECTIONS = 1 << 21


@dataclass(frozen=True)
class Training:
    """The first half of the requests, on which tables are made: loads, transitions, tokens."""

    load: np.ndarray
    transitions: np.ndarray
    num_tokens: int


@dataclass(frozen=True)
class Facts:
    """What the statistics of one phase of a trace are computed from.

    Attributes:
        load, transitions: of every token.
        shuffled: int64[pair, expert, expert], transitions where the tokens of the later layer are permuted.
        sample: tokens of whole requests in random order (but for the last), rows of a request adjoining.
        training: the first half of the requests (of a single request: of its tokens); None for a single token.
        test: a sample of the other half, None likewise.
    """

    num_tokens: int
    num_requests: int
    load: np.ndarray
    transitions: np.ndarray
    shuffled: np.ndarray
    sample: RoutingTrace
    training: Training | None
    test: RoutingTrace | None


def gather(trace: RoutingTrace, seed: int, max_tokens: int) -> Facts:
    """Return the facts of a trace in memory.

    Args:
        seed: of the samples and of the permutations.
        max_tokens: size of a sample.
    """
    training, test = None, None
    halves = _halves(trace)
    if halves is not None:
        training = Training(load_counts(halves[0]), transition_counts(halves[0]), halves[0].num_tokens)
        test = sample_tokens(halves[1], seed, max_tokens)
    return Facts(
        num_tokens=trace.num_tokens, num_requests=len(trace.requests()), load=load_counts(trace),
        transitions=transition_counts(trace),
        shuffled=shuffled_tables(lambda layer: trace.expert_ids[:, layer], trace.num_layers, trace.num_experts, seed),
        sample=sample_tokens(trace, seed, max_tokens), training=training, test=test)


def in_request_order(trace: RoutingTrace) -> RoutingTrace:
    """Return `trace` with the rows of each request adjoining, requests in order of appearance."""
    _, first, inverse = np.unique(trace.request_id, return_index=True, return_inverse=True)
    return trace.take(np.argsort(first[inverse], kind="stable"))


def sample_tokens(trace: RoutingTrace, seed: int, max_tokens: int) -> RoutingTrace:
    """Return at most `max_tokens` tokens: requests in random order, the last one cut."""
    if trace.num_tokens <= max_tokens:
        return in_request_order(trace)
    order = np.random.default_rng(seed).permutation(trace.requests())
    place = np.empty(len(order), dtype=np.int64)
    place[np.argsort(order)] = np.arange(len(order))
    _, inverse = np.unique(trace.request_id, return_inverse=True)
    return trace.take(np.argsort(place[inverse], kind="stable")[:max_tokens])


def _halves(trace: RoutingTrace) -> tuple[RoutingTrace, RoutingTrace] | None:
    """Return the first and the second half by request, or of the one request; None for a single token."""
    requests = trace.requests()
    if len(requests) > 1:
        first = np.isin(trace.request_id, requests[:len(requests) // 2])
    else:
        first = np.arange(trace.num_tokens) < trace.num_tokens // 2
    return (trace.take(first), trace.take(~first)) if first.any() else None


def shuffled_tables(column: Callable[[int], np.ndarray], num_layers: int, num_experts: int, seed: int) -> np.ndarray:
    """Return int64[pair, expert, expert]: pairs of a layer's token and a random token of the next layer.

    Args:
        column: gives int16[token, k] of a layer.
    """
    rng = np.random.default_rng(seed)
    tables = np.zeros((num_layers - 1, num_experts, num_experts), np.int64)
    for layer in range(num_layers - 1):
        first, second = column(layer), column(layer + 1)
        order = np.arange(len(first), dtype=np.int32 if len(first) < 1 << 31 else np.int64)
        rng.shuffle(order)
        tables[layer] = _permuted_pairs(first, second, order, num_experts)
    return tables


def _permuted_pairs(first: np.ndarray, second: np.ndarray, order: np.ndarray, num_experts: int) -> np.ndarray:
    size = max(1, _CHUNK_SELECTIONS // first.shape[1])
    if len(first) <= size:
        return pair_counts(first, second[order], num_experts)
    counter = PairCounter(num_experts)
    for start in range(0, len(first), size):
        part = slice(start, start + size)
        counter.add(first[part], second[order[part]])
    return counter.counts
