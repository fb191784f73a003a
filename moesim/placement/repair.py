"""Bring a plan within its constraints with as few moved experts as possible, or name the constraints that clash."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from moesim.errors import SolverError
from moesim.placement.constraints import Apart, Constraint, Pin
from moesim.placement.plan import PlacementPlan
from moesim.placement.problem import PlacementProblem

if TYPE_CHECKING:
    from ortools.sat.python import cp_model

_LIMIT_S = 20.0


def repair(problem: PlacementProblem, plan: PlacementPlan) -> PlacementPlan:
    """Return the plan nearest to `plan` that keeps the problem's constraints; `plan` itself if it keeps them.

    Every layer that breaks one is solved by CP-SAT over ``y[expert, rank]`` (is there a copy?): every expert
    somewhere, no rank over its slots, pins, pairs apart, capacities; as many of the present copies stay as can. A slot
    that is left repeats the expert of its rank with the largest load per copy. Layers without a breach stay as they are.

    Raises:
        SolverError: no plan keeps them; the message has a smallest set of constraints that clash.
    """
    if not problem.constraints or not problem.constraints.broken(plan, problem.ranks_per_node):
        return plan
    rows = np.array(plan.physical_to_logical)
    shares = None if plan.slot_share is None else np.array(plan.slot_share)
    for layer in range(problem.num_layers):
        one = PlacementPlan(rows[layer:layer + 1], plan.num_ranks, plan.num_experts)
        wanted = problem.constraints.of_layer(layer)
        single = dataclasses.replace(problem.constraints, pins=tuple(
            dataclasses.replace(pin, layer=-1) for pin in wanted if isinstance(pin, Pin)), apart=tuple(
            dataclasses.replace(pair, layer=-1) for pair in wanted if isinstance(pair, Apart)))
        if single.broken(one, problem.ranks_per_node):
            rows[layer] = _LayerRepair(problem, layer, wanted).row(rows[layer])
            if shares is not None:
                shares[layer] = 1.0 / np.bincount(rows[layer], minlength=plan.num_experts)[rows[layer]]
    return dataclasses.replace(plan, physical_to_logical=rows, slot_share=shares)


class _LayerRepair:
    """One layer's model."""

    def __init__(self, problem: PlacementProblem, layer: int, constraints: list[Constraint]) -> None:
        self.problem, self.layer, self.constraints = problem, layer, constraints

    def row(self, slots: np.ndarray) -> np.ndarray:
        """Return int32[slot] near `slots`."""
        held = np.zeros((self.problem.num_experts, self.problem.num_ranks), bool)
        held[slots, np.arange(len(slots)) // self.problem.slots_per_rank] = True
        found = self._solve(self.constraints, held)
        if found is None:
            clash = self._smallest_clash(held)
            raise SolverError(f"layer {self.layer}: no plan keeps these constraints together: "
                              f"{'; '.join(map(str, clash)) or 'slots and experts'}")
        return self._fill(found)

    def _smallest_clash(self, held: np.ndarray) -> list[Constraint]:
        """Return constraints that clash, none of which can be left out (deletion filter)."""
        kept = list(self.constraints)
        for one in list(kept):
            fewer = [other for other in kept if other is not one]
            if self._solve(fewer, held) is None:
                kept = fewer
        return kept

    def _solve(self, constraints: list[Constraint], held: np.ndarray) -> np.ndarray | None:
        """Return bool[expert, rank] copies, or None if there is no plan."""
        from ortools.sat.python import cp_model

        model = cp_model.CpModel()
        y = [[model.new_bool_var(f"y_{e}_{r}") for r in range(held.shape[1])] for e in range(held.shape[0])]
        for copies in y:
            model.add_at_least_one(copies)
        for rank in range(held.shape[1]):
            on_rank = sum(copies[rank] for copies in y)
            model.add(on_rank <= self.problem.slots_per_rank)
            model.add(on_rank >= 1)
        for one in constraints:
            self._add(model, y, one)
        model.maximize(sum((2 if held[e, r] else -1) * var for e, row in enumerate(y) for r, var in enumerate(row)))
        solver = cp_model.CpSolver()
        solver.parameters.max_time_in_seconds = _LIMIT_S
        solver.parameters.num_workers = 1
        status = solver.solve(model)
        if status == cp_model.INFEASIBLE:
            return None
        if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
            raise SolverError(f"layer {self.layer}: no plan within the constraints was found in {_LIMIT_S:g} s, and "
                              "none was ruled out")
        return np.array([[bool(solver.value(var)) for var in row] for row in y])

    def _add(self, model: cp_model.CpModel, y: list[list[cp_model.IntVar]], one: Constraint) -> None:
        if isinstance(one, Pin):
            model.add(y[one.expert][one.rank] == 1)
        elif isinstance(one, Apart):
            for first, second in zip(y[one.first], y[one.second], strict=True):
                model.add(first + second <= 1)
        else:
            width = 1 if one.scope == "rank" else self.problem.ranks_per_node
            ranks = range(one.place * width, (one.place + 1) * width)
            present = [model.new_bool_var(f"z_{one.scope}_{one.place}_{e}") for e in range(len(y))]
            for copies, here in zip(y, present, strict=True):
                for rank in ranks:
                    model.add_implication(copies[rank], here)
            model.add(sum(present) <= one.num_experts)

    def _fill(self, copies: np.ndarray) -> np.ndarray:
        """Return int32[slot]: the copies; a free slot repeats the expert of its rank with the largest load per copy."""
        load = self.problem.expert_load[self.layer]
        row = np.empty((self.problem.num_ranks, self.problem.slots_per_rank), np.int32)
        count = copies.sum(axis=1).astype(float)
        for rank in range(self.problem.num_ranks):
            experts = np.flatnonzero(copies[:, rank]).tolist()
            while len(experts) < self.problem.slots_per_rank:
                best = max(experts, key=lambda e: (load[e] / count[e], -e))  # always allowed: it is there already
                experts.append(best)
                count[best] += 1
            row[rank] = experts
        return row.ravel()
