"""Made-up routing with known structure, for tests and for asking what would happen if."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.errors import InputError
from moesim.traces.trace import DECODE, PREFILL, RoutingTrace

TOPIC_BOOST = 4.0
TOPIC_RUN_TOKENS = 64
_FLOOR = 1e-9  # keeps every expert drawable when the other terms name fewer than k


def synthetic_trace(num_tokens: int, num_layers: int, num_experts: int, top_k: int, num_requests: int, *,
                    zipf: float = 1.0, affinity: float = 0.5, locality: float = 0.5, num_topics: int = 4,
                    prompt_fraction: float = 0.25, seed: int = 0) -> RoutingTrace:
    """Return a trace from a Markov chain over experts; marked ``synthetic`` in `source`.

    The k experts of a token in layer l are drawn without replacement with weights::

        (1 - locality) ((1 - affinity) p_l(e | topic) + affinity s_l(e)) + locality r_l(e)

    - p_l: popularity ~ 1 / rank**zipf over a random order of the layer's experts, times `TOPIC_BOOST`
      for the experts of the token's topic (every `num_topics`-th rank); topics come in runs of
      `TOPIC_RUN_TOKENS` tokens on average;
    - s_l: even over the successors of the token's experts in layer l - 1 (same rank there; p_0 in layer 0);
    - r_l: even over the experts of the request's previous token in this layer (p_l for the first).

    Draws without replacement are Gumbel-top-k (Kool et al., ICML 2019, arXiv 1903.06059). Gate weights
    fall along a row, sum to about 1 and are exact in float16.

    Args:
        num_tokens: rows in all, spread at random over `num_requests` requests, at least one each.
        prompt_fraction: share of each request that is prefill.

    Raises:
        InputError: sizes that do not fit together or shares outside 0 ... 1.
    """
    _check_sizes(num_tokens, num_layers, num_experts, top_k, num_requests, num_topics, zipf)
    for name, share in (("affinity", affinity), ("locality", locality), ("prompt_fraction", prompt_fraction)):
        if not 0 <= share <= 1:
            raise InputError(f"{name} must lie between 0 and 1, got {share}")
    rng = np.random.default_rng(seed)
    chain = _Chain(_rank_order(rng, num_layers, num_experts), _popularity(num_experts, zipf, num_topics),
                   top_k, affinity, locality)
    lengths = 1 + rng.multinomial(num_tokens - num_requests, np.full(num_requests, 1 / num_requests))
    expert_ids = chain.sample(lengths, rng)
    weights = np.sort(rng.exponential(size=expert_ids.shape), axis=2)[..., ::-1]
    weights = (weights / weights.sum(axis=2, keepdims=True)).astype(np.float16).astype(np.float32)
    settings = {"zipf": zipf, "affinity": affinity, "locality": locality, "num_topics": num_topics,
                "prompt_fraction": prompt_fraction, "seed": seed}
    return RoutingTrace(
        expert_ids=expert_ids, gate_weights=weights, num_experts=num_experts,
        layer_ids=np.arange(num_layers), model="synthetic", source="synthetic: Markov chain over experts",
        metadata={"synthetic": settings}, **_columns(lengths, prompt_fraction))


def _check_sizes(num_tokens: int, num_layers: int, num_experts: int, top_k: int, num_requests: int,
                 num_topics: int, zipf: float) -> None:
    sizes = {"num_tokens": num_tokens, "num_layers": num_layers, "num_experts": num_experts,
             "top_k": top_k, "num_requests": num_requests, "num_topics": num_topics}
    for name, value in sizes.items():
        if value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    if top_k > num_experts:
        raise InputError(f"top_k must be at most num_experts ({num_experts}), got {top_k}")
    if num_requests > num_tokens:
        raise InputError(f"num_requests must be at most num_tokens ({num_tokens}), got {num_requests}")
    if not 0 <= zipf < float("inf"):
        raise InputError(f"zipf must be finite and not negative, got {zipf}")


def _rank_order(rng: np.random.Generator, num_layers: int, num_experts: int) -> np.ndarray:
    """Return int64[layer, rank]: the experts of each layer from the most to the least popular."""
    return rng.permuted(np.tile(np.arange(num_experts), (num_layers, 1)), axis=1)


def _popularity(num_experts: int, zipf: float, num_topics: int) -> np.ndarray:
    """Return float64[topic, rank]: the share of each rank under each topic; rows sum to 1."""
    ranks = np.arange(num_experts)
    in_topic = ranks % num_topics == np.arange(num_topics)[:, None]
    weight = (ranks + 1.0) ** -zipf * np.where(in_topic, TOPIC_BOOST, 1.0)
    return weight / weight.sum(axis=1, keepdims=True)


def _columns(lengths: np.ndarray, prompt_fraction: float) -> dict[str, np.ndarray]:
    """Return request_id, position, phase and step of requests that run one after another."""
    request_id = np.repeat(np.arange(len(lengths)), lengths)
    position = np.concatenate([np.arange(length) for length in lengths])
    prompt = np.rint(prompt_fraction * lengths).astype(np.int64)
    if 0 < prompt_fraction < 1:
        prompt = np.minimum(np.maximum(prompt, 1), np.maximum(lengths - 1, 1))
    phase = np.where(position < prompt[request_id], PREFILL, DECODE)
    new_pass = (position == 0) | (phase == DECODE)
    return {"request_id": request_id, "position": position, "phase": phase, "step": np.cumsum(new_pass) - 1}


@dataclass(frozen=True)
class _Chain:
    """The chain: rank_order int64[layer, rank], popularity float64[topic, rank], and its knobs."""

    rank_order: np.ndarray
    popularity: np.ndarray
    top_k: int
    affinity: float
    locality: float

    def sample(self, lengths: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return int16[token, layer, k], request after request; all requests advance side by side."""
        num_layers, num_experts = self.rank_order.shape
        ids = np.empty((int(lengths.sum()), num_layers, self.top_k), dtype=np.int16)
        starts = np.cumsum(lengths) - lengths
        topic = rng.integers(len(self.popularity), size=len(lengths))
        previous = np.zeros((num_layers, len(lengths), num_experts))
        for position in range(int(lengths.max())):
            live = np.flatnonzero(lengths > position)
            change = rng.random(len(lengths)) < 1 / TOPIC_RUN_TOKENS
            topic = np.where(change, rng.integers(len(self.popularity), size=len(lengths)), topic)
            ranks = self._token(self.popularity[topic[live]], previous[:, live], position > 0, rng)
            previous[:, live] = _one_hot(ranks, num_experts)
            ids[starts[live] + position] = np.take_along_axis(
                self.rank_order[:, None, :], ranks, axis=2).swapaxes(0, 1)
        return ids

    def _token(self, popularity: np.ndarray, previous: np.ndarray, has_previous: bool,
               rng: np.random.Generator) -> np.ndarray:
        """Return int64[layer, request, k]: the ranks drawn for one token of each request."""
        num_layers, num_requests, num_experts = previous.shape
        noise = rng.gumbel(size=previous.shape)
        ranks = np.empty((num_layers, num_requests, self.top_k), dtype=np.int64)
        for layer in range(num_layers):
            weight = popularity
            if layer:
                successors = _one_hot(ranks[layer - 1], num_experts) / self.top_k
                weight = (1 - self.affinity) * popularity + self.affinity * successors
            if has_previous:
                weight = (1 - self.locality) * weight + self.locality * previous[layer] / self.top_k
            score = np.log(weight + _FLOOR * popularity) + noise[layer]
            ranks[layer] = np.argsort(-score, axis=1, kind="stable")[:, :self.top_k]
        return ranks


def _one_hot(ranks: np.ndarray, num_experts: int) -> np.ndarray:
    """Return float64[..., expert] with 1 at each of the last axis's ranks."""
    hot = np.zeros((*ranks.shape[:-1], num_experts))
    np.put_along_axis(hot, ranks, 1.0, axis=-1)
    return hot
