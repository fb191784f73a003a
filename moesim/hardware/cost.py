"""CostModel: seconds for work on a machine, each with its source (measured ... nameplate, stated).

A measured table of the profile is used where it fits exactly (operation, device kind, shape, dtype, axes);
otherwise the nameplate roofline (Williams, Waterman, Patterson, "Roofline", CACM 52(4), 2009). For one
operation on one device the two are never mixed. No skew constant enters: an expert layer costs what its
tokens, its distinct groups and its largest group cost.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from moesim.errors import InputError, did_you_mean
from moesim.hardware.collective import all_to_all_seconds
from moesim.hardware.profile import CalibrationProfile
from moesim.hardware.spec import Device, HardwareSpec, Link
from moesim.hardware.tables import TableFit
from moesim.hardware.work import SOURCES, Cost, DenseWork, GroupedWork

TASK_OVERHEAD = "task_overhead"
GROUPED_AXES = ("tokens", "groups", "largest_group")


class CostModel:
    """Costs on one machine. It counts the sources that it has handed out.

    Args:
        hardware: the machine.
        profile: measured tables of it (None: nameplate only).
        route_efficiency: the share of a link's or fabric's nameplate rate that is reached, in (0, 1]; a
            number that the user states, so costs that use another value than 1 have the source ``stated``.
            It does not touch measured tables.

    Raises:
        InputError: an efficiency out of range.
    """

    def __init__(self, hardware: HardwareSpec, profile: CalibrationProfile | None = None, *,
                 route_efficiency: float = 1.0) -> None:
        if not 0 < route_efficiency <= 1:
            raise InputError(f"route_efficiency must be in (0, 1], got {route_efficiency}")
        self.hardware, self.profile, self.route_efficiency = hardware, profile, route_efficiency
        self._counts: Counter[str] = Counter()
        self._fits: dict[tuple[str, str, str, str], TableFit | None] = {}
        self._routes: dict[tuple[str, str], list[Link]] = {}
        self.route_source = "nameplate" if route_efficiency == 1 else "stated"

    def source_counts(self) -> dict[str, int]:
        """Return how many costs of each source were handed out, in the order of `SOURCES`."""
        return {source: self._counts[source] for source in SOURCES}

    def uncounted(self) -> CostModel:
        """Return the same costs and tables with counts of their own, for questions that nobody should count."""
        twin = copy.copy(self)
        twin._counts = Counter()
        return twin

    def count(self, sources: npt.NDArray[np.integer], times: int = 1) -> None:
        """Count costs that `hardware.cost_arrays` priced: codes int[...] into `SOURCES`, each `times` over."""
        for code, found in enumerate(np.bincount(np.ravel(sources), minlength=len(SOURCES)).tolist()):
            self._counts[SOURCES[code]] += found * times

    def fit(self, op: str, device_kind: str, shape: str, dtype: str) -> TableFit | None:
        """Return the measured table of an operation on a kind of device, ready for look-ups; None without one."""
        key = (op, device_kind, shape, dtype)
        if key not in self._fits:
            tables = self.profile.tables if self.profile else ()
            # bytes have no shape or dtype: any table of a copy will do
            table = next((t for t in tables if (t.op, t.device) == key[:2]
                          and (t.op == "copy" or (t.shape, t.dtype) == key[2:])), None)
            self._fits[key] = TableFit(table) if table else None
        return self._fits[key]

    def dense(self, device_name: str, work: DenseWork) -> Cost:
        """Return the seconds of one dense operation; no tokens cost nothing.

        Table (`op`, device kind, `shape`, `dtype`) over (tokens) or (tokens, context); a table over tokens
        alone is not used for work with a context. Else
        ``kernel_overhead_s + max(flops / peak, num_bytes / memory rate)``.

        Raises:
            InputError: no such device, or a dtype that it has no peak for.
        """
        device = self.hardware.device(device_name)
        if work.tokens == 0:
            return self._count(Cost(0.0, "nameplate"))
        points: dict[tuple[str, ...], tuple[int, ...]] = {("tokens", "context"): (work.tokens, work.context)}
        if work.context == 0:
            points["tokens",] = (work.tokens,)
        cost = self._measured((work.op, device.kind, work.shape, work.dtype), points)
        return self._count(cost or self._roofline(device, work.flops, work.num_bytes, work.dtype))

    def grouped_ffn(self, device_name: str, work: GroupedWork) -> Cost:
        """Return the seconds of a feed-forward over groups of rows (an expert layer); no tokens cost nothing.

        Table ``grouped_ffn`` over (tokens, groups, largest_group), or over (tokens) when there is one group.
        Else the roofline: each group's weights are read once and each row's activations, or the flops of the
        rows padded to whole tiles (`padded_rows`), whichever takes longer. So at few tokens what counts is
        how many distinct groups are hit (skewed routing is faster), at many tokens the rows; it never falls
        as `tokens`, `groups` or `largest_group` grows.

        Raises:
            InputError: no such device or dtype; groups that cannot hold that many tokens.
        """
        device = self.hardware.device(device_name)
        if work.tokens == 0:
            return self._count(Cost(0.0, "nameplate"))
        _check_groups(work)
        points: dict[tuple[str, ...], tuple[int, ...]] = {
            GROUPED_AXES: (work.tokens, work.groups, work.largest_group)}
        if work.groups == 1:
            points["tokens",] = (work.tokens,)
        cost = self._measured(("grouped_ffn", device.kind, work.shape, work.dtype), points)
        if cost is None:
            rows = padded_rows(work.tokens, work.groups, work.largest_group, device.tile_tokens)
            num_bytes = work.groups * work.bytes_per_group + work.tokens * work.bytes_per_token
            cost = self._roofline(device, rows * work.flops_per_token, num_bytes, work.dtype)
        return self._count(cost)

    def copy(self, link_name: str, num_bytes: float) -> Cost:
        """Return the seconds of a copy over one link, nothing else on it; no bytes cost nothing.

        Table ``copy`` over (bytes) with `device` the link's kind (``pcie``) or its ends' own names
        (``dram_to_hbm``), any shape and dtype. Else `Link.seconds`: ``latency_s + bytes / bytes_per_s``, or slower for small requests.

        Raises:
            InputError: no such link, or a size that is negative or not finite.
        """
        links = self.hardware.links
        if link_name not in links:
            hint = did_you_mean(link_name, links)
            raise InputError(f"hardware {self.hardware.name!r}: no link {link_name!r}.{hint}")
        link = links[link_name]
        return self._count(self._copy(link, _ends(link.source, link.target), num_bytes))

    def route_copy(self, source_memory: str, target_memory: str, num_bytes: float) -> Cost:
        """Return the seconds of a copy between two memories; the same memory costs nothing.

        A table of the whole route (``flash_to_hbm``) goes first. Over several links (flash to DRAM to HBM)
        the copy is taken as cut into pieces that follow one another: the slowest link's time, plus the
        nameplate latencies of the others; the source is the least certain one of these.

        Raises:
            InputError: no such memory, no route, or a size that is negative or not finite.
        """
        key = (source_memory, target_memory)
        if key not in self._routes:
            self._routes[key] = self.hardware.route(*key)
        route = self._routes[key]
        _check_bytes(num_bytes)
        if not route or num_bytes == 0:
            return self._count(Cost(0.0, "nameplate"))
        cost = self._measured_copy((_ends(*key),), num_bytes)
        return self._count(cost or self._pipelined(route, source_memory, num_bytes))

    def task_overhead(self, kind: str) -> Cost:
        """Return the fixed seconds that a task of this kind costs beside its work; 0 without a measured one.

        Table ``task_overhead`` with `shape` the task kind, or an empty shape for all kinds; its first row.
        A zero for want of a table is not counted among the sources.
        """
        tables = self.profile.tables if self.profile else ()
        for shape in (kind, ""):
            for table in tables:
                if (table.op, table.shape) == (TASK_OVERHEAD, shape):
                    return self._count(Cost(table.seconds[0], "measured"))
        return Cost(0.0, "nameplate")

    def all_to_all(self, traffic: npt.NDArray[np.float64]) -> Cost:
        """Return the seconds of an all-to-all by `collective.all_to_all_seconds`, rates times the efficiency.

        Args:
            traffic: float64[rank, rank], bytes from row to column; the diagonal stays local.

        Raises:
            InputError: as there.
        """
        # bytes over (rate times efficiency) is (bytes over efficiency) over rate; latencies stay as they are
        slowed = np.asarray(traffic, dtype=np.float64) / self.route_efficiency
        return self._count(Cost(all_to_all_seconds(self.hardware, slowed).seconds, self.route_source))

    def _roofline(self, device: Device, flops: float, num_bytes: float, dtype: str) -> Cost:
        if dtype not in device.flops_per_s:
            options = ", ".join(sorted(device.flops_per_s))
            raise InputError(f"hardware {self.hardware.name!r}: device {device.name!r} has no flops_per_s "
                             f"for dtype {dtype!r}; it has {options}")
        if not (0 <= flops < math.inf and 0 <= num_bytes < math.inf):
            raise InputError(f"work must be finite and not negative, got {flops} flops and {num_bytes} bytes")
        memory = self.hardware.memories[device.memory]
        busy = max(flops / device.flops_per_s[dtype], num_bytes / memory.bytes_per_s)
        return Cost(device.kernel_overhead_s + busy, "nameplate")

    def _copy(self, link: Link, ends: str, num_bytes: float) -> Cost:
        _check_bytes(num_bytes)
        if num_bytes == 0:
            return Cost(0.0, "nameplate")
        nameplate = link.seconds(num_bytes, self.route_efficiency)
        return self._measured_copy((link.kind, ends), num_bytes) or Cost(nameplate, self.route_source)

    def _pipelined(self, route: list[Link], source: str, num_bytes: float) -> Cost:
        """Return the slowest link's time and the other links' latencies; see `route_copy`."""
        costs = []
        for link in route:
            target = link.target if link.source == source else link.source
            costs.append(self._copy(link, _ends(source, target), num_bytes))
            source = target
        slowest = max(range(len(route)), key=lambda index: costs[index].seconds)
        others = sum(link.latency_s for index, link in enumerate(route) if index != slowest)
        sources = [cost.source for cost in costs] + (["nameplate"] if others else [])
        return Cost(costs[slowest].seconds + others, max(sources, key=SOURCES.index))

    def _measured_copy(self, devices: tuple[str, ...], num_bytes: float) -> Cost | None:
        found = (self._measured(("copy", device, "", ""), {("bytes",): (num_bytes,)}) for device in devices)
        return next((cost for cost in found if cost), None)

    def _measured(self, key: tuple[str, str, str, str],
                  points: Mapping[tuple[str, ...], tuple[float, ...]]) -> Cost | None:
        """Return the cost by the table of this (op, device, shape, dtype), if its axes are in `points`."""
        fit = self.fit(*key)
        return fit.lookup(points[fit.table.axes]) if fit and fit.table.axes in points else None

    def _count(self, cost: Cost) -> Cost:
        self._counts[cost.source] += 1
        return cost


def padded_rows(tokens: int, groups: int, largest_group: int, tile_tokens: int) -> float:
    """Return the rows that a grouped matrix kernel computes when it pads each group to whole tiles.

    One group is known exactly: its tiles. With more, only the largest and the mean of the others are known,
    and a group of n rows is expected to take ``max(tile, n + (tile - 1) / 2)`` rows: n rounded up with every
    remainder equally likely, at least one tile. (Rounding the mean itself up would let the result fall when
    tokens move to the largest group.) With tiles of one row it is `tokens` exactly.
    """
    if groups == 1:
        return float(math.ceil(tokens / tile_tokens) * tile_tokens)
    others, padding = groups - 1, (tile_tokens - 1) / 2
    largest = max(float(tile_tokens), largest_group + padding)
    return largest + max(float(others * tile_tokens), tokens - largest_group + others * padding)


def _check_groups(work: GroupedWork) -> None:
    tokens, groups, largest = work.tokens, work.groups, work.largest_group
    if not (1 <= groups <= tokens and tokens <= groups * largest and largest <= tokens - groups + 1):
        raise InputError(f"grouped work {work.shape!r}: {tokens} tokens cannot be in {groups} groups, "
                         f"none empty, of which the largest has {largest}")


def _check_bytes(num_bytes: float) -> None:
    if not 0 <= num_bytes < math.inf:
        raise InputError(f"a copy needs a finite size that is not negative, got {num_bytes} bytes")


def _ends(source: str, target: str) -> str:
    """Return e.g. ``dram_to_hbm`` for two full memory names."""
    return f"{source.rpartition('.')[2]}_to_{target.rpartition('.')[2]}"
