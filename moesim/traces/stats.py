"""What a trace says: expert load, layer-to-layer structure, and reuse from token to token."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from moesim.errors import InputError
from moesim.traces import reductions_numpy
from moesim.traces.facts import Facts, gather, in_request_order
from moesim.traces.facts_stream import stream_facts
from moesim.traces.reductions import co_activation, is_large, load_counts, reduce_trace, transition_counts
from moesim.traces.split import select_phase, shuffle_tokens
from moesim.traces.store import read_trace, trace_info
from moesim.traces.trace import RoutingTrace

__all__ = [
    "TraceStats", "co_activation", "file_stats", "load_counts", "lru_hit_rate", "mutual_information_bits",
    "token_overlap", "trace_stats", "transition_counts",
]

IN_MEMORY_SELECTIONS = 1 << 25
"""Selections up to which `file_stats` reads a file whole (64 MiB of ids); above, it streams."""
_LRU_EFFORT = 4  # stack distances cost numpy so many times what other counts cost
_TIE = 1e-6


@dataclass(frozen=True)
class TraceStats:
    """What a trace says about placement and caching. Axes: layer, layer pair (l, l + 1), cache size.

    Attributes:
        expert_load: int64[layer, expert].
        load_max_over_mean: float64[layer], the busiest expert's load over the mean.
        mutual_information_bits: float64[pair], between the experts of a pick in layer l and one in
            layer l + 1 (per pair of picks), raw; `..._shuffled_bits` the same with the tokens of layer
            l + 1 permuted (pure sampling bias); `..._excess_bits` the difference.
        recall_at_k: float64[pair], share of a token's experts in layer l + 1 found among the top k of
            sum over its experts of P(next | expert); `popularity_recall_at_k` with the k most loaded
            experts instead. Tables from the first half of the requests, tested on the second.
        token_overlap: float64[layer], share of a token's experts used again by the request's next
            token; `..._shuffled` after `shuffle_tokens`.
        lru_sizes: int64[size], experts held per layer, from k to E; `lru_hit_rate`: float64[size], over
            all layers; `..._shuffled` after `shuffle_tokens`.
        num_sampled_tokens: tokens behind recall, overlap and LRU (whole requests, but for the last).
    """

    phase: str
    seed: int
    num_tokens: int
    num_requests: int
    num_sampled_tokens: int
    expert_load: np.ndarray
    load_max_over_mean: np.ndarray
    mutual_information_bits: np.ndarray
    mutual_information_shuffled_bits: np.ndarray
    recall_at_k: np.ndarray
    popularity_recall_at_k: np.ndarray
    token_overlap: np.ndarray
    token_overlap_shuffled: np.ndarray
    lru_sizes: np.ndarray
    lru_hit_rate: np.ndarray
    lru_hit_rate_shuffled: np.ndarray

    @property
    def mutual_information_excess_bits(self) -> np.ndarray:
        """float64[pair]: raw minus shuffled."""
        return self.mutual_information_bits - self.mutual_information_shuffled_bits

    @property
    def token_overlap_ratio(self) -> float:
        """Mean overlap over mean shuffled overlap; 1 means no locality; nan without neighbours."""
        shuffled = _mean(self.token_overlap_shuffled)
        return _mean(self.token_overlap) / shuffled if shuffled else float("nan")

    def summary(self) -> dict[str, float | None]:
        """Return one number per statistic: means over layers, LRU at half the experts."""
        half = int(np.argmin(np.abs(2 * self.lru_sizes - self.expert_load.shape[1])))
        numbers = {
            "load_max_over_mean": _mean(self.load_max_over_mean),
            "mutual_information_bits": _mean(self.mutual_information_bits),
            "mutual_information_excess_bits": _mean(self.mutual_information_excess_bits),
            "recall_at_k": _mean(self.recall_at_k),
            "popularity_recall_at_k": _mean(self.popularity_recall_at_k),
            "token_overlap": _mean(self.token_overlap),
            "token_overlap_ratio": self.token_overlap_ratio,
            "lru_size": float(self.lru_sizes[half]),
            "lru_hit_rate": float(self.lru_hit_rate[half]),
            "lru_hit_rate_shuffled": float(self.lru_hit_rate_shuffled[half])}
        return {name: value if np.isfinite(value) else None for name, value in numbers.items()}

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values (arrays as lists, what is not defined as None)."""
        plain = {field.name: _jsonable(getattr(self, field.name)) for field in dataclasses.fields(self)}
        plain["mutual_information_excess_bits"] = _jsonable(self.mutual_information_excess_bits)
        return plain | {"summary": self.summary()}


def trace_stats(trace: RoutingTrace, *, seed: int, phase: str = "all", max_tokens: int = 4096) -> TraceStats:
    """Return the statistics of one phase of `trace` ("all", "prefill", "decode" or "denoise").

    Args:
        seed: for the sample of requests and for the shuffles.
        max_tokens: sample size for recall, overlap and LRU; load and information use every token.

    Raises:
        InputError: an unknown or absent phase, or `max_tokens` below 1.
    """
    _check_max_tokens(max_tokens)
    trace = select_phase(trace, phase)
    facts = (stream_facts if is_large(trace.expert_ids.size) else gather)(trace, seed, max_tokens)
    return _stats(facts, seed, phase)


