"""Made-up routing of a block-diffusion language model: blocks of tokens that are denoised step by step.

A forward pass ("denoising step") routes every token of the active block; tokens whose confidence passes a threshold are
decided, and the block ends when all are (LLaDA2.0, arXiv 2512.15745). What makes a cache of experts worth having is
how slowly the chosen experts change from step to step, so that is what the generator is fitted to.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from moesim.errors import InputError, unknown
from moesim.traces.trace import DENOISE, PREFILL, RoutingTrace

ROUTED = ("block", "masked", "prefix")
MASK_TOKEN, DECIDED_TOKEN = -1, 0
_JITTER = 1e-10  # keeps the factorisation of a nearly constant process from failing


@dataclass(frozen=True)
class DenoiseSettings:
    """What `denoise_trace` makes.

    The router score of a token for an expert is a sum of independent standard normal parts, weighted by the square
    roots of their shares: one per layer and expert (`popularity_share`), one per request, one per block, and the token's
    own. The parts of block and token drift from step to step with correlation ``exp(-(drift * lag)**drift_power)``.

    The defaults are fitted to LLaDA2.0-mini (256 experts, top-8, blocks of 32): `drift` and `drift_power` to the cosine
    similarity of expert activations, 0.985 at lag 1 and about 0.95 at lag 5 (TIDE, arXiv 2605.20179); the sum of the
    shares to 70 distinct experts per layer and pass (dMoE, arXiv 2605.30876). How that sum is divided into popularity,
    request and block is an assumption: nothing is published about it.

    Attributes:
        accept: probability that a step decides a token that is still masked; at least one is decided per step, so
            that 0 is one token per step.
        routed: ``block``: all tokens of the active block (a KV cache holds what is before it); ``masked``: those of
            them that are not decided yet; ``prefix``: prompt, earlier blocks and the active one (no KV cache). Attention
            is causal over blocks, so the routing of what is before the active block stays as it was.

    Raises:
        InputError: sizes below 1, shares that do not leave the token a part, numbers out of range.
    """

    num_requests: int
    num_layers: int
    num_experts: int = 256
    top_k: int = 8
    blocks_per_request: int = 8
    block_size: int = 32
    prompt_tokens: int = 64
    accept: float = 0.15
    routed: str = "block"
    popularity_share: float = 0.22
    request_share: float = 0.12
    block_share: float = 0.22
    drift: float = 0.0145
    drift_power: float = 1.2

    def __post_init__(self) -> None:
        for name in ("num_requests", "num_layers", "num_experts", "top_k", "blocks_per_request", "block_size"):
            if getattr(self, name) < 1:
                raise InputError(f"denoise: {name} must be at least 1, got {getattr(self, name)}")
        if self.prompt_tokens < 0:
            raise InputError(f"denoise: prompt_tokens must not be negative, got {self.prompt_tokens}")
        if self.num_experts > np.iinfo(np.int16).max:
            raise InputError(f"denoise: num_experts must fit int16, got {self.num_experts}")
        if self.top_k > self.num_experts:
            raise InputError(f"denoise: top_k must be at most num_experts ({self.num_experts}), got {self.top_k}")
        if self.routed not in ROUTED:
            raise unknown("denoise: routed", self.routed, ROUTED)
        self._check_numbers()

    def _check_numbers(self) -> None:
        shares = (self.popularity_share, self.request_share, self.block_share)
        if not (min(shares) >= 0 and sum(shares) < 1):
            raise InputError(f"denoise: the shares of popularity, request and block must not be negative and their sum "
                             f"must stay below 1, got {shares}")
        if not 0 <= self.accept <= 1:
            raise InputError(f"denoise: accept must lie between 0 and 1, got {self.accept}")
        if not 0 <= self.drift < np.inf or not 0 < self.drift_power <= 1.9:
            raise InputError(f"denoise: drift must be finite and not negative and drift_power in (0, 1.9], got "
                             f"{self.drift} and {self.drift_power}")

    @property
    def token_share(self) -> float:
        """The share of a token's own part."""
        return 1.0 - self.popularity_share - self.request_share - self.block_share


def denoise_trace(settings: DenoiseSettings, *, seed: int = 0) -> RoutingTrace:
    """Return a trace of requests that are denoised one after another, marked ``synthetic`` in `source`.

    Rows are ordered by forward pass. Of a request with a KV cache the prompt comes first, as one prefill pass. `token_id`
    is `MASK_TOKEN` for a token that is not decided yet when the pass starts, `DECIDED_TOKEN` otherwise. Gate
    weights are the sigmoids of the chosen scores, normalised per token (LLaDA2.0 routes by sigmoid; its selection by
    groups of experts and its bias are not modelled), exact in float16. ``metadata["denoise"]`` holds what
    `denoise_passes` needs.
    """
    return _make(settings, seed, scored=False)[0]


def denoise_scored(settings: DenoiseSettings, *, seed: int = 0) -> tuple[RoutingTrace, np.ndarray]:
    """Return `denoise_trace` and its router scores, float32[token, layer, expert] in (0, 1)."""
    return _make(settings, seed, scored=True)


