"""Re-check step-time bounds: own counting of every form, eigenvalues by scipy, rounded to the safe side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moesim.errors import CheckError
from moesim.placement.certificate import Certificate
from moesim.placement.problem import PlacementProblem
from moesim.placement.verify.colocation import most_together

_NS = float(10**9)  # this file converts by itself, as it shares nothing with what it checks
_KERNEL_FORMS, _TRAFFIC_FORMS = 4, 4


@dataclass(frozen=True)
class _Step:
    """One step of one layer: tokens as (home zone, set of experts), and uses of each expert."""

    tokens: list[tuple[int, frozenset[int]]]
    rows: np.ndarray


def check_colocation(problem: PlacementProblem, certificate: Certificate) -> float:
    """Return a lower bound on the mean step time, ns, that follows from the certificate's choices and multipliers.

    ``kernel_form`` (0 mean, 1 bytes, 2 rows, 3 tiles) and ``traffic_form`` (0 latency, 1 average port, 2 an expert's
    port less overlaps, 3 the same shared) of int[step, layer] with their experts, ``pairs`` and ``diagonal``; no arrays
    with replicas or measured kernels. See `bounds.step_time.prove_step_time` for the argument.
    """
    if problem.steps is None or problem.step_cost is None:
        raise CheckError("certificate: the problem has no steps or no step costs")
    single = problem.num_slots == problem.num_experts and problem.step_cost.exact
    shape, size = (problem.steps.num_steps, problem.num_layers), problem.num_experts
    choice = {}
    if single:
        for name, limit in (("kernel_form", _KERNEL_FORMS), ("kernel_expert", size),
                            ("traffic_form", _TRAFFIC_FORMS), ("traffic_expert", size)):
            choice[name] = _whole(certificate, name, shape, limit)
        pairs = _array(certificate, "pairs", (problem.num_layers, size, size))
        diagonal = _array(certificate, "diagonal", (problem.num_layers, size))
    total = 0.0
    for layer in range(problem.num_layers):
        one = _Layer(problem, layer)
        found = one.floor()
        if single:
            constant, matrix = one.assemble({name: array[:, layer] for name, array in choice.items()})
            found = max(found, constant - most_together(-matrix, pairs[layer], diagonal[layer], problem))
        total += found
    return total / problem.steps.num_steps * (1 - 2.0**-40)


def _array(certificate: Certificate, name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name not in certificate.arrays:
        raise CheckError(f"certificate: array {name!r} is missing")
    array = np.asarray(certificate.arrays[name], np.float64)
    if array.shape != shape or not np.all(np.isfinite(array)):
        raise CheckError(f"certificate: {name!r} must be {shape} and finite, got shape {array.shape}")
    return array


def _whole(certificate: Certificate, name: str, shape: tuple[int, ...], limit: int) -> np.ndarray:
    array = _array(certificate, name, shape)
    if np.any(array != np.floor(array)) or array.min() < 0 or array.max() >= limit:
        raise CheckError(f"certificate: {name!r} must be whole numbers in 0 ... {limit - 1}")
    return array.astype(np.int64)


class _Layer:
    """One layer, counted from the tokens."""

    def __init__(self, problem: PlacementProblem, layer: int) -> None:
        assert problem.steps is not None
        assert problem.step_cost is not None
        self.problem, self.cost, self.size = problem, problem.step_cost, problem.num_experts
        self.across = problem.num_nodes > 1
        self.level = self.cost.levels[int(self.across)]
        self.width = problem.ranks_per_node if self.across else 1
        self.zones = problem.num_ranks // self.width
        self.steps = [_Step([], np.zeros(self.size, np.int64)) for _ in range(problem.steps.num_steps)]
        homes = (problem.steps.home_rank // self.width).tolist()
        for ids, step, home in zip(problem.steps.expert_ids[:, layer].tolist(), problem.steps.step.tolist(), homes,
                                   strict=True):
            held = [expert for expert in ids if expert >= 0]
            self.steps[step].tokens.append((home, frozenset(held)))
            for expert in held:
                self.steps[step].rows[expert] += 1
        self.per_token = 0.0
        if self.level is not None:
            both = self.cost.dispatch_token_bytes + self.cost.combine_token_bytes
            self.per_token = both / self.cost.efficiency / self.level.bytes_per_s * _NS
            ports = len(set(self.level.port.tolist()))
            self.wires = ports * ports if self.level.contention == "pair" else ports

    def floor(self) -> float:
        """Return the constants of all steps and the uses that no zone can keep."""
        found = sum(self.kernel(step) + self.latency(step) for step in self.steps)
        if self.level is None:
            return found
        room = self.width * self.problem.slots_per_rank
        left, most = 0, 1
        counts = np.zeros((self.zones, self.size), np.int64)
        for step in self.steps:
            for zone, held in step.tokens:
                most = max(most, len(held))
                for expert in held:
                    counts[zone, expert] += 1
        for row in counts:
            left += int(np.sort(row)[: max(0, self.size - room)].sum())
        at_once = min(self.problem.slots_per_rank, self.problem.steps.expert_ids.shape[2])  # type: ignore[union-attr]
        return found + left / at_once / self.wires * self.per_token

    def kernel(self, step: _Step) -> float:
        """Return the least kernel of the slowest rank."""
        total, distinct = int(step.rows.sum()), int(np.sum(step.rows > 0))
        if not total:
            return 0.0
        ranks, rates = self.problem.num_ranks, self.cost.kernel
        groups = -(-distinct // ranks)
        if not self.cost.exact:
            rows = -(-total // ranks)
            ways = range(1, min(rows, self.problem.slots_per_rank) + 1)
            return float(max(min(self.cost.kernel_ns(rows, many, -(-rows // many)) for many in ways),
                             self.cost.kernel_ns(groups, groups, 1)))
        copies = min(ranks, 1 + self.problem.num_slots - self.size)
        hottest = -(-int(step.rows.max()) // copies)
        num_bytes = [(distinct * rates.bytes_per_group + total * rates.bytes_per_row) / ranks,
                     groups * (rates.bytes_per_group + rates.bytes_per_row),
                     rates.bytes_per_group + hottest * rates.bytes_per_row]
        work = max(total / ranks, groups * rates.tile_rows, hottest)
        return self._fixed() + _NS * max(max(num_bytes) / rates.bytes_per_s, work * rates.flops_per_row / rates.flops_per_s)

    def _fixed(self) -> float:
        return (self.cost.kernel.overhead_s + self.cost.kernel.task_overhead_s) * _NS - 0.5  # half a ns of rounding

    def latency(self, step: _Step) -> float:
        """Return both latencies where something must cross."""
        if self.level is None:
            return 0.0
        wanted: list[set[int]] = [set() for _ in range(self.zones)]
        for zone, held in step.tokens:
            wanted[zone] |= held
        full = any(len(held) > self.width * self.problem.slots_per_rank for held in wanted)
        alone = self.problem.num_slots == self.size  # then two zones that want one expert cannot both hold it
        if not full and not (alone and sum(map(len, wanted)) > len(set().union(*wanted))):
            return 0.0
        extra = self.cost.dispatch_overhead_s + self.cost.combine_overhead_s
        return (2 * self.level.latency_s + extra) * _NS - 1.0

    def assemble(self, choice: dict[str, np.ndarray]) -> tuple[float, np.ndarray]:
        """Return constant and matrix (what sharing a rank adds, by ordered pair) of all steps."""
        matrix, constant, averaged = np.zeros((self.size, self.size)), 0.0, []
        for index, step in enumerate(self.steps):
            form, expert = int(choice["kernel_form"][index]), int(choice["kernel_expert"][index])
            base, add = self._kernel_form(step, form, expert)
            constant += base
            matrix[expert] += add
            form, expert = int(choice["traffic_form"][index]), int(choice["traffic_expert"][index])
            constant += self.latency(step)
            if form == 1:
                averaged.append(step)
            elif form > 1:
                if self.level is None or self.level.contention != "port":
                    raise CheckError("certificate: a port's form needs a network that is limited by ports")
                base, add = self._port_form(step, form, expert)
                constant += base
                matrix[expert] += add
        if averaged and self.level is not None:
            constant += self._average(averaged, matrix)
        np.fill_diagonal(matrix, 0.0)
        return constant, (matrix + matrix.T) / 2

    def _kernel_form(self, step: _Step, form: int, expert: int) -> tuple[float, np.ndarray]:
        rates, none = self.cost.kernel, np.zeros(self.size)
        if form == 0 or not step.rows[expert]:
            return self.kernel(step), none
        hit = (step.rows > 0).astype(np.float64)
        per_row = rates.flops_per_row / rates.flops_per_s * _NS
        if form == 1:
            add = (hit * rates.bytes_per_group + step.rows * rates.bytes_per_row) / rates.bytes_per_s * _NS
            return self._fixed() + float(add[expert]), add
        if form == 2:
            return self._fixed() + float(step.rows[expert]) * per_row, step.rows * per_row
        return self._fixed() + max(int(step.rows[expert]), rates.tile_rows) * per_row, hit * rates.tile_rows * per_row

    def _port_form(self, step: _Step, form: int, expert: int) -> tuple[float, np.ndarray]:
        own = np.zeros(self.zones, np.int64)
        others = np.zeros((self.zones, self.size), np.int64)
        both, most = np.zeros((self.size, self.size), np.int64), 1
        for zone, held in step.tokens:
            most = max(most, len(held))
            if expert in held:
                own[zone] += 1
                continue
            index = sorted(held)
            others[zone, index] += 1
            both[np.ix_(index, index)] += 1
        away = (others.sum(axis=0) - others.max(axis=0)).astype(np.float64)
        mates = self.problem.slots_per_rank - 1
        if form == 3:
            add = away / max(1, min(mates, most))
        else:
            np.fill_diagonal(both, 0)
            overlap = np.sort(both, axis=1)[:, self.size - max(0, mates - 1):].sum(axis=1)
            add = away - overlap / 2
        add[expert] = 0.0
        return float(own.sum() - own.max()) * self.per_token, add * self.per_token

    def _average(self, steps: list[_Step], matrix: np.ndarray) -> float:
        """Add what sharing saves to `matrix`; return the constant of the mean port over these steps."""
        uses, scale = np.zeros((self.zones, self.size), np.int64), self.per_token / self.wires
        for step in steps:
            for zone, held in step.tokens:
                index = sorted(held)
                uses[zone, index] += 1
                matrix[np.ix_(index, index)] -= scale / 2
        return float(uses.sum() - uses.max(axis=0).sum()) * scale


CHECKS: dict[str, Callable[[PlacementProblem, Certificate], float]] = {"co-location": check_colocation}