def file_stats(path: str | os.PathLike[str], *, seed: int, phase: str = "all", max_tokens: int = 4096) -> TraceStats:
    """Return `trace_stats` of a trace file or ``builtin:NAME``; a large file is streamed (`stream_facts`).

    The same numbers either way, and the digest is verified.

    Raises:
        InputError: as `trace_stats` and `moesim.traces.store.read_trace`, or a scratch file that cannot be written.
    """
    _check_max_tokens(max_tokens)
    info = trace_info(path)
    if info["num_tokens"] * info["num_layers"] * info["top_k"] <= IN_MEMORY_SELECTIONS:
        return trace_stats(read_trace(path), seed=seed, phase=phase, max_tokens=max_tokens)
    return _stats(stream_facts(path, seed, max_tokens, phase=phase, verify=True), seed, phase)


def _check_max_tokens(max_tokens: int) -> None:
    if max_tokens < 1:
        raise InputError(f"max_tokens must be at least 1, got {max_tokens}")


def _stats(facts: Facts, seed: int, phase: str) -> TraceStats:
    """Return the statistics of what was gathered of a phase."""
    load, sample = facts.load, facts.sample
    recall, popularity_recall = _recall(facts)
    mixed = shuffle_tokens(sample, seed)
    # The plug-in estimate is biased upwards by about (E - 1)^2 / (2 N ln 2) bits (Miller 1955); picks of one token
    # are not independent, so that the bias is measured by shuffling instead of computed.
    return TraceStats(
        phase=phase, seed=seed, num_tokens=facts.num_tokens, num_requests=facts.num_requests,
        num_sampled_tokens=sample.num_tokens, expert_load=load,
        load_max_over_mean=load.max(axis=1) / np.maximum(load.mean(axis=1), np.finfo(float).tiny),
        mutual_information_bits=_information(facts.transitions),
        mutual_information_shuffled_bits=_information(facts.shuffled),
        recall_at_k=recall, popularity_recall_at_k=popularity_recall,
        token_overlap=token_overlap(sample), token_overlap_shuffled=token_overlap(mixed),
        lru_sizes=np.arange(sample.top_k, sample.num_experts + 1), lru_hit_rate=lru_hit_rate(sample),
        lru_hit_rate_shuffled=lru_hit_rate(mixed))


def mutual_information_bits(joint: np.ndarray) -> float:
    """Return the mutual information in bits of a table of joint counts [i, j] (plug-in estimate)."""
    total = joint.sum()
    if not total:
        return float("nan")
    share = joint / total
    independent = share.sum(axis=1, keepdims=True) * share.sum(axis=0, keepdims=True)
    seen = share > 0
    return float(np.sum(share[seen] * np.log2(share[seen] / independent[seen])))


def _information(tables: np.ndarray) -> np.ndarray:
    return np.array([mutual_information_bits(joint) for joint in tables])


def _recall(facts: Facts) -> tuple[np.ndarray, np.ndarray]:
    """Return float64[pair] recall at k of the transition tables and of popularity."""
    training, test = facts.training, facts.test
    if training is None or test is None:
        return (np.full(len(facts.transitions), np.nan),) * 2
    popularity, counts = training.load[1:] / training.num_tokens, training.transitions
    table = counts / np.maximum(counts.sum(axis=2, keepdims=True), 1)
    hot = _one_hot(test.expert_ids, test.num_experts)
    found = np.zeros((2, test.num_layers - 1))
    for layer, share in enumerate(popularity):
        # the popularity term only breaks ties, such as those of experts never seen in training
        score = hot[:, layer] @ table[layer] + _TIE * share
        for row, guess in enumerate((score, np.broadcast_to(share, score.shape))):
            top = np.argsort(-guess, axis=1, kind="stable")[:, :test.top_k]
            found[row, layer] = np.take_along_axis(hot[:, layer + 1], top, axis=1).sum()
    picks = np.count_nonzero(test.expert_ids >= 0, axis=(0, 2))[1:]
    recall, baseline = found / np.maximum(picks, 1)
    return recall, baseline


def _one_hot(expert_ids: np.ndarray, num_experts: int) -> np.ndarray:
    """Return float32[token, layer, expert]: 1 where the token uses the expert."""
    hot = np.zeros((*expert_ids.shape[:2], num_experts + 1), dtype=np.float32)
    np.put_along_axis(hot, expert_ids.astype(np.int64), 1.0, axis=2)  # -1 lands in the spare last column
    return hot[..., :num_experts]


def token_overlap(trace: RoutingTrace) -> np.ndarray:
    """Return float64[layer]: share of a token's experts used again by the next token of its request.

    nan where no request has two tokens.
    """
    if is_large(trace.expert_ids.size):
        found = reduce_trace(trace, ["lags"], lags=1)
        again, picks = found.array("lag_again")[0], found.array("lag_picks")[0]
    else:
        again, picks = reductions_numpy.overlap(in_request_order(trace))
    with np.errstate(invalid="ignore"):
        return again / picks


def lru_hit_rate(trace: RoutingTrace) -> np.ndarray:
    """Return float64[size]: LRU hit rate for k, k + 1, ... E experts held in each layer.

    Rows in order, one cache per layer, set semantics: all experts of a token are tested before any is
    replaced, and are then touched in row order. A first touch is a miss, at every size. One pass gives
    all sizes: LRU is a stack algorithm (Mattson et al., IBM Systems Journal 1970), so a size-C cache
    holds the C most recent experts, and an expert hits if fewer than C were used since it was.
    """
    if is_large(_LRU_EFFORT * trace.expert_ids.size):
        counts = reduce_trace(trace, ["stack_distances"]).array("stack_distances")
    else:
        counts = reductions_numpy.stack_distances(trace)
    distances = counts.sum(axis=0)
    return np.cumsum(distances)[trace.top_k - 1:trace.num_experts] / max(1, int(distances.sum()))


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else float("nan")


def _jsonable(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return [_jsonable(item) for item in value.tolist()]
    if isinstance(value, list):
        return [_jsonable(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