def _make(settings: DenoiseSettings, seed: int, *, scored: bool) -> tuple[RoutingTrace, np.ndarray]:
    rng = np.random.default_rng(seed)
    sizes = settings.num_layers, settings.num_experts
    popularity = _part(rng, settings.popularity_share, sizes)
    rows = _Rows()
    for request in range(settings.num_requests):
        base = popularity + _part(rng, settings.request_share, sizes)
        _add_request(rows, request, _Request(settings, base, rng, scored))
    about = {"block_size": settings.block_size, "prompt_tokens": settings.prompt_tokens, "mask_token_id": MASK_TOKEN}
    columns = {name: np.concatenate(parts) for name, parts in rows.columns.items()}
    scores = columns.pop("scores")
    trace = RoutingTrace(
        num_experts=settings.num_experts, model="synthetic", layer_ids=np.arange(settings.num_layers),
        source="synthetic: drifting router scores of denoised blocks", **columns,
        metadata={"synthetic": dataclasses.asdict(settings) | {"generator": "denoise", "seed": seed}, "denoise": about})
    return trace, scores


def masked_steps(block_size: int, accept: float, rng: np.random.Generator) -> np.ndarray:
    """Return bool[step, token]: which tokens of a block are not decided yet when each step starts.

    Each masked token passes the confidence threshold with probability `accept`; when none does, the most confident one
    is decided (the rule of LLaDA2.0's decoder), so that a block takes at most `block_size` steps.
    """
    masked = np.ones(block_size, bool)
    steps = []
    while masked.any():
        steps.append(masked.copy())
        doubt = np.where(masked, rng.random(block_size), 2.0)
        masked &= doubt >= max(accept, np.nextafter(doubt.min(), 2.0))
    return np.array(steps)


class _Routed(NamedTuple):
    """Routing of tokens: expert_ids and gate_weights [..., layer, k], scores [..., layer, expert] (or no experts)."""

    expert_ids: np.ndarray
    gate_weights: np.ndarray
    scores: np.ndarray

    def at(self, place: Any) -> _Routed:
        """Return some of the tokens."""
        return _Routed(*(array[place] for array in self))


def _joined(parts: Sequence[_Routed]) -> _Routed:
    return _Routed(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


class _Rows:
    """Columns of the trace, pass by pass."""

    def __init__(self) -> None:
        self.columns: dict[str, list[np.ndarray]] = {}
        self.num_passes = 0

    def add(self, request: int, phase: int, position: np.ndarray, masked: np.ndarray, routed: _Routed) -> None:
        """Add one forward pass."""
        rows = len(position)
        values = {"request_id": np.full(rows, request), "position": position, "phase": np.full(rows, phase),
                  "step": np.full(rows, self.num_passes), "token_id": np.where(masked, MASK_TOKEN, DECIDED_TOKEN)}
        for name, value in (values | routed._asdict()).items():
            self.columns.setdefault(name, []).append(value)
        self.num_passes += 1


@dataclass(frozen=True)
class _Request:
    """Draws the routing of one request; `base` float32[layer, expert] is what all its tokens share."""

    settings: DenoiseSettings
    base: np.ndarray
    rng: np.random.Generator
    scored: bool

    def block(self, num_steps: int, num_tokens: int) -> _Routed:
        """Return the routing of a block, [step, token, ...]."""
        own, shape = self.settings, self.base.shape
        lag = np.abs(np.subtract.outer(np.arange(num_steps), np.arange(num_steps)))
        correlation = np.exp(-((own.drift * lag) ** own.drift_power))
        mix = np.linalg.cholesky(correlation + _JITTER * np.eye(num_steps)).astype(np.float32)
        shared = np.tensordot(mix, _part(self.rng, own.block_share, (num_steps, *shape)), 1)
        token = np.tensordot(mix, _part(self.rng, own.token_share, (num_steps, num_tokens, *shape)), 1)
        return self.route(self.base + shared[:, None] + token)

    def route(self, logits: np.ndarray) -> _Routed:
        """Return the top-k of float32[..., expert], best first, and their normalised sigmoids."""
        top_k = self.settings.top_k
        order = np.argpartition(-logits, top_k - 1, axis=-1)[..., :top_k]
        order = np.take_along_axis(order, np.argsort(-np.take_along_axis(logits, order, -1), axis=-1, kind="stable"), -1)
        best = _sigmoid(np.take_along_axis(logits, order, -1))
        weights = (best / best.sum(axis=-1, keepdims=True)).astype(np.float16)
        return _Routed(order.astype(np.int16), weights, _sigmoid(logits) if self.scored else logits[..., :0])


def _add_request(rows: _Rows, request: int, draw: _Request) -> None:
    """Add the passes of one request: the prompt if there is a cache, then block after block, step after step."""
    settings, size = draw.settings, draw.settings.block_size
    pieces = [min(size, settings.prompt_tokens - start) for start in range(0, settings.prompt_tokens, size)]
    before = [draw.block(1, piece).at(0) for piece in pieces]
    if pieces and settings.routed != "prefix":
        positions = np.arange(settings.prompt_tokens)
        rows.add(request, PREFILL, positions, np.zeros(len(positions), bool), _joined(before))
    for number in range(settings.blocks_per_request):
        masked = masked_steps(size, settings.accept, draw.rng)
        block = draw.block(len(masked), size)
        first = settings.prompt_tokens + number * size
        prefix = before if settings.routed == "prefix" else []
        start = np.arange(first if prefix else 0)
        for step, open_tokens in enumerate(masked):
            keep = open_tokens if settings.routed == "masked" else np.ones(size, bool)
            position = np.concatenate([start, first + np.flatnonzero(keep)])
            undecided = np.concatenate([np.zeros(len(start), bool), open_tokens[keep]])
            rows.add(request, DENOISE, position, undecided, _joined([*prefix, block.at((step, keep))]))
        before.append(block.at(-1))


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-logits))


def _part(rng: np.random.Generator, share: float, shape: tuple[int, ...]) -> np.ndarray:
    return np.float32(np.sqrt(share)) * rng.standard_normal(shape, np.float32)
