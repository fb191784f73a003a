"""What kernel and traffic of one layer cost at least in each step, as constants or linear in who shares a rank."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from moesim.placement.problem import PlacementProblem
from moesim.units import NS_PER_S

MEAN, BYTES, ROWS, TILES = range(4)  # kernel forms
AVERAGE, PORT, SHARED = range(1, 4)  # traffic forms (and MEAN)
_WITNESSES = 8


class StepForms:
    """Forms of one layer.

    Kernel, for a chosen expert e with its rank's other experts f (U[e, f] = 1): ``BYTES``: the weights and rows of e
    and f over the memory rate; ``ROWS``: their rows over the peak; ``TILES``: at least a tile of rows each. ``MEAN``: a
    constant: the mean rank, the rank with most distinct experts, the hottest expert alone.

    Traffic, on the slowest level that tokens must cross (zones: nodes, or ranks where there is one node), both ways:
    ``AVERAGE``: the mean port receives ``(uses - uses at home - pairs of a token that share a rank) / ports``;
    ``PORT``: the port of e's rank receives the tokens of e and, of each f, those without e less half of what
    it can overlap with others there; ``SHARED``: the same with each such token shared by at most min(c - 1, k) experts.
    Tokens of the best home zone are left out of both. ``MEAN``: the level's latency where something must cross.
    """

    def __init__(self, problem: PlacementProblem, layer: int) -> None:
        steps, cost = problem.steps, problem.step_cost
        assert steps is not None
        assert cost is not None
        self.problem, self.steps, self.cost = problem, steps, cost
        self.per_rank, self.num_ranks = problem.slots_per_rank, problem.num_ranks
        level = 1 if problem.num_nodes > 1 else 0
        self.level = cost.levels[level]
        self.per_zone = problem.ranks_per_node if level else 1
        self.num_zones = problem.num_ranks // self.per_zone
        self.num_ports = int(self.level.port[-1]) + 1 if self.level is not None else 1
        self.used = _used(steps.expert_ids[:, layer], problem.num_experts)
        self.rows = self._rows(steps.expert_ids[:, layer])
        self.zone = steps.home_rank // self.per_zone
        self.cuts = steps.starts
        self._crosses: dict[int, bool] = {}

    def _rows(self, ids: np.ndarray) -> np.ndarray:
        """Return int64[step, expert], uses."""
        token, column = np.nonzero(ids >= 0)
        keys = self.steps.step[token] * self.problem.num_experts + ids[token, column]
        shape = (self.steps.num_steps, self.problem.num_experts)
        return np.bincount(keys, minlength=shape[0] * shape[1]).reshape(shape)

    def of_step(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Return float32[token, expert] use and int[token] home zones of a step."""
        part = slice(self.cuts[step], self.cuts[step + 1])
        return self.used[part], self.zone[part]

    # ---- constants

    def kernel_floor(self, step: int) -> float:
        """Return the least kernel of the slowest rank of a step, ns."""
        rows = self.rows[step]
        if not rows.any():
            return 0.0
        mean, distinct = rows.sum() / self.num_ranks, np.count_nonzero(rows)
        groups, hottest = -(-distinct // self.num_ranks), self._hottest(int(rows.max()))
        if not self.cost.exact:
            return self._measured_floor(int(-(-rows.sum() // self.num_ranks)), int(groups))
        one = self.cost.kernel
        num_bytes = max(distinct / self.num_ranks * one.bytes_per_group + mean * one.bytes_per_row,
                        groups * (one.bytes_per_group + one.bytes_per_row),
                        one.bytes_per_group + hottest * one.bytes_per_row)
        work = max(mean, float(groups * one.tile_rows), float(hottest))
        busy = max(num_bytes / one.bytes_per_s, work * one.flops_per_row / one.flops_per_s)
        return (one.overhead_s + one.task_overhead_s + busy) * NS_PER_S - 0.5

    def _hottest(self, rows: int) -> int:
        """Return the rows of the hottest expert on one rank: a share of them if it has all copies there can be."""
        return -(-rows // min(self.num_ranks, 1 + self.problem.num_slots - self.problem.num_experts))

    def _measured_floor(self, rows: int, groups: int) -> float:
        """Measured kernels rise with every size: the cheaper of all ways to hold so many rows."""
        most = min(rows, self.per_rank)
        by_rows = min(self.cost.kernel_ns(rows, many, -(-rows // many)) for many in range(1, most + 1))
        return float(max(by_rows, self.cost.kernel_ns(groups, groups, 1)))

    def must_cross(self, step: int) -> bool:
        """Return whether some token has to leave its zone: a zone wants more experts than it can hold."""
        if step not in self._crosses:
            self._crosses[step] = self._must_cross(step)
        return self._crosses[step]

    def _must_cross(self, step: int) -> bool:
        used, zone = self.of_step(step)
        if self.level is None:
            return False
        wanted = np.zeros((self.num_zones, self.problem.num_experts), bool)
        for one in np.unique(zone).tolist():
            wanted[one] = used[zone == one].any(axis=0)
        if wanted.sum(axis=1).max() > self.per_zone * self.per_rank:
            return True
        single = self.problem.num_slots == self.problem.num_experts
        return single and bool(wanted.sum(axis=0).max() > 1)

    def traffic_floor(self, step: int) -> float:
        """Return the least dispatch and combine of a step without any copies counted, ns."""
        if self.level is None or not self.must_cross(step):
            return 0.0
        seconds = 2 * self.level.latency_s + self.cost.dispatch_overhead_s + self.cost.combine_overhead_s
        return seconds * NS_PER_S - 1.0

    def token_ns(self) -> float:
        """Return ns that one more token on the busiest wire takes, both ways together."""
        if self.level is None:
            return 0.0
        width = (self.cost.dispatch_token_bytes + self.cost.combine_token_bytes) / self.cost.efficiency
        return width / self.level.bytes_per_s * NS_PER_S

    def floor_ns(self) -> float:
        """Return the constants of all steps together, ns; with replicas also what no zone can hold."""
        steps = range(self.steps.num_steps)
        return sum(self.kernel_floor(step) + self.traffic_floor(step) for step in steps) + self._outside_ns()

    def _outside_ns(self) -> float:
        """Copies that must leave their zones over all steps: uses beyond the best experts that a zone can hold."""
        if self.level is None:
            return 0.0
        kept, room = 0.0, self.per_zone * self.per_rank
        for one in range(self.num_zones):
            uses = self.used[self.zone == one].sum(axis=0, dtype=np.float64)
            kept += float(np.sort(uses)[::-1][:room].sum())
        outside = float(self.used.sum(dtype=np.float64)) - kept
        at_once = min(self.per_rank, self.steps.expert_ids.shape[2])
        return outside / at_once / self._wires() * self.token_ns()

    def _wires(self) -> int:
        assert self.level is not None
        return self.num_ports**2 if self.level.contention == "pair" else self.num_ports

    # ---- linear forms

    def kernel_row(self, step: int, form: int, expert: int) -> tuple[float, np.ndarray]:
        """Return the constant (ns) and float64[expert], what each f on the rank of `expert` adds."""
        rows, one = self.rows[step], self.cost.kernel
        fixed = (one.overhead_s + one.task_overhead_s) * NS_PER_S - 0.5
        if form == BYTES:
            add = ((rows > 0) * one.bytes_per_group + rows * one.bytes_per_row) / one.bytes_per_s * NS_PER_S
            return fixed + add[expert], add
        scale = one.flops_per_row / one.flops_per_s * NS_PER_S
        if form == ROWS:
            return fixed + rows[expert] * scale, rows * scale
        return fixed + max(rows[expert], one.tile_rows) * scale, (rows > 0) * one.tile_rows * scale

    def traffic_row(self, step: int, form: int, expert: int) -> tuple[float, np.ndarray]:
        """Return the constant (ns) and float64[expert] of ``PORT`` or ``SHARED``."""
        used, zone = self.of_step(step)
        own = used[:, expert] > 0
        hits = np.zeros((self.num_zones, self.problem.num_experts))
        np.add.at(hits, zone[~own], used[~own])
        away = hits.sum(axis=0) - hits.max(axis=0)
        mine = np.bincount(zone[own], minlength=self.num_zones)
        base = float(mine.sum() - mine.max())
        if form == SHARED:
            add = away / max(1, min(self.per_rank - 1, used.sum(axis=1).max()))
        else:
            rest = used[~own]
            both = rest.T @ rest
            np.fill_diagonal(both, 0.0)
            both[expert] = both[:, expert] = 0.0
            add = away - 0.5 * -np.sort(-both, axis=1)[:, : max(0, self.per_rank - 2)].sum(axis=1)
        add[expert] = 0.0
        return self.traffic_floor(step) + base * self.token_ns(), add * self.token_ns()

    def least(self, constant: float, add: np.ndarray, expert: int) -> float:
        """Return the form's value with the cheapest experts on the rank."""
        others = np.sort(np.delete(add, expert))
        return constant + float(others[: self.per_rank - 1].sum())

    def best_kernels(self) -> tuple[np.ndarray, np.ndarray]:
        """Return int64[step] forms and experts with the largest least value."""
        form, chosen = np.zeros(self.steps.num_steps, np.int64), np.zeros(self.steps.num_steps, np.int64)
        for step, rows in enumerate(self.rows):
            best = self.kernel_floor(step)
            for expert in np.argsort(-rows, kind="stable")[:_WITNESSES].tolist():
                if not rows[expert]:
                    continue
                for kind in (BYTES, ROWS, TILES):
                    value = self.least(*self.kernel_row(step, kind, expert), expert)
                    if value > best + 1.0:
                        best, form[step], chosen[step] = value, kind, expert
        return form, chosen

    def traffic_choices(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield int64[step] forms and experts: the average port in all steps; the best port of each step."""
        count = self.steps.num_steps
        if self.level is None:
            yield np.zeros(count, np.int64), np.zeros(count, np.int64)
            return
        yield np.full(count, AVERAGE), np.zeros(count, np.int64)
        if self.level.contention != "port":
            return
        form, chosen = np.zeros(count, np.int64), np.zeros(count, np.int64)
        for step, rows in enumerate(self.rows):
            best = self.traffic_floor(step)
            for expert in np.argsort(-rows, kind="stable")[:_WITNESSES // 2].tolist():
                for kind in (PORT, SHARED):
                    value = self.least(*self.traffic_row(step, kind, expert), expert)
                    if value > best:
                        best, form[step], chosen[step] = value, kind, expert
        yield form, chosen

    def assemble(self, kernel_form: np.ndarray, kernel_expert: np.ndarray, traffic_form: np.ndarray,
                 traffic_expert: np.ndarray) -> tuple[float, np.ndarray]:
        """Return the layer's constant (ns) and symmetric float64[E, E] M: all steps cost ``constant + <M, U>``."""
        size = self.problem.num_experts
        constant, matrix = 0.0, np.zeros((size, size))
        for step in range(self.steps.num_steps):
            parts = [(self.kernel_row, kernel_form[step], kernel_expert[step], self.kernel_floor)]
            if traffic_form[step] != AVERAGE:
                parts.append((self.traffic_row, traffic_form[step], traffic_expert[step], self.traffic_floor))
            else:
                constant += self.traffic_floor(step)
            for row, form, expert, floor in parts:
                if form == MEAN:
                    constant += floor(step)
                    continue
                base, add = row(step, int(form), int(expert))
                constant += base
                matrix[int(expert)] += add
        averaged, spread = self._average(np.flatnonzero(traffic_form == AVERAGE))
        matrix = matrix + spread
        np.fill_diagonal(matrix, 0.0)
        return constant + averaged, (matrix + matrix.T) / 2

    def _average(self, steps: np.ndarray) -> tuple[float, np.ndarray]:
        """Return constant and matrix of ``AVERAGE`` over some steps together: one zone per expert for all of them."""
        size = self.problem.num_experts
        if not len(steps):
            return 0.0, np.zeros((size, size))
        mask = np.isin(self.steps.step, steps)
        used, zone = self.used[mask], self.zone[mask]
        at_home = np.zeros((self.num_zones, size))
        np.add.at(at_home, zone, used)
        both = (used.T @ used).astype(np.float64)
        np.fill_diagonal(both, 0.0)
        scale = self.token_ns() / self._wires()
        uses = float(at_home.sum() - at_home.max(axis=0).sum())
        return uses * scale, -0.5 * both * scale


def _used(ids: np.ndarray, num_experts: int) -> np.ndarray:
    """Return float32[token, expert], 1 where the token uses the expert."""
    used = np.zeros((len(ids), num_experts + 1), np.float32)
    np.put_along_axis(used, ids.astype(np.int64), 1.0, axis=1)  # pads fall on the last column
    return used[:, :num_experts]
