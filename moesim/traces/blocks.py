"""Made-up routing with the structure that placement lives on: uneven blocks of experts that follow one another."""

from __future__ import annotations

import numpy as np

from moesim.errors import InputError
from moesim.traces.trace import DECODE, RoutingTrace

_CHUNK_VALUES = 1 << 24
_TINY = np.float32(1e-30)  # an exponential draw can be 0


def block_trace(num_tokens: int, num_layers: int, num_experts: int, top_k: int, *, num_blocks: int = 0,
                strength: float = 4.0, zipf: float = 0.6, noise: float = 0.8, request_tokens: int = 64,
                seed: int = 0) -> RoutingTrace:
    """Return a trace whose tokens walk through the layers as a Markov chain over expert sets; marked synthetic.

    The k experts of a token in layer l + 1 are drawn without replacement with weights ``sum_i W_l[i, j]`` over its
    experts i in layer l (the first layer: popularity alone, raised for the blocks of the token's request)::

        W_l[i, j] = popularity_(l+1)[j] (1 + strength [block_l(i) = block_(l+1)(j)] num_blocks) exp(noise N(0, 1))

    rows normalised; popularity ~ 1 / rank**zipf in a random order; every layer has its own random division into
    blocks of uneven sizes (drawn from a Dirichlet distribution, shared by the layers). Tokens of a request share the
    block in which they start three times out of four. Draws without replacement are Gumbel-top-k (Kool et al.,
    ICML 2019, arXiv 1903.06059). All rows are decode tokens, `request_tokens` per request.

    Raises:
        InputError: sizes or shares out of range.
    """
    num_blocks = num_blocks or max(2, num_experts // 8)
    if min(num_tokens, num_layers, num_experts, top_k, request_tokens) < 1 or top_k > num_experts:
        raise InputError("block_trace: sizes must be at least 1, and top_k at most num_experts")
    if not 2 <= num_blocks <= num_experts or min(strength, zipf, noise) < 0:
        raise InputError("block_trace: num_blocks must be in 2 ... num_experts; strength, zipf, noise not negative")
    rng = np.random.default_rng(seed)
    block = _blocks(rng, num_layers, num_experts, num_blocks)
    popularity = rng.permuted(np.tile((np.arange(num_experts) + 1.0) ** -zipf, (num_layers, 1)), axis=1)
    request = np.arange(num_tokens) // request_tokens
    ids = np.empty((num_tokens, num_layers, top_k), np.int16)
    stay = rng.random(num_tokens) < 0.75
    topic = np.where(stay, rng.integers(num_blocks, size=request[-1] + 1)[request],
                     rng.integers(num_blocks, size=num_tokens))
    first = popularity[0] * (1.0 + strength * num_blocks * (block[0] == np.arange(num_blocks)[:, None]))
    ids[:, 0] = _draw(first[topic], top_k, rng)
    for layer in range(1, num_layers):
        table = popularity[layer] * np.exp(noise * rng.standard_normal((num_experts, num_experts)))
        table *= 1.0 + strength * num_blocks * (block[layer - 1][:, None] == block[layer][None, :])
        table /= table.sum(axis=1, keepdims=True)
        ids[:, layer] = _walk(ids[:, layer - 1], table, top_k, rng)
    settings = {"generator": "blocks", "num_blocks": num_blocks, "strength": strength, "zipf": zipf, "noise": noise,
                "request_tokens": request_tokens, "seed": seed}
    position = np.arange(num_tokens) % request_tokens
    return RoutingTrace(
        expert_ids=ids, num_experts=num_experts, layer_ids=np.arange(num_layers), request_id=request,
        position=position, phase=np.full(num_tokens, DECODE), step=np.arange(num_tokens), model="synthetic",
        source="synthetic: Markov chain over blocks of experts", metadata={"synthetic": settings})


def _blocks(rng: np.random.Generator, num_layers: int, num_experts: int, num_blocks: int) -> np.ndarray:
    """Return int64[layer, expert], the block of each expert; sizes are uneven and the same in every layer."""
    share = rng.dirichlet(np.full(num_blocks, 4.0))
    sizes = 1 + rng.multinomial(num_experts - num_blocks, share)
    return rng.permuted(np.tile(np.repeat(np.arange(num_blocks), sizes), (num_layers, 1)), axis=1)


def _walk(before: np.ndarray, table: np.ndarray, top_k: int, rng: np.random.Generator) -> np.ndarray:
    """Return int[token, k], the next layer's experts, chunk by chunk."""
    size = max(1, _CHUNK_VALUES // table.shape[1])
    parts = [_draw(table[before[start:start + size]].sum(axis=1), top_k, rng)
             for start in range(0, len(before), size)]
    return np.concatenate(parts)


def _draw(weight: np.ndarray, top_k: int, rng: np.random.Generator) -> np.ndarray:
    """Return int[token, k], the k largest of log weight + Gumbel noise, best first."""
    # log w + Gumbel = log(w / Exponential(1)), and the order of logs is that of their arguments
    score = weight.astype(np.float32) / (rng.standard_exponential(weight.shape, np.float32) + _TINY)
    top = np.argpartition(score, -top_k, axis=1)[:, -top_k:]
    order = np.argsort(-np.take_along_axis(score, top, axis=1), axis=1, kind="stable")
    return np.take_along_axis(top, order, axis=1)
