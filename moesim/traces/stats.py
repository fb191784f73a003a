"""What a trace says: expert load, layer-to-layer structure, and reuse from token to token."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from moesim.errors import InputError
from moesim.traces.split import select_phase, shuffle_tokens
from moesim.traces.trace import RoutingTrace

_CHUNK_PAIRS = 1 << 23
_OVERLAP_ROWS = 4096
_TIE = 1e-6


def load_counts(trace: RoutingTrace) -> np.ndarray:
    """Return int64[layer, expert]: tokens routed to each expert (padding not counted)."""
    layers, experts = trace.num_layers, trace.num_experts
    cell = trace.expert_ids.astype(np.int64) + experts * np.arange(layers)[:, None]
    counts = np.bincount(cell[trace.expert_ids >= 0], minlength=layers * experts)
    return counts.reshape(layers, experts)


def _pair_counts(first: np.ndarray, second: np.ndarray, num_experts: int) -> np.ndarray:
    """Return int64[expert, expert] over ids [token, k]: tokens with i in `first` and j in `second`."""
    counts = np.zeros(num_experts * num_experts, dtype=np.int64)
    rows = max(1, _CHUNK_PAIRS // (first.shape[1] * second.shape[1]))
    for start in range(0, len(first), rows):
        i = first[start:start + rows, :, None].astype(np.int64)
        j = second[start:start + rows, None, :]
        cell = (i * num_experts + j)[(i >= 0) & (j >= 0)]
        counts += np.bincount(cell, minlength=len(counts))
    return counts.reshape(num_experts, num_experts)


def transition_counts(trace: RoutingTrace) -> np.ndarray:
    """Return int64[layer - 1, expert, expert]: tokens with expert i in layer l and j in layer l + 1."""
    ids, experts = trace.expert_ids, trace.num_experts
    pairs = [_pair_counts(ids[:, layer], ids[:, layer + 1], experts) for layer in range(trace.num_layers - 1)]
    return np.array(pairs, dtype=np.int64).reshape(trace.num_layers - 1, experts, experts)


def co_activation(trace: RoutingTrace) -> np.ndarray:
    """Return int64[layer, expert, expert]: tokens with both i and j in one layer; symmetric.

    The diagonal (i with itself) is the expert load.
    """
    ids = trace.expert_ids
    return np.array([_pair_counts(ids[:, layer], ids[:, layer], trace.num_experts)
                     for layer in range(trace.num_layers)], dtype=np.int64)


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
    if max_tokens < 1:
        raise InputError(f"max_tokens must be at least 1, got {max_tokens}")
    trace = select_phase(trace, phase)
    load = load_counts(trace)
    information, shuffled_information = _information(trace, seed)
    recall, popularity_recall = _recall(trace, seed, max_tokens)
    sample = _sample(trace, seed, max_tokens)
    mixed = shuffle_tokens(sample, seed)
    return TraceStats(
        phase=phase, seed=seed, num_tokens=trace.num_tokens, num_requests=len(trace.requests()),
        num_sampled_tokens=sample.num_tokens, expert_load=load,
        load_max_over_mean=load.max(axis=1) / np.maximum(load.mean(axis=1), np.finfo(float).tiny),
        mutual_information_bits=information, mutual_information_shuffled_bits=shuffled_information,
        recall_at_k=recall, popularity_recall_at_k=popularity_recall,
        token_overlap=token_overlap(sample), token_overlap_shuffled=token_overlap(mixed),
        lru_sizes=np.arange(trace.top_k, trace.num_experts + 1), lru_hit_rate=lru_hit_rate(sample),
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


def _information(trace: RoutingTrace, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the raw and the shuffled mutual information, float64[pair] each.

    The plug-in estimate is biased upwards by about (E - 1)^2 / (2 N ln 2) bits (Miller 1955); picks of
    one token are not independent, so that the bias is measured by shuffling instead of computed.
    """
    raw = [mutual_information_bits(joint) for joint in transition_counts(trace)]
    rng = np.random.default_rng(seed)
    ids = trace.expert_ids
    shuffled = [mutual_information_bits(_pair_counts(
        ids[:, layer], ids[rng.permutation(len(ids)), layer + 1], trace.num_experts))
        for layer in range(trace.num_layers - 1)]
    return np.array(raw), np.array(shuffled)


