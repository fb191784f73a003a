"""Costs of many works at once, bit for bit those of `CostModel`: the same operations in the same order.

Where a measured table applies, it is asked once per distinct size and the answers are spread. Nothing here counts
sources: hand `Costs.source` to `CostModel.count` for the costs that are used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moesim.errors import InputError
from moesim.hardware.cost import GROUPED_AXES, CostModel
from moesim.hardware.spec import Fabric, HardwareSpec
from moesim.hardware.tables import TableFit
from moesim.hardware.work import SOURCES, Cost, DenseWork, GroupedWork
from moesim.units import NS_PER_S

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
SCOPES = ("node", "cluster")
NAMEPLATE = SOURCES.index("nameplate")
_MAX_NS = float(2**63)


class Costs(NamedTuple):
    """Many costs: seconds float64[...], and source int8[...], codes into `SOURCES`."""

    seconds: Floats
    source: npt.NDArray[np.int8]


class Wires(NamedTuple):
    """What the busiest wires of many all-to-alls carry, in bytes over the efficiency: float64[..., scope].

    `SCOPES` is the order of the last axis. `egress`: the most that a port sends, `ingress`: that a port receives,
    `pair`: that passes between an ordered pair of ports; `moved`: all that uses the scope.
    """

    egress: Floats
    ingress: Floats
    pair: Floats
    moved: Floats


def ns_from_seconds(seconds: Floats) -> Ints:
    """Return whole nanoseconds int64[...], rounded half to even as `units.ns_from_s`.

    Raises:
        ValueError: a duration that is negative, not finite, or beyond 64 bits.
    """
    rounded = np.rint(seconds * NS_PER_S)
    if rounded.size and not (rounded.min() >= 0.0 and rounded.max() < _MAX_NS):
        raise ValueError(f"durations must be finite and not negative, got {np.min(seconds)} ... {np.max(seconds)} s")
    return rounded.astype(np.int64)


def task_durations(costs: Costs, overhead_s: float, is_task: npt.NDArray[np.bool_]) -> Ints:
    """Return int64[...] ns of the tasks among `costs`, at least 1 ns each, and 0 where there is none.

    Raises:
        ValueError: as `ns_from_seconds`.
    """
    from moesim.hardware.kernels.grouped import task_ns

    seconds = np.require(costs.seconds.ravel(), np.float64, ["C", "W"])
    ns = np.empty(seconds.shape, np.int64)
    refused = task_ns(seconds, float(overhead_s), np.require(is_task.ravel(), np.bool_, ["C", "W"]), ns)
    if refused >= 0:
        ns_from_seconds(seconds[refused:refused + 1] + overhead_s)
    return ns.reshape(costs.seconds.shape)


def dense_costs(cost: CostModel, device_name: str, work: DenseWork) -> Costs:
    """Return what `cost.dense` gives for each of many operations on one device.

    Args:
        cost: the scalar model; its counts are not touched.
        device_name: where all of them run.
        work: a `DenseWork` whose `tokens`, `flops`, `num_bytes` and `context` are arrays (or numbers) that
            broadcast to one shape.

    Raises:
        InputError: as `CostModel.dense`.
    """
    device = cost.hardware.device(device_name)
    tokens, flops, num_bytes, context = np.broadcast_arrays(work.tokens, work.flops, work.num_bytes, work.context)
    costs, left = _nothing(tokens)
    fit = cost.fit(work.op, device.kind, work.shape, work.dtype)
    if fit and fit.table.axes == ("tokens", "context"):
        left = _look_up(costs, left, fit, (tokens, context))
    elif fit and fit.table.axes == ("tokens",):
        left = _look_up(costs, left, fit, (tokens,), context == 0)
    if not left.any():
        return costs
    fine = np.isfinite(flops) & np.isfinite(num_bytes) & (flops >= 0) & (num_bytes >= 0)
    refused = np.argwhere(left & ~fine)
    if work.dtype not in device.flops_per_s or len(refused):
        place = tuple(refused[0] if len(refused) else np.argwhere(left)[0])
        numbers = [size[place].item() for size in (tokens, flops, num_bytes, context)]
        cost.uncounted().dense(device_name, DenseWork(
            work.op, work.shape, numbers[0], numbers[1], numbers[2], work.dtype, numbers[3]))
    memory = cost.hardware.memories[device.memory]
    busy = np.maximum(flops / device.flops_per_s[work.dtype], num_bytes / memory.bytes_per_s)
    np.copyto(costs.seconds, device.kernel_overhead_s + busy, where=left)
    return costs


def grouped_costs(cost: CostModel, device_name: str, work: GroupedWork) -> Costs:
    """Return what `cost.grouped_ffn` gives for each of many works on one device.

    Args:
        cost: the scalar model; its counts are not touched.
        device_name: where all of them run.
        work: a `GroupedWork` whose `tokens`, `groups` and `largest_group` are int arrays of one shape.

    Raises:
        InputError: as `CostModel.grouped_ffn`.
    """
    device = cost.hardware.device(device_name)
    sizes = tuple(np.asarray(size, np.int64) for size in (work.tokens, work.groups, work.largest_group))
    costs, left = _roofline_of_groups(cost, device_name, work, sizes)
    fit = cost.fit("grouped_ffn", device.kind, work.shape, work.dtype)
    if fit and fit.table.axes == GROUPED_AXES:
        left = _look_up(costs, left, fit, sizes)
    elif fit and fit.table.axes == ("tokens",):
        left = _look_up(costs, left, fit, sizes[:1], sizes[1] == 1)
    if work.dtype not in device.flops_per_s and left.any():
        place = tuple(np.argwhere(left)[0])
        _ask_group(cost, device_name, work, [int(size[place]) for size in sizes])
    return costs


def copy_costs(cost: CostModel, link_name: str, num_bytes: Floats) -> Costs:
    """Return what `cost.copy` gives for each of float64[...] sizes on one link; it is asked once per distinct size.

    Raises:
        InputError: as `CostModel.copy`.
    """
    twin = cost.uncounted()
    return _spread(lambda size: twin.copy(link_name, size[0]), (np.asarray(num_bytes, np.float64),))


def all_to_all_costs(cost: CostModel, traffic: Floats) -> Costs:
    """Return what `cost.all_to_all` gives for each of float64[n, rank, rank] bytes from row to column.

    Raises:
        InputError: as `CostModel.all_to_all`.
    """
    size = cost.hardware.num_ranks
    traffic = np.asarray(traffic, np.float64)
    if traffic.shape[1:] != (size, size):
        raise InputError(f"traffic must be float64[n, {size}, {size}] (rank, rank), got shape {traffic.shape}")
    if not np.isfinite(traffic).all() or (traffic < 0).any():
        raise InputError("traffic must be finite and not negative, in bytes")
    return wire_costs(cost, wires_of(cost.hardware, traffic / cost.route_efficiency))


def wires_of(hardware: HardwareSpec, traffic: Floats) -> Wires:
    """Return the busiest wires of float64[n, rank, rank] bytes, summed in the order of `hardware.collective`."""
    node = np.arange(hardware.num_ranks) // hardware.ranks_per_node
    same = node[:, None] == node[None, :]
    found = np.zeros((4, len(traffic), len(SCOPES)))
    for place, mask in enumerate((same & ~np.eye(len(node), dtype=bool), ~same)):
        part = np.where(mask, traffic, 0.0)
        fabric = hardware.fabric(SCOPES[place])
        between = part if fabric is None else _between(part, ports(hardware, fabric))
        found[0, :, place] = between.sum(axis=2).max(axis=1, initial=0.0)
        found[1, :, place] = between.sum(axis=1).max(axis=1, initial=0.0)
        found[2, :, place] = between.max(axis=(1, 2), initial=0.0)
        found[3, :, place] = part.reshape(len(part), -1).sum(axis=1)
    return Wires(*found)


def wire_costs(cost: CostModel, wires: Wires) -> Costs:
    """Return the all-to-alls whose busiest wires are known, as `CostModel.all_to_all` costs them.

    Raises:
        InputError: traffic where no fabric is.
    """
    seconds = np.zeros(wires.moved.shape[:-1])
    for place, scope in enumerate(SCOPES):
        used = wires.moved[..., place] > 0
        if not used.any():
            continue
        fabric = cost.hardware.fabric(scope)
        if fabric is None:
            moved = wires.moved[..., place][used][0]
            raise InputError(f"hardware {cost.hardware.name!r}: {moved:.0f} bytes need a {scope} fabric, "
                             "and it has none")
        egress, ingress = wires.egress[..., place], wires.ingress[..., place]
        busiest = {"port": np.maximum(egress, ingress), "egress": egress, "pair": wires.pair[..., place]}
        taken = fabric.latency_s + busiest[fabric.contention] / fabric.bytes_per_s
        seconds = np.where(used, np.maximum(seconds, taken), seconds)
    return Costs(seconds, np.full(seconds.shape, SOURCES.index(cost.route_source), np.int8))


def ports(hardware: HardwareSpec, fabric: Fabric) -> Ints:
    """Return int64[rank], the port of a fabric that each rank uses; those of a node adjoin."""
    node, local = np.divmod(np.arange(hardware.num_ranks), hardware.ranks_per_node)
    per_node = -(-hardware.ranks_per_node // fabric.ranks_per_port)
    return node * per_node + local // fabric.ranks_per_port


def _between(traffic: Floats, port: Ints) -> Floats:
    """Return float64[n, port, port]; ranks of a port are added in their order, senders first."""
    count = int(port[-1]) + 1
    if count == len(port):
        return traffic
    rows = np.zeros((len(traffic), count, len(port)))
    both = np.zeros((len(traffic), count, count))
    for rank, own in enumerate(port.tolist()):
        rows[:, own] += traffic[:, rank]
    for rank, own in enumerate(port.tolist()):
        both[:, :, own] += rows[:, :, rank]
    return both


def _nothing(tokens: npt.NDArray[np.generic]) -> tuple[Costs, npt.NDArray[np.bool_]]:
    """Return costs of nothing, and where there are tokens that still need one."""
    return Costs(np.zeros(tokens.shape), np.full(tokens.shape, NAMEPLATE, np.int8)), tokens != 0


def _roofline_of_groups(cost: CostModel, device_name: str, work: GroupedWork,
                        sizes: tuple[Ints, ...]) -> tuple[Costs, npt.NDArray[np.bool_]]:
    from moesim.hardware.kernels.grouped import GroupedRates, grouped_seconds, impossible

    device, memory = cost.hardware.device(device_name), cost.hardware.memory_of(device_name)
    rates = GroupedRates(device.kernel_overhead_s, float(work.flops_per_token),
                         float(device.flops_per_s.get(work.dtype, np.inf)), float(work.bytes_per_group),
                         float(work.bytes_per_token), float(memory.bytes_per_s), int(device.tile_tokens))
    flat = [np.require(size.ravel(), np.int64, ["C", "W"]) for size in sizes]  # one type for the compiled loop
    seconds = np.empty(flat[0].shape)
    refused = impossible(flat[0], flat[1], flat[2])
    if refused >= 0:
        _ask_group(cost, device_name, work, [int(size[refused]) for size in flat])
    grouped_seconds(flat[0], flat[1], flat[2], rates, seconds)
    return Costs(seconds.reshape(sizes[0].shape), np.full(sizes[0].shape, NAMEPLATE, np.int8)), sizes[0] != 0


def _ask_group(cost: CostModel, device_name: str, work: GroupedWork, numbers: list[int]) -> Cost:
    """Ask the scalar model for one work (it says what is wrong with it)."""
    return cost.uncounted().grouped_ffn(device_name, GroupedWork(
        work.shape, numbers[0], numbers[1], numbers[2], work.bytes_per_group, work.flops_per_token,
        work.bytes_per_token, work.dtype))


def _look_up(costs: Costs, left: npt.NDArray[np.bool_], fit: TableFit, columns: tuple[npt.NDArray[np.generic], ...],
             where: npt.NDArray[np.bool_] | bool = True) -> npt.NDArray[np.bool_]:
    """Fill what is `left` from a table, `where` it applies; return what is left after that."""
    wanted = left & where
    found = _spread(fit.lookup, tuple(column[wanted] for column in columns))
    costs.seconds[wanted], costs.source[wanted] = found
    return left & ~wanted


def _spread(ask: Callable[[tuple[float, ...]], Cost], columns: tuple[npt.NDArray[np.generic], ...]) -> Costs:
    """Ask once per distinct row of `columns` (arrays of one shape) and return the answers in that shape."""
    shape = columns[0].shape
    _, first, which = np.unique(_keys(columns), return_index=True, return_inverse=True)
    flat = [column.ravel()[first].tolist() for column in columns]
    answers = [ask(point) for point in zip(*flat, strict=True)]
    seconds = np.array([answer.seconds for answer in answers], np.float64)
    source = np.array([SOURCES.index(answer.source) for answer in answers], np.int8)
    which = which.reshape(shape)
    return Costs(seconds[which], source[which])


def _keys(columns: tuple[npt.NDArray[np.generic], ...]) -> npt.NDArray[np.generic]:
    """Return one sortable key per row: the numbers' places among their column's distinct values, joined."""
    if len(columns) == 1:
        return columns[0].ravel()
    keys = np.zeros(columns[0].size, np.int64)
    for column in columns:
        values, place = np.unique(column.ravel(), return_inverse=True)
        _, keys = np.unique(keys * max(1, len(values)) + place.reshape(-1), return_inverse=True)
    return keys
