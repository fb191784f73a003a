"""vllm-ascend's static expert map."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path

import numpy as np

from moesim.export.check.plans import ascend_rows
from moesim.export.check.rows import check_same
from moesim.export.engines.target import Content, PlanTarget, Refusal, known, one_file
from moesim.model.spec import ModelSpec
from moesim.placement.metrics import duplicates_on_rank
from moesim.placement.plan import PlacementPlan


class VllmAscend(PlanTarget):
    """JSON for ``expert_map_path``: per MoE layer and device the experts in slot order."""

    name, suffixes = "vllm-ascend", (".json",)
    suffix_reason = "vllm-ascend refuses an expert_map_path that does not end so"
    what = "JSON for eplb_config.expert_map_path"

    def refusal(self, subject: PlacementPlan, model: ModelSpec | None) -> Refusal[PlacementPlan] | None:
        """Refuse two copies of an expert on one device (the loader would forget one), and what no engine takes."""
        if int(duplicates_on_rank(subject).sum()):
            return Refusal("vllm-ascend: a device keeps one slot per expert, but the plan puts an expert twice on one "
                           "rank", spread_copies(subject), "as many copies of each expert, no two on one rank")
        return super().refusal(subject, model)

    def encode(self, subject: PlacementPlan, model: ModelSpec | None, path: Path) -> Content:
        """Return the JSON document."""
        layers = subject.physical_to_logical.reshape(subject.num_layers, subject.num_ranks, -1).tolist()
        document = {"moe_layer_count": subject.num_layers, "layer_list": [
            {"layer_id": layer, "device_count": subject.num_ranks, "device_list": [
                {"device_id": rank, "device_expert": experts} for rank, experts in enumerate(devices)]}
            for layer, devices in enumerate(layers)]}
        return (json.dumps(document) + "\n").encode()

    def check(self, content: Content, subject: PlacementPlan, model: ModelSpec | None) -> None:
        """Read the document as the loader does."""
        rows = ascend_rows(one_file(content), num_experts=subject.num_experts)
        check_same(self.name, rows, subject.physical_to_logical.tolist())

    def command(self, subject: PlacementPlan, model: ModelSpec | None, path: Path) -> str:
        """Return a server's command line."""
        config = json.dumps({"eplb_config": {"expert_map_path": str(path)}})
        return (f"vllm serve {shlex.quote(known(model).name)} --data-parallel-size {subject.num_ranks} "
                f"--enable-expert-parallel --additional-config {shlex.quote(config)}")

    def notes(self, subject: PlacementPlan, model: ModelSpec | None) -> tuple[str, ...]:
        """Return the limits of the map."""
        return ("Put the checkpoint's path after vllm serve.",
                "The static map is read by model runner V1 only, and is announced to go in vllm-ascend 0.25.1.")


def spread_copies(plan: PlacementPlan) -> PlacementPlan | None:
    """Return the plan with slots swapped until no rank holds an expert twice; None where the swaps find no way."""
    rows = np.array(plan.physical_to_logical)
    shares = np.array(plan.share)
    for row, share in zip(rows, shares, strict=True):
        while (swap := _swap(row.reshape(plan.num_ranks, -1))) is not None:
            row[list(swap)], share[list(swap)] = row[list(swap[::-1])], share[list(swap[::-1])]
    spread = dataclasses.replace(plan, physical_to_logical=rows, slot_share=None if plan.slot_share is None else shares)
    return None if int(duplicates_on_rank(spread).sum()) else spread


def _swap(held: np.ndarray) -> tuple[int, int] | None:
    """Return two slots of int[rank, local slot] whose swap parts two copies and joins none; None: there are no such."""
    width = held.shape[1]
    for rank, row in enumerate(held.tolist()):
        for place, expert in enumerate(row):
            if expert not in row[:place]:
                continue
            for other, others in enumerate(held.tolist()):
                if other == rank or expert in others:
                    continue
                for there, candidate in enumerate(others):
                    if candidate not in row:
                        return rank * width + place, other * width + there
    return None
