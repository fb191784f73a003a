"""An expert-load-balancing policy that answers with a plan made elsewhere."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

SCHEMA = "moesim.vllm-eplb/1"
POLICY = "default"  # the only name that vLLM's configuration accepts


@dataclass(frozen=True)
class FixedPlan:
    """A plan as vLLM holds it: int64[MoE layer, slot], rank r owns slots ``r * slots / ranks ...``."""

    physical_to_logical: torch.Tensor
    num_experts: int
    num_ranks: int

    @classmethod
    def read(cls, path: str | Path) -> FixedPlan:
        """Read a file of ``moesim export --to vllm``; raises ValueError for one that is not."""
        document = json.loads(Path(path).read_text())
        if not isinstance(document, dict) or document.get("schema") != SCHEMA:
            raise ValueError(f"{path}: expected a {SCHEMA!r} file; make it with moesim export --to vllm")
        rows = torch.tensor(document["physical_to_logical_map"], dtype=torch.int64)
        plan = cls(rows, int(document["num_experts"]), int(document["num_ranks"]))
        present = torch.zeros(rows.shape[0], plan.num_experts, dtype=torch.bool).scatter_(1, rows, True)
        if not present.all() or rows.shape[1] % plan.num_ranks:
            raise ValueError(f"{path}: an expert has no slot, or the slots do not divide over the ranks")
        return plan

    def answer(self, weight: torch.Tensor, num_replicas: int, num_ranks: int) -> torch.Tensor:
        """Return the map; raises ValueError where vLLM's sizes are not the plan's."""
        found = {"MoE layers": weight.shape[0], "experts": weight.shape[1], "slots": num_replicas, "ranks": num_ranks}
        planned = {"MoE layers": self.physical_to_logical.shape[0], "experts": self.num_experts,
                   "slots": self.physical_to_logical.shape[1], "ranks": self.num_ranks}
        if found != planned:
            raise ValueError(f"moesim: the plan is for {planned}, vLLM asks for {found}; draft models, pipeline stages "
                             "and other numbers of redundant experts or ranks are not in the plan")
        return self.physical_to_logical.clone()


def install_policy(path: str | Path) -> None:
    """Make vLLM's policy return the plan in `path`."""
    from vllm.distributed.eplb.policy import EPLB_POLICIES

    EPLB_POLICIES[POLICY] = policy_of(FixedPlan.read(path), EPLB_POLICIES[POLICY])


def policy_of(plan: FixedPlan, base: type[Any]) -> type[Any]:
    """Return a subclass of vLLM's policy `base` that answers with `plan`."""

    class MoesimPolicy(base):
        """Answers every call with one plan."""

        @classmethod
        def rebalance_experts(cls, weight: torch.Tensor, num_replicas: int, num_groups: int, num_nodes: int,
                              num_ranks: int, old_global_expert_indices: torch.Tensor | None = None) -> torch.Tensor:
            """Return int64[layer, slot] on the CPU; groups, nodes and the old map do not matter to a fixed plan."""
            return plan.answer(weight, num_replicas, num_ranks)

    return MoesimPolicy