def _in_request_order(trace: RoutingTrace) -> RoutingTrace:
    """Return `trace` with the rows of each request adjoining, requests in order of appearance."""
    _, first, inverse = np.unique(trace.request_id, return_index=True, return_inverse=True)
    return trace.take(np.argsort(first[inverse], kind="stable"))


def _sample(trace: RoutingTrace, seed: int, max_tokens: int) -> RoutingTrace:
    """Return at most `max_tokens` tokens: requests in random order, the last one cut."""
    if trace.num_tokens <= max_tokens:
        return _in_request_order(trace)
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


def _recall(trace: RoutingTrace, seed: int, max_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Return float64[pair] recall at k of the transition tables and of popularity."""
    halves = _halves(trace)
    if halves is None:
        return (np.full(trace.num_layers - 1, np.nan),) * 2
    popularity = load_counts(halves[0])[1:] / halves[0].num_tokens
    counts = transition_counts(halves[0])
    table = counts / np.maximum(counts.sum(axis=2, keepdims=True), 1)
    test = _sample(halves[1], seed, max_tokens)
    hot = _one_hot(test.expert_ids, trace.num_experts)
    found = np.zeros((2, trace.num_layers - 1))
    for layer, share in enumerate(popularity):
        # the popularity term only breaks ties, such as those of experts never seen in training
        score = hot[:, layer] @ table[layer] + _TIE * share
        for row, guess in enumerate((score, np.broadcast_to(share, score.shape))):
            top = np.argsort(-guess, axis=1, kind="stable")[:, :trace.top_k]
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
    trace = _in_request_order(trace)
    follows = np.flatnonzero(np.diff(trace.request_id) == 0)
    ids = trace.expert_ids
    again, picks = np.zeros(trace.num_layers), np.zeros(trace.num_layers)
    for start in range(0, len(follows), _OVERLAP_ROWS):
        rows = follows[start:start + _OVERLAP_ROWS]
        same = (ids[rows, :, :, None] == ids[rows + 1, :, None, :]) & (ids[rows, :, :, None] >= 0)
        again += same.sum(axis=(0, 2, 3))
        picks += (ids[rows] >= 0).sum(axis=(0, 2))
    with np.errstate(invalid="ignore"):
        return again / picks


def lru_hit_rate(trace: RoutingTrace) -> np.ndarray:
    """Return float64[size]: LRU hit rate for k, k + 1, ... E experts held in each layer.

    Rows in order, one cache per layer, set semantics: all experts of a token are tested before any is
    replaced, and are then touched in row order. A first touch is a miss, at every size. One pass gives
    all sizes: LRU is a stack algorithm (Mattson et al., IBM Systems Journal 1970), so a size-C cache
    holds the C most recent experts, and an expert hits if fewer than C were used since it was.
    """
    num_experts = trace.num_experts
    distances = np.zeros(num_experts + 2, dtype=np.int64)  # distance E: never used; E + 1: padding
    last_use = np.full((trace.num_layers, num_experts + 1), -1, dtype=np.int64)  # last column: padding
    for token, picks in enumerate(trace.expert_ids.astype(np.int64)):
        used = np.take_along_axis(last_use, picks, axis=1)
        distance = (last_use[:, None, :num_experts] > used[:, :, None]).sum(axis=2)
        distance[used < 0] = num_experts
        distance[picks < 0] = num_experts + 1
        distances += np.bincount(distance.ravel(), minlength=num_experts + 2)
        np.put_along_axis(last_use, picks, token * trace.top_k + np.arange(trace.top_k)[None], axis=1)
    accesses = max(1, int(distances[:num_experts + 1].sum()))
    return np.cumsum(distances)[trace.top_k - 1:num_experts] / accesses


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else float("nan")


def _jsonable(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return [_jsonable(item) for item in value.tolist()]
    if isinstance(value, list):
        return [_jsonable(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
