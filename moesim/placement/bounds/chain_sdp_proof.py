"""From the chain SDP's multipliers to a bound that holds whatever they are, and the arrays that prove it."""

from __future__ import annotations

from concurrent.futures import Executor

import numpy as np

from moesim.placement.bounds.chain_sdp_iterate import ChainSDP
from moesim.placement.bounds.matching import best_matching

_STEPS = 32767  # int16
_EPS = float(np.finfo(np.float64).eps)


def prove_level(sdp: ChainSDP, counts: np.ndarray) -> tuple[float, dict[str, np.ndarray]]:
    """Return an upper bound on the transitions that any plan keeps on its places, and its multipliers.

    With joint multipliers G_l = [[P, A / 2], [A' / 2, Q]] and weights t >= 0 of the cuts, H_l their weighted sum of left
    sides, as a joint matrix,

        ``sum <T_l, Y_l> <= sum_l max_Z <G_l, Z> + sum_l max_Y <T_l - A_l - 2 H_l.cross, Y>
        + sum_l max_U <-(P_l + Q_(l-1) + H parts), U> + sum t``

    where Z runs over the spectra of plans (the largest R - 1 eigenvalues of G_l, its blocks without row and column
    means, times 2 c, plus the mean part), Y over b-matchings and U over b-matchings with diagonal 1; the last two
    are replaced by their duals. Multipliers are rounded to int16 first.

    Arrays: ``cross`` int16[pair, E, E], ``first``, ``second`` int16[pair, E (E + 1) / 2] (rows of the upper triangle)
    times ``scale`` float64[pair]; ``cuts`` int16[cut, 4], ``cut_pair`` int16[cut], ``cut_weight`` float32[cut];
    potentials ``rows``, ``columns`` float64[pair, E] and ``within`` float64[layer, E].
    """
    arrays = _quantised(sdp)
    joints = _joints(arrays, sdp.num_experts)
    rest = joints.copy()
    for pair, cut, weight in zip(arrays["cut_pair"], arrays["cuts"], arrays["cut_weight"], strict=True):
        _add_cut(rest[pair], cut, float(weight))
    total = float(arrays["cut_weight"].astype(np.float64).sum())
    total += sum(sdp.pool.map(lambda joint: _spectral(joint, sdp.capacity), joints))
    arrays |= _potentials(rest, counts, sdp.capacity, sdp.pool)
    total += _entry_bound(rest, counts, sdp.capacity, arrays)
    return total * (1 + 2**10 * _EPS), arrays


def _quantised(sdp: ChainSDP) -> dict[str, np.ndarray]:
    """Return the multipliers in transitions, rounded to int16 times a scale per pair."""
    size = sdp.num_experts
    upper = np.triu_indices(size)
    unit = float(sdp.penalty) * sdp.scale
    parts = {"first": sdp.dual[:, :size, :size], "second": sdp.dual[:, size:, size:], "cross": sdp.dual[:, :size, size:]}
    scale = np.maximum(np.abs(sdp.dual[:, :size]).max(axis=(1, 2)), np.abs(parts["second"]).max(axis=(1, 2)))
    scale = np.maximum(scale.astype(np.float64) * unit / _STEPS, 2.0**-60)
    arrays = {"scale": scale}
    for name, part in parts.items():
        steps = np.rint(part.astype(np.float64) * (-unit / scale[:, None, None])).astype(np.int16)
        arrays[name] = steps if name == "cross" else steps[:, upper[0], upper[1]]
    weights = [(weight * sdp.scale).astype(np.float32) for weight in sdp.weights]
    live = [weight > 0 for weight in weights]
    arrays["cuts"] = np.concatenate([cuts[keep] for cuts, keep in zip(sdp.cuts, live, strict=True)]).astype(np.int16)
    arrays["cut_weight"] = np.concatenate([weight[keep] for weight, keep in zip(weights, live, strict=True)])
    arrays["cut_pair"] = np.repeat(np.arange(len(live)), [int(keep.sum()) for keep in live]).astype(np.int16)
    return arrays


