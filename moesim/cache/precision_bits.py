"""EdgeMoE's offline choice of a bit width for every expert, under a tolerable loss."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moesim.artifacts import read_json
from moesim.cache.precision_debit import token_shares
from moesim.errors import InputError
from moesim.traces.trace import PAD, RoutingTrace

LOSS_SCHEMA = "moesim.expert_loss/1"

Loss = Callable[[np.ndarray], float]  # int[layer, expert], the bits of each expert -> loss


@dataclass(frozen=True)
class BitChoice:
    """Bits per expert, and how they were found.

    Attributes:
        bits: int64[layer, expert], read-only.
        loss: of these bits. tolerable_loss: what was allowed.
        lower_bits, upper_bits: the bounds; experts have one of the two.
        num_lower: experts at the lower bound.
        evaluations: calls of the loss.
        source: where the loss comes from; a proxy says so.
    """

    bits: np.ndarray
    loss: float
    tolerable_loss: float
    lower_bits: int
    upper_bits: int
    num_lower: int
    evaluations: int
    source: str = "stated"
    proxy: bool = False


def choose_bits(loss: Loss, importance: np.ndarray, widths: Sequence[int], tolerable_loss: float, *,
                source: str = "stated", proxy: bool = False) -> BitChoice:
    """Return EdgeMoE's bits per expert (Yi et al., arXiv 2308.14352, IEEE TMC 2025, expert-wise bitwidth).

    The bounds are neighbours among `widths` between which the loss with all experts at one width crosses the tolerable loss.
    Of the experts, in order of importance (ties: lower key), the K least important go to the lower bound. K grows from
    one, doubling, while the loss is tolerated, and then shrinks by halves between the last that was and the first that was
    not. So K is tolerated and K + 1 is not; where the loss grows with K, and not otherwise, it is the largest such K.

    Args:
        loss: of int64[layer, expert] bits. importance: float[layer, expert], what narrowing an expert alone costs.
        widths: those that experts may have.

    Raises:
        InputError: no widths, an importance that is not finite, or a loss above the tolerable one at the widest width.
    """
    counted = _Counted(loss)
    lower, upper = _bounds(counted, importance.shape, sorted(set(widths)), tolerable_loss)
    order = _least_first(importance)

    def with_lower(count: int) -> np.ndarray:
        bits = np.full(importance.size, upper, np.int64)
        bits[order[:count]] = lower
        return bits.reshape(importance.shape)

    count = importance.size if lower == upper else _largest_tolerated(
        lambda count: counted(with_lower(count)) <= tolerable_loss, importance.size)
    bits = with_lower(count)
    found = counted(bits)
    bits.setflags(write=False)
    return BitChoice(bits, found, tolerable_loss, lower, upper, count, counted.calls, source, proxy)


def importance_of(loss: Loss, shape: tuple[int, int], *, low_bits: int = 2, other_bits: int = 4) -> np.ndarray:
    """Return float64[layer, expert]: the loss when one expert alone is at `low_bits` and all others at `other_bits`."""
    found = np.empty(shape)
    for place in np.ndindex(*shape):
        bits = np.full(shape, other_bits, np.int64)
        bits[place] = low_bits
        found[place] = loss(bits)
    return found


@dataclass(frozen=True)
class AdditiveLoss:
    """A loss that is a sum over experts: `table` float64[width, layer, expert] for `widths`.

    Raises:
        InputError: a table of another shape, losses that are negative, not finite, or grow with the width.
    """

    widths: tuple[int, ...]
    table: np.ndarray
    source: str = "stated"
    proxy: bool = False

    def __post_init__(self) -> None:
        table = np.array(self.table, np.float64)
        if table.ndim != 3 or len(table) != len(self.widths) or list(self.widths) != sorted(set(self.widths)):
            raise InputError(f"expert loss: needs one table [layer, expert] for each of the rising widths "
                             f"{list(self.widths)}, got shape {list(table.shape)}")
        if not np.all(np.isfinite(table)) or table.min() < 0 or np.any(np.diff(table, axis=0) > 0):
            raise InputError("expert loss: losses must be finite, not negative, and no larger at a wider width")
        table.setflags(write=False)
        object.__setattr__(self, "table", table)

    def __call__(self, bits: np.ndarray) -> float:
        """Return the sum; raises InputError for bits that the table does not have."""
        return float(np.take_along_axis(self.table, self._level(bits)[None], axis=0).sum())

    def importance(self, low_bits: int | None = None, other_bits: int | None = None) -> np.ndarray:
        """Return float64[layer, expert], what one expert alone costs at the lower width (default: the two narrowest)."""
        low, other = low_bits or self.widths[0], other_bits or self.widths[min(1, len(self.widths) - 1)]
        shape = self.table.shape[1:]
        levels = [self._level(np.full(shape, bits))[0, 0] for bits in (low, other)]
        return self.table[levels[0]] - self.table[levels[1]]

    def choose(self, tolerable_loss: float) -> BitChoice:
        """Return the bits by this loss and its own importance."""
        return choose_bits(self, self.importance(), self.widths, tolerable_loss, source=self.source, proxy=self.proxy)

    def _level(self, bits: np.ndarray) -> np.ndarray:
        missing = np.setdiff1d(bits, self.widths)
        if len(missing):
            raise InputError(f"expert loss: no loss for {missing[0]} bits; the table has {list(self.widths)}")
        return np.searchsorted(self.widths, bits)


def read_expert_loss(path: str | os.PathLike[str], num_layers: int, num_experts: int) -> AdditiveLoss:
    """Read what each expert adds to the loss at each width.

    The file: ``{"schema": "moesim.expert_loss/1", "source": "...", "loss": {"2": [[...], ...], "4": [[...], ...]}}``, each table
    [layer, expert], in any unit in which the tolerable loss is then given.

    Raises:
        InputError: a file that is not one, named with the key at fault.
    """
    body = read_json(path, LOSS_SCHEMA)
    loss, source = body.get("loss"), body.get("source")
    if not isinstance(loss, dict) or not loss:
        raise InputError(f"{path}: 'loss' must map widths in bits to tables [layer, expert], got {loss!r}")
    if not isinstance(source, str) or not source:
        raise InputError(f"{path}: 'source' must say where the losses come from, got {source!r}")
    tables = {_width(path, name): _table(path, name, rows, (num_layers, num_experts)) for name, rows in loss.items()}
    widths = tuple(sorted(tables))
    try:
        return AdditiveLoss(widths, np.stack([tables[width] for width in widths]), source)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def gate_mass_loss(trace: RoutingTrace, widths: Sequence[int]) -> AdditiveLoss:
    """Return a proxy where no losses were measured: an expert's share of the gate weight times ``4**-bits``.

    Uniform quantisation noise has a power of ``4**-bits``. Scaled so that all experts at the narrowest width lose 1, at the widest
    0. It is no accuracy: the tolerable loss is then a share of that noise, and results are labelled a proxy.
    """
    rising = tuple(sorted(set(widths)))
    if len(rising) < 2:
        raise InputError(f"gate mass: needs at least two widths, got {list(widths)}")
    shares = token_shares(trace.expert_ids, trace.gate_weights)
    mass = np.zeros((trace.num_layers, trace.num_experts + 1))
    layers = np.broadcast_to(np.arange(trace.num_layers)[:, None], trace.expert_ids.shape)
    np.add.at(mass, (layers, np.where(trace.expert_ids == PAD, trace.num_experts, trace.expert_ids)), shares)
    mass = mass[:, :-1] / mass[:, :-1].sum()
    noise = np.array([4.0 ** -(bits - rising[0]) for bits in rising])
    scale = (noise - noise[-1]) / (1 - noise[-1])
    return AdditiveLoss(rising, scale[:, None, None] * mass, "proxy: gate weight x 4^-bits", proxy=True)


class _Counted:
    """A loss that counts its calls and is asked for finite answers only."""

    def __init__(self, loss: Loss) -> None:
        self._loss, self.calls = loss, 0

    def __call__(self, bits: np.ndarray) -> float:
        self.calls += 1
        found = float(self._loss(bits))
        if not np.isfinite(found):
            raise InputError(f"choose bits: the loss must be finite, got {found}")
        return found


def _bounds(loss: Loss, shape: tuple[int, ...], widths: list[int], tolerable_loss: float) -> tuple[int, int]:
    """Return the widest width whose loss is too large and the next, which is tolerated (equal: the narrowest already is)."""
    if not widths or widths[0] < 1:
        raise InputError(f"choose bits: widths must be at least 1 bit, got {widths}")
    too_narrow = 0
    for bits in widths:
        found = loss(np.full(shape, bits, np.int64))
        if found <= tolerable_loss:
            return too_narrow or bits, bits
        too_narrow = bits
    raise InputError(f"choose bits: even {widths[-1]} bits for all experts lose {found:.4g}, more than the tolerable "
                     f"{tolerable_loss:.4g}")


def _largest_tolerated(tolerated: Callable[[int], bool], most: int) -> int:
    """Return a K in 0 ... most - 1 that is tolerated while K + 1 is not (0 is tolerated and `most` is not)."""
    good, step = 0, 1
    while good + step < most and tolerated(good + step):
        good, step = good + step, step * 2
    bad = min(good + step, most)
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if tolerated(middle) else (good, middle)
    return good


def _least_first(importance: np.ndarray) -> np.ndarray:
    if importance.ndim != 2 or not importance.size or not np.all(np.isfinite(importance)):
        raise InputError("choose bits: importance must be finite, [layer, expert]")
    return np.argsort(importance, axis=None, kind="stable")


def _width(path: str | os.PathLike[str], name: str) -> int:
    if not name.isdigit() or int(name) < 1:
        raise InputError(f"{path}: loss.{name}: a width must be a whole number of bits, got {name!r}")
    return int(name)


def _table(path: str | os.PathLike[str], name: str, rows: Any, shape: tuple[int, int]) -> np.ndarray:
    try:
        table = np.array(rows, np.float64)
    except (TypeError, ValueError):
        table = np.empty(0)
    if table.shape != shape:
        raise InputError(f"{path}: loss.{name} must be numbers [layer, expert] = {list(shape)}, got shape "
                         f"{list(table.shape)}")
    return table
