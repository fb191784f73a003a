"""ExFlow's solution CSV ``Expert,Node``; `moesim.placement.exflow_files` reads it."""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np

from moesim.errors import CheckError
from moesim.export.check.plans import exflow_homes
from moesim.export.engines.target import Content, PlanTarget, Refusal, one_file
from moesim.model.spec import ModelSpec
from moesim.placement.plan import PlacementPlan


class ExFlow(PlanTarget):
    """Expert ``layer * num_experts + e`` and its GPU, a line each."""

    name, suffixes, needs_model = "exflow", (".csv",), False
    suffix_reason = "ExFlow's tools look for a CSV"
    what = "solution CSV Expert,Node"

    def refusal(self, subject: PlacementPlan, model: ModelSpec | None) -> Refusal[PlacementPlan] | None:
        """Refuse replicas: an expert has one home."""
        if subject.num_slots == subject.num_experts:
            return super().refusal(subject, model)
        return Refusal(f"exflow: an expert has one home there, but the plan has {subject.num_slots} slots for "
                       f"{subject.num_experts} experts in each layer", single_homes(subject),
                       "one copy of each expert, kept on a rank that holds it wherever equal counts allow")

    def encode(self, subject: PlacementPlan, model: ModelSpec | None, path: Path) -> Content:
        """Return the CSV."""
        homes = subject.slot_rank[subject.logical_to_physical[:, :, 0]].ravel().tolist()
        return ("Expert,Node\n" + "".join(f"{expert},{node}\n" for expert, node in enumerate(homes))).encode()

    def check(self, content: Content, subject: PlacementPlan, model: ModelSpec | None) -> None:
        """Read the CSV; every expert must be on the rank whose slots hold it."""
        homes = exflow_homes(one_file(content), num_layers=subject.num_layers, num_experts=subject.num_experts,
                             num_gpus=subject.num_ranks)
        for layer, (row, slots) in enumerate(zip(homes, subject.physical_to_logical.tolist(), strict=True)):
            if any(row[expert] != slot // subject.slots_per_rank for slot, expert in enumerate(slots)):
                raise CheckError(f"exflow: a home of MoE layer {layer} is not the plan's")

    def command(self, subject: PlacementPlan, model: ModelSpec | None, path: Path) -> str:
        """Return Python that reads the file."""
        load = f"import pandas; print(pandas.read_csv({str(path)!r}).groupby('Node').size())"
        return f"python -c {shlex.quote(load)}"

    def notes(self, subject: PlacementPlan, model: ModelSpec | None) -> tuple[str, ...]:
        """Return what the numbers mean."""
        return ("Experts are numbered over all MoE layers; Node is the GPU (rank), as in ExFlow's published plans.",
                "moesim place import reads such files back.")


def single_homes(plan: PlacementPlan) -> PlacementPlan | None:
    """Return a plan of one copy per expert and equal counts per rank that moves the fewest experts to ranks without one.

    None where the experts do not divide over the ranks. Exact: an assignment problem per layer.
    """
    from scipy.optimize import linear_sum_assignment

    if plan.num_experts % plan.num_ranks:
        return None
    rows = []
    for slots in plan.physical_to_logical:
        held = np.zeros((plan.num_experts, plan.num_ranks), bool)
        held[slots, plan.slot_rank] = True
        places = np.repeat(~held, plan.num_experts // plan.num_ranks, axis=1)  # [expert, place], 1 where it must move
        rows.append(np.argsort(linear_sum_assignment(places)[1]))
    return PlacementPlan(np.stack(rows), plan.num_ranks, plan.num_experts, dict(plan.provenance))
