"""What an eviction policy is, what it may know, and the registry of policies."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np

from moesim.cache.policies.arc import ArcPolicy
from moesim.cache.policies.belady import BeladyBypassPolicy, BeladyPolicy
from moesim.cache.policies.edgemoe import EdgeMoePolicy, EdgeMoePrintedPolicy
from moesim.cache.policies.fifo import FifoPolicy
from moesim.cache.policies.fld import FldPolicy
from moesim.cache.policies.hobbit import HobbitPolicy
from moesim.cache.policies.lfu import LfuPolicy, LfuResidentPolicy
from moesim.cache.policies.lfu_fifo import LfuFifoPolicy
from moesim.cache.policies.lfuda import LfudaPolicy
from moesim.cache.policies.lhu import LhuPolicy
from moesim.cache.policies.lirs import LirsPolicy
from moesim.cache.policies.lru import LruPolicy
from moesim.cache.policies.moe_infinity import MoeInfinityPolicy
from moesim.cache.policies.mrs import MrsPolicy, MrsRepositoryPolicy
from moesim.cache.policies.s3fifo import S3FifoPolicy
from moesim.cache.policies.sch import SegmentCache4Policy, SegmentCache64Policy, SegmentCachePolicy
from moesim.cache.policies.sieve import SievePolicy
from moesim.cache.policies.static import StaticPolicy
from moesim.cache.scores import RouterScores
from moesim.errors import InputError
from moesim.registry import Registry
from moesim.traces.trace import RoutingTrace

INFORMATION_LEVELS = {
    "I0": "static facts: shapes, offline popularity, offline transitions",
    "I1": "the past of this run",
    "I2": "the current layer's router scores and token counts",
    "I3": "a prediction for later layers",
    "I4": "the exact future",
}


@dataclass(frozen=True)
class AccessStream:
    """The expert accesses of a run, in order; one access is one (step, layer) with its distinct experts.

    Attributes:
        layers: int32[access], the layer of each access.
        offsets: int64[access + 1]; access i uses ``experts[offsets[i]:offsets[i + 1]]``.
        experts: int16[...], rising within an access.

    Raises:
        InputError: arrays that disagree, negative ids, or experts of one access that do not rise.
    """

    layers: np.ndarray
    offsets: np.ndarray
    experts: np.ndarray

    def __post_init__(self) -> None:
        for name, dtype in (("layers", np.int32), ("offsets", np.int64), ("experts", np.int16)):
            object.__setattr__(self, name, _integers(getattr(self, name), dtype, name))
        if self.num_accesses < 1 or len(self.offsets) != self.num_accesses + 1:
            raise InputError(
                f"access stream: needs at least one access, and one offset more than layers; got "
                f"{self.num_accesses} layers and {len(self.offsets)} offsets")
        if self.offsets[0] != 0 or self.offsets[-1] != len(self.experts) or np.any(np.diff(self.offsets) < 0):
            raise InputError(f"access stream: offsets must rise from 0 to {len(self.experts)} (the experts)")
        _check_rising(self)

    @property
    def num_accesses(self) -> int:
        """Number of (step, layer) pairs."""
        return len(self.layers)

    def experts_of(self, access: int) -> np.ndarray:
        """Return int16[...], the distinct experts of one access."""
        return self.experts[self.offsets[access]: self.offsets[access + 1]]

    def keys(self, num_experts: int) -> np.ndarray:
        """Return int64[...], ``layer * num_experts + expert`` of every use, in order."""
        per_access = np.diff(self.offsets)
        return np.repeat(self.layers.astype(np.int64), per_access) * num_experts + self.experts

    def check_fits(self, num_layers: int, num_experts: int) -> None:
        """Raise InputError if a layer or expert lies outside a model of this shape."""
        top_layer, top_expert = int(self.layers.max()), int(self.experts.max(initial=-1))
        if top_layer >= num_layers or top_expert >= num_experts:
            raise InputError(
                f"access stream: it names layer {top_layer} and expert {top_expert}, but there are "
                f"{num_layers} layers x {num_experts} experts")


@dataclass(frozen=True)
class PolicyContext:
    """What policies may be built from.

    Attributes:
        num_layers, num_experts: the MoE layers, and the experts of each.
        popularity: float64[layer, expert] from a training part of the trace, or None (level I0).
        future: the accesses that will be run, or None (level I4).
        request_starts: bool[access], whether a new request begins with it, or None (level I1).
        scores: what the routers gave at each access, or None (level I2). Both in the order of the run's accesses; a
            policy reads the entry of the access in progress.

    Raises:
        InputError: sizes below one, a popularity of another shape, request starts that are no list of booleans, scores of
            another number of experts, or a future outside the model.
    """

    num_layers: int
    num_experts: int
    popularity: np.ndarray | None = None
    future: AccessStream | None = None
    request_starts: np.ndarray | None = None
    scores: RouterScores | None = None

    def __post_init__(self) -> None:
        if self.num_layers < 1 or self.num_experts < 1:
            raise InputError(f"cache: needs layers and experts, got {self.num_layers} x {self.num_experts}")
        if self.popularity is not None:
            object.__setattr__(self, "popularity", checked_popularity(
                self.popularity, self.num_layers, self.num_experts))
        if self.future is not None:
            self.future.check_fits(self.num_layers, self.num_experts)
        starts = self.request_starts
        if starts is not None and (starts.ndim != 1 or starts.dtype != np.bool_):
            raise InputError(f"cache: request_starts must be bool[access], got {starts.dtype}{list(starts.shape)}")
        if self.scores is not None and self.scores.mean.shape[1] != self.num_experts:
            raise InputError(f"cache: scores are of {self.scores.mean.shape[1]} experts, not {self.num_experts}")


class EvictionPolicy(Protocol):
    """Whom to evict. `BasePolicy` (moesim.cache.policies) gives every method but `victim`.

    Policies count nothing and know no slots. A resident expert that an access uses must be touched by it.
    """

    information: ClassVar[str]

    def attach(self, slots_per_layer: int, shared: bool) -> None:
        """Learn the capacity; called once, by the cache."""

    def admits(self, key: int, now: int) -> bool:
        """Return whether an absent expert may enter."""

    def prefers(self, key: int, victim: int, now: int) -> bool:
        """Return whether `key` should replace `victim`; False leaves `key` outside."""

    def touch(self, key: int, now: int) -> None:
        """Note that access `now` uses `key` (resident, about to be, or passing through)."""

    def insert(self, key: int, now: int) -> None:
        """Note that `key` became resident during access `now` (on demand or prefetched)."""

    def evict(self, key: int) -> None:
        """Note that `key` left."""

    def victim(self, candidates: Sequence[int], now: int) -> int:
        """Return one of `candidates` (not empty; residents of one pool that are not protected)."""


def access_stream(trace: RoutingTrace, steps: Sequence[np.ndarray]) -> AccessStream:
    """Return the accesses of `steps`: for each step, for each layer, its distinct experts in rising order.

    Each step is int64[...], the trace rows that it runs. Padding (-1) is left out.

    Raises:
        InputError: no steps, a step without rows, or a row that the trace does not have.
    """
    if not len(steps):
        raise InputError("access stream: no steps were given")
    parts = [_distinct_experts(trace, rows, index) for index, rows in enumerate(steps)]
    counts = np.concatenate([count for count, _ in parts])
    return AccessStream(
        layers=np.tile(np.arange(trace.num_layers, dtype=np.int32), len(parts)),
        offsets=np.concatenate([[0], np.cumsum(counts)]),
        experts=np.concatenate([experts for _, experts in parts]))


def _distinct_experts(trace: RoutingTrace, rows: np.ndarray, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the number of distinct experts per layer, int64[layer], and their ids, layer after layer."""
    rows = np.asarray(rows)
    if rows.ndim != 1 or not rows.size or not np.issubdtype(rows.dtype, np.integer):
        raise InputError(
            f"access stream: step {index} must be a list of trace rows, got {rows.dtype}{list(rows.shape)}")
    if rows.min() < 0 or rows.max() >= trace.num_tokens:
        raise InputError(
            f"access stream: step {index} names rows {rows.min()} ... {rows.max()}, but the trace has "
            f"{trace.num_tokens}")
    # Padding is -1, so it marks the spare last column, which is dropped.
    used = np.zeros((trace.num_layers, trace.num_experts + 1), dtype=bool)
    used[np.arange(trace.num_layers)[:, None], trace.expert_ids[rows]] = True
    used = used[:, :-1]
    return used.sum(axis=1), np.nonzero(used)[1].astype(np.int16)