def _joints(arrays: dict[str, np.ndarray], size: int) -> np.ndarray:
    """Return float64[pair, 2 E, 2 E], the multipliers as symmetric joint matrices."""
    scale = arrays["scale"][:, None, None]
    joints = np.zeros((len(scale), 2 * size, 2 * size))
    joints[:, :size, size:] = arrays["cross"] * scale
    joints[:, size:, :size] = joints[:, :size, size:].transpose(0, 2, 1)
    i, j = np.triu_indices(size)
    for start, name in ((0, "first"), (size, "second")):
        joints[:, start + i, start + j] = joints[:, start + j, start + i] = arrays[name] * scale[:, 0]
    return joints


def _add_cut(joint: np.ndarray, cut: np.ndarray, weight: float) -> None:
    members = [int(one) for one in cut if one >= 0]
    for a, i in enumerate(members):
        for j in members[a + 1:]:
            half = 0.5 * weight if a == 0 else -0.5 * weight
            joint[i, j] += half
            joint[j, i] += half


def _spectral(joint: np.ndarray, capacity: int) -> float:
    """Return the largest ``<joint, Z>`` over matrices with a plan's spectrum, rounded up."""
    size = len(joint) // 2
    blocks = joint.reshape(2, size, 2, size)
    rows, columns = blocks.mean(axis=3, keepdims=True), blocks.mean(axis=1, keepdims=True)
    centred = (blocks - rows - columns + rows.mean(axis=1, keepdims=True)).reshape(2 * size, 2 * size)
    # block-constant directions are no part of the spectrum: sink them, lest their zeros count among the largest
    sunk = 2.0 * float(np.linalg.norm(centred)) / size
    centred[:size, :size] -= sunk
    centred[size:, size:] -= sunk
    values = np.linalg.eigvalsh(centred)
    places = size // capacity
    top = float(values[len(values) - (places - 1):].sum()) if places > 1 else 0.0
    slack = 2 * capacity * places * 2 * size * _EPS * float(np.abs(values).max())
    return 2 * capacity * top + slack + capacity / size * float(joint.sum())


def _potentials(rest: np.ndarray, counts: np.ndarray, capacity: int, pool: Executor) -> dict[str, np.ndarray]:
    size = counts.shape[1]
    across = list(pool.map(lambda pair: best_matching(counts[pair] - 2 * rest[pair][:size, size:], capacity, True)[1:],
                           range(len(counts))))
    within = list(pool.map(lambda layer: best_matching(within_layer(rest, layer), capacity - 1, True,
                                                       diagonal=False)[1:], range(len(counts) + 1)))
    return {"rows": np.stack([rows for rows, _ in across]), "columns": np.stack([columns for _, columns in across]),
            "within": np.stack([0.5 * (rows + columns) for rows, columns in within])}


def within_layer(rest: np.ndarray, layer: int) -> np.ndarray:
    """Return float64[E, E], what the multipliers leave on U of a layer."""
    size = rest.shape[1] // 2
    left = np.zeros((size, size))
    if layer < len(rest):
        left -= rest[layer][:size, :size]
    if layer > 0:
        left -= rest[layer - 1][size:, size:]
    return left


def _entry_bound(rest: np.ndarray, counts: np.ndarray, capacity: int, arrays: dict[str, np.ndarray]) -> float:
    size, total = counts.shape[1], 0.0
    for pair, wanted in enumerate(counts):
        rows, columns = arrays["rows"][pair], arrays["columns"][pair]
        over = wanted - 2 * rest[pair][:size, size:] - rows[:, None] - columns
        total += capacity * float(rows.sum() + columns.sum()) + float(np.maximum(over, 0.0).sum())
    for layer, potential in enumerate(arrays["within"]):
        left = within_layer(rest, layer)
        over = np.maximum(left - potential[:, None] - potential, 0.0)
        np.fill_diagonal(over, 0.0)
        total += 2 * (capacity - 1) * float(potential.sum()) + float(over.sum()) + float(np.trace(left))
    return total
