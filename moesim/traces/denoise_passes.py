"""Denoising passes of a trace: which block each belongs to, how often it uses each expert, how alike they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moesim.errors import InputError
from moesim.traces.trace import DENOISE, PAD, RoutingTrace


@dataclass(frozen=True)
class DenoisePasses:
    """Forward passes in order of execution, one request in each; read-only arrays.

    Attributes:
        counts: int64[step, layer, expert], tokens that a pass sends to each expert.
        rows: per pass, int64[token] indexes into the trace.
        request: int64[step], the request of each pass.
        block: int64[step], its block within the request, from 0.
        step_in_block: int64[step], from 0 in every block of every request.
        active: int64[step], routed tokens of the active block.
        block_end: int64[step], the position after the last one of the active block.
    """

    counts: np.ndarray
    rows: tuple[np.ndarray, ...]
    request: np.ndarray
    block: np.ndarray
    step_in_block: np.ndarray
    active: np.ndarray
    block_end: np.ndarray

    def __post_init__(self) -> None:
        for value in (self.counts, self.request, self.block, self.step_in_block, self.active, self.block_end):
            value.setflags(write=False)

    @property
    def num_steps(self) -> int:
        """Number of passes."""
        return len(self.counts)

    @property
    def block_starts(self) -> np.ndarray:
        """bool[step]: whether a pass is the first of its block."""
        return self.step_in_block == 0

    def block_index(self) -> np.ndarray:
        """Return int64[step], a running number of the block over all requests, from 0."""
        return np.cumsum(self.block_starts) - 1

    @property
    def num_blocks(self) -> int:
        """Number of blocks over all requests."""
        return int(self.block_starts.sum())

    def steps_per_block(self) -> np.ndarray:
        """Return int64[block], the passes that each block took."""
        return np.bincount(self.block_index(), minlength=self.num_blocks)


def denoise_passes(trace: RoutingTrace, *, block_size: int | None = None,
                   prompt_tokens: int | None = None) -> DenoisePasses:
    """Return the denoising passes of a trace, by its `step`.

    The block of a pass is that of its last position: ``(position - prompt_tokens) // block_size``. So it is found as
    well where decided tokens or the prefix are not routed.

    Args:
        block_size, prompt_tokens: where blocks begin; default what the generator noted in ``metadata["denoise"]``.

    Raises:
        InputError: no denoising rows, unknown sizes, a pass of several requests, or a block that comes again after
            a later one.
    """
    size = _setting(trace, "block_size", block_size, 1)
    prompt = _setting(trace, "prompt_tokens", prompt_tokens, 0)
    rows = np.flatnonzero(trace.phase == DENOISE)
    if not len(rows):
        raise InputError("the trace has no denoise rows")
    rows = rows[np.argsort(trace.step[rows], kind="stable")]
    cuts = np.flatnonzero(np.diff(trace.step[rows])) + 1
    passes = tuple(np.split(rows, cuts))
    request, last = _one_request(trace, passes), np.array([int(trace.position[part].max()) for part in passes])
    block = (last - prompt) // size
    if block.min() < 0:
        raise InputError(f"a denoising pass ends at position {last[block.argmin()]}, inside a prompt of {prompt} tokens")
    _check_order(request, block)
    first = prompt + block * size
    active = np.array([int((trace.position[part] >= start).sum()) for part, start in zip(passes, first, strict=True)])
    counts = np.stack([_counts(trace.expert_ids[part], trace.num_experts) for part in passes])
    return DenoisePasses(counts, passes, request, block, _step_in_block(request, block), active, first + size)


def lag_similarity(passes: DenoisePasses, lags: Sequence[int]) -> np.ndarray:
    """Return float64[lag]: mean cosine similarity of the expert counts of two passes of one block, `lag` steps apart.

    The mean is over layers and pairs of passes (the similarity that TIDE reports for LLaDA2.0-mini, arXiv 2605.20179).

    Raises:
        InputError: a lag below 1, or longer than every block.
    """
    if any(lag < 1 for lag in lags):
        raise InputError(f"lags must be at least 1, got {list(lags)}")
    counts, block = passes.counts.astype(np.float64), passes.block_index()
    length = np.sqrt((counts**2).sum(axis=2))
    found = []
    for lag in lags:
        first = np.flatnonzero(block[lag:] == block[:-lag])
        if not len(first):
            raise InputError(f"no block has {lag + 1} steps, so there is no pair of passes at lag {lag}")
        products = (counts[first] * counts[first + lag]).sum(axis=2)
        found.append(float((products / (length[first] * length[first + lag])).mean()))
    return np.array(found)


def distinct_experts(passes: DenoisePasses) -> np.ndarray:
    """Return int64[step, layer], the distinct experts that a pass uses in a layer."""
    return (passes.counts > 0).sum(axis=2)


def masked_fraction(trace: RoutingTrace, passes: DenoisePasses, *, mask_token_id: int | None = None) -> np.ndarray:
    """Return float64[step], the share of the active block's positions that are not decided when a pass starts.

    Raises:
        InputError: a trace without token ids, or an unknown id of the mask token.
    """
    if trace.token_id is None:
        raise InputError("the trace has no token ids, so masked tokens cannot be told from decided ones")
    mask, token_id = _setting(trace, "mask_token_id", mask_token_id, None), trace.token_id
    size = _setting(trace, "block_size", None, 1)
    return np.array([float((token_id[rows] == mask).sum()) for rows in passes.rows]) / size


def _setting(trace: RoutingTrace, name: str, value: int | None, least: int | None) -> int:
    about: Any = trace.metadata.get("denoise", {})
    found = value if value is not None else about.get(name) if isinstance(about, dict) else None
    if type(found) is not int or (least is not None and found < least):
        expected = "a whole number" if least is None else f"a whole number of at least {least}"
        raise InputError(f"denoising passes: {name} must be {expected}, got {found!r}; give it, or a trace whose metadata "
                         f"has it under 'denoise'")
    return found


def _one_request(trace: RoutingTrace, passes: Sequence[np.ndarray]) -> np.ndarray:
    found = []
    for rows in passes:
        ids = np.unique(trace.request_id[rows])
        if len(ids) > 1:
            raise InputError(f"step {trace.step[rows[0]]} holds requests {ids[0]} and {ids[1]}; denoising passes are of "
                             f"one request each (batch size 1)")
        found.append(int(ids[0]))
    return np.array(found, np.int64)


def _check_order(request: np.ndarray, block: np.ndarray) -> None:
    for one in np.unique(request):
        own = np.flatnonzero(request == one)
        if own[-1] - own[0] != len(own) - 1:
            raise InputError(f"request {one} is interrupted by another one; denoising passes are of one request at a time")
        if np.any(np.diff(block[own]) < 0):
            raise InputError(f"request {one} goes back to an earlier block")


def _step_in_block(request: np.ndarray, block: np.ndarray) -> np.ndarray:
    new = np.ones(len(block), bool)
    new[1:] = (np.diff(block) != 0) | (np.diff(request) != 0)
    start = np.flatnonzero(new)
    return np.arange(len(block)) - start[np.cumsum(new) - 1]


def _counts(expert_ids: np.ndarray, num_experts: int) -> np.ndarray:
    """Return int64[layer, expert] from int16[token, layer, k]; pads are left out."""
    layers = expert_ids.shape[1]
    keys = np.where(expert_ids == PAD, layers * num_experts, expert_ids + np.arange(layers)[None, :, None] * num_experts)
    return np.bincount(keys.ravel(), minlength=layers * num_experts + 1)[:-1].reshape(layers, num_experts)
