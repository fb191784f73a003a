"""Routes in any order (a request, a token, a layer, its experts) put together into rows of tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from moesim.errors import InputError
from moesim.traces.importers.base import INT32_MAX, RawRouting
from moesim.traces.trace import PAD


@dataclass(frozen=True)
class Routes:
    """N routes, in the order of the file.

    Attributes:
        request, token, layer: int64[route]; requests are numbered in order of first appearance.
        expert_ids: int64[route, k], -1 pads.
        gate_weights: float32[route, k] or None.
        phase, token_id: int64[route] or None; a token's first route speaks for it.
        where: the place of a route in the file, for messages.
        request_name: what the file calls a request, for messages.
    """

    request: np.ndarray
    token: np.ndarray
    layer: np.ndarray
    expert_ids: np.ndarray
    where: Callable[[int], str]
    request_name: Callable[[int], str]
    gate_weights: np.ndarray | None = None
    phase: np.ndarray | None = None
    token_id: np.ndarray | None = None


def padded(rows: list[list[int]]) -> np.ndarray:
    """Return int64[row, k] of lists of different lengths, -1 at their ends."""
    width = max((len(row) for row in rows), default=0)
    return np.array([row + [PAD] * (width - len(row)) for row in rows], dtype=np.int64).reshape(len(rows), width)


def padded_weights(rows: list[list[float]], width: int) -> np.ndarray:
    """Return float32[row, k] of lists of different lengths, 0 at their ends."""
    return np.array([row + [0.0] * (width - len(row)) for row in rows], dtype=np.float32).reshape(len(rows), width)


def assemble(routes: Routes, path: object, *, last_layer_may_lack: bool = False, layers_named: bool = True,
             model: str = "", num_experts: int | None = None, notes: tuple[str, ...] = ()) -> RawRouting:
    """Return the tokens, request by request and in order of their index.

    Args:
        last_layer_may_lack: leave out tokens without a route in the last layer (llama.cpp computes there only the
            tokens whose logits are asked for), instead of raising.

    Raises:
        InputError: no routes, one that is there twice, or a token without a route in some layer.
    """
    if not len(routes.request) or not routes.expert_ids.shape[1]:
        raise InputError(f"{path}: no routes")
    for name in ("token", "layer"):
        values = getattr(routes, name)
        if values.min() < 0 or values.max() > INT32_MAX:
            row = int(np.flatnonzero((values < 0) | (values > INT32_MAX))[0])
            raise InputError(f"{routes.where(row)}: {name} {values[row]} is outside 0 ... 2^31 - 1")
    order = np.lexsort((routes.layer, routes.token, routes.request))
    layer_ids = np.unique(routes.layer)
    order, dropped = _complete(routes, order, layer_ids, path, last_layer_may_lack)
    if dropped:
        notes = (*notes, f"left out {dropped} tokens without a route in the last layer (layer {layer_ids[-1]}): the "
                         f"engine computes there only tokens whose logits are asked for")
    shape = (-1, len(layer_ids))
    first = order.reshape(shape)[:, 0]
    optional: dict[str, Any] = {name: None if value is None else value[first]
                for name, value in (("phase", routes.phase), ("token_id", routes.token_id))}
    return RawRouting(
        routes.expert_ids[order].reshape(*shape, routes.expert_ids.shape[1]), routes.request[first],
        routes.token[first], layer_ids,
        None if routes.gate_weights is None else routes.gate_weights[order].reshape(*shape, routes.expert_ids.shape[1]),
        model, notes, num_experts=num_experts, layers_named=layers_named, **optional)


def _complete(routes: Routes, order: np.ndarray, layer_ids: np.ndarray, path: object,
              last_may_lack: bool) -> tuple[np.ndarray, int]:
    """Return the sorted routes of the tokens that have one in every layer, and how many tokens were left out."""
    request, token, layer = routes.request[order], routes.token[order], routes.layer[order]
    new = np.ones(len(order), bool)
    new[1:] = (np.diff(request) != 0) | (np.diff(token) != 0)
    twice = np.flatnonzero(~new[1:] & (np.diff(layer) == 0)) + 1
    if len(twice):
        row = int(max(order[twice[0]], order[twice[0] - 1]))
        raise InputError(f"{routes.where(row)}: request {routes.request_name(int(routes.request[row]))}, token "
                         f"{routes.token[row]}, layer {routes.layer[row]} is there twice")
    group = np.cumsum(new) - 1
    sizes = np.bincount(group)
    lacking = sizes != len(layer_ids)
    if not lacking.any():
        return order, 0
    # layers differ within a token, so a token with all layers but one lacks the last if it has not got it
    has_last = np.bincount(group, weights=layer == layer_ids[-1]) > 0
    only_last = lacking & (sizes == len(layer_ids) - 1) & ~has_last
    if last_may_lack and (only_last | ~lacking).all() and not lacking.all():
        return order[~lacking[group]], int(lacking.sum())
    at = int(np.flatnonzero(lacking)[0])
    rows = np.flatnonzero(group == at)
    missing = np.setdiff1d(layer_ids, layer[rows])[0]
    raise InputError(f"{path}: request {routes.request_name(int(request[rows[0]]))}, token {token[rows[0]]} has no "
                     f"route for layer {missing}")


def request_numbers(token: np.ndarray, layer: np.ndarray) -> np.ndarray:
    """Return int64[record]: how often this token and layer were there before, made to never fall along the file.

    Where a file names tokens but no requests, a token and layer that come again begin the next request.
    """
    order = np.lexsort((np.arange(len(token)), layer, token))
    new = np.ones(len(order), bool)
    new[1:] = (np.diff(token[order]) != 0) | (np.diff(layer[order]) != 0)
    starts = np.flatnonzero(new)
    seen = np.empty(len(order), np.int64)
    seen[order] = np.arange(len(order)) - np.repeat(starts, np.diff(np.append(starts, len(order))))
    return np.maximum.accumulate(seen)