def checked_popularity(popularity: np.ndarray, num_layers: int, num_experts: int) -> np.ndarray:
    """Return a read-only float64[layer, expert]; raises InputError unless finite and not negative."""
    array = np.array(popularity, dtype=np.float64)
    if array.shape != (num_layers, num_experts):
        raise InputError(f"cache: popularity must be [{num_layers}, {num_experts}], got {list(array.shape)}")
    if not np.all(np.isfinite(array)) or array.min() < 0:
        raise InputError("cache: popularity must be finite and not negative")
    array.setflags(write=False)
    return array


def _integers(value: np.ndarray, dtype: type, name: str) -> np.ndarray:
    array = np.asarray(value)
    if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
        raise InputError(f"access stream: {name} must be a list of integers, got {array.dtype}{array.shape}")
    if array.size and (array.min() < 0 or array.max() > np.iinfo(dtype).max):
        raise InputError(f"access stream: {name} must lie in 0 ... {np.iinfo(dtype).max}")
    array = array.astype(dtype)
    array.setflags(write=False)
    return array


def _check_rising(stream: AccessStream) -> None:
    falls = np.diff(stream.experts.astype(np.int64)) <= 0
    starts = stream.offsets[1:-1]
    starts = starts[(starts > 0) & (starts < len(stream.experts))]
    falls[starts - 1] = False  # the first expert of an access may be below the last of the one before
    if falls.any():
        position = int(np.flatnonzero(falls)[0]) + 1
        access = int(np.searchsorted(stream.offsets, position, side="right")) - 1
        raise InputError(f"access stream: the experts of access {access} must rise (sorted, none twice)")


PolicyFactory = Callable[[PolicyContext], EvictionPolicy]

POLICIES: Registry[PolicyFactory] = Registry("cache policy", "moesim.policies", {
    "lru": LruPolicy,
    "lfu": LfuPolicy,
    "lfu-resident": LfuResidentPolicy,
    "belady": BeladyPolicy,
    "belady-bypass": BeladyBypassPolicy,
    "static": StaticPolicy,
    "fifo": FifoPolicy,
    "lfu-fifo": LfuFifoPolicy,
    "lfuda": LfudaPolicy,
    "arc": ArcPolicy,
    "lirs": LirsPolicy,
    "s3-fifo": S3FifoPolicy,
    "sieve": SievePolicy,
    "lhu": LhuPolicy,
    "fld": FldPolicy,
    "hobbit": HobbitPolicy,
    "edgemoe": EdgeMoePolicy,
    "edgemoe-printed": EdgeMoePrintedPolicy,
    "mrs": MrsPolicy,
    "mrs-repository": MrsRepositoryPolicy,
    "moe-infinity": MoeInfinityPolicy,
    "sch-4": SegmentCache4Policy,
    "sch-16": SegmentCachePolicy,
    "sch-64": SegmentCache64Policy,
})


def make_policy(name: str, context: PolicyContext) -> EvictionPolicy:
    """Return a new policy, built from no more of `context` than its information level allows.

    Raises:
        InputError: an unknown name, no declared level, or a context that lacks what the policy needs.
    """
    factory = POLICIES[name]
    level = information_level(factory, f"cache policy {name!r}")
    return factory(dataclasses.replace(
        context, future=context.future if level == "I4" else None,
        scores=context.scores if level >= "I2" else None,
        request_starts=context.request_starts if level >= "I1" else None))


def information_level(factory: object, what: str) -> str:
    """Return the level that a plug-in declares; raises InputError if it declares none."""
    level = getattr(factory, "information", None)
    if level not in INFORMATION_LEVELS:
        levels = ", ".join(INFORMATION_LEVELS)
        raise InputError(f"{what} must declare `information` as one of {levels}, got {level!r}")
    return level
