"""Files for the vLLM plug-in (``integrations/vllm-moesim``): a plan for its EPLB policy, routing for its simulator."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np

from moesim.errors import CheckError
from moesim.export.check.arrays import check_routing
from moesim.export.check.plans import vllm_rows
from moesim.export.check.rows import check_same
from moesim.export.engines.safetensors import safetensors_bytes
from moesim.export.engines.target import (
    Content,
    PlanTarget,
    Refusal,
    Target,
    known,
    one_file,
)
from moesim.model.spec import ModelSpec
from moesim.placement.plan import PlacementPlan
from moesim.traces.trace import PAD, RoutingTrace

PLAN_SCHEMA, ROUTING_SCHEMA = "moesim.vllm-eplb/1", "moesim.vllm-routing/1"
PLAN_VARIABLE, ROUTING_VARIABLE, STRATEGY = "MOESIM_EPLB_PLAN", "MOESIM_ROUTING", "moesim"
STEP_INTERVAL = 100  # vLLM starts with three quarters of it done: the plan is in place after 25 steps


class Vllm(PlanTarget):
    """JSON of ``physical_to_logical_map[MoE layer, slot]``, which the plug-in's policy hands to vLLM (0.33.0)."""

    name, suffixes = "vllm", (".json",)
    suffix_reason = "it is JSON"
    what = "plan for the EPLB policy of the plug-in vllm-moesim"

    def refusal(self, subject: PlacementPlan, model: ModelSpec | None) -> Refusal[PlacementPlan] | None:
        """Refuse one rank, and what no engine takes."""
        if subject.num_ranks == 1:
            return Refusal("vllm: expert load balancing needs several ranks, but the plan has 1 rank")
        return super().refusal(subject, model)

    def encode(self, subject: PlacementPlan, model: ModelSpec | None, path: Path) -> Content:
        """Return the JSON document."""
        document = {"schema": PLAN_SCHEMA, "num_experts": subject.num_experts, "num_ranks": subject.num_ranks,
                    "model_layers": list(known(model).moe_layers),
                    "physical_to_logical_map": subject.physical_to_logical.tolist()}
        return (json.dumps(document) + "\n").encode()

    def check(self, content: Content, subject: PlacementPlan, model: ModelSpec | None) -> None:
        """Read the document by the policy's rules."""
        rows = vllm_rows(one_file(content), num_experts=subject.num_experts, num_slots=subject.num_slots,
                         num_ranks=subject.num_ranks)
        check_same(self.name, rows, subject.physical_to_logical.tolist())

    def command(self, subject: PlacementPlan, model: ModelSpec | None, path: Path) -> str:
        """Return a server's command line with the plug-in's variable."""
        config = {"num_redundant_experts": subject.num_slots - subject.num_experts, "step_interval": STEP_INTERVAL,
                  "window_size": STEP_INTERVAL, "log_balancedness": True}
        return (f"env {PLAN_VARIABLE}={shlex.quote(str(path))} vllm serve {shlex.quote(known(model).name)} "
                f"--data-parallel-size {subject.num_ranks} --enable-expert-parallel --enable-eplb "
                f"--eplb-config {shlex.quote(json.dumps(config))}")

    def notes(self, subject: PlacementPlan, model: ModelSpec | None) -> tuple[str, ...]:
        """Return what vLLM does with the plan."""
        return (
            "Install the plug-in first: pip install ./integrations/vllm-moesim. Put the checkpoint's path after vllm serve.",
            f"vLLM starts with its own map and moves to the plan at the first rearrangement, after {STEP_INTERVAL // 4} "
            "steps; later rearrangements change nothing.",
            "The ranks are tensor-parallel size times data-parallel size. Draft models and pipeline stages have "
            "other layers than the plan, and the policy refuses them.")


class VllmRouting(Target[RoutingTrace]):
    """safetensors of ``expert_ids`` int32 and ``weights`` float32[token, MoE layer, k], which the plug-in replays."""

    name, suffixes, needs_model = "vllm-routing", (".safetensors",), False
    takes, takes_words = RoutingTrace, "a trace (*.trace.parquet)"
    suffix_reason = "the plug-in reads safetensors"
    what = "routing for the simulator strategy of the plug-in vllm-moesim"

    def refusal(self, subject: RoutingTrace, model: ModelSpec | None) -> Refusal[RoutingTrace] | None:
        """Refuse tokens with fewer than k experts: vLLM's router returns k for every token."""
        short = np.flatnonzero((subject.expert_ids == PAD).any(axis=(1, 2)))
        if not len(short):
            return None
        whole = np.setdiff1d(np.unique(subject.request_id), subject.request_id[short])
        near = subject.take(np.isin(subject.request_id, whole)) if len(whole) else None
        return Refusal(f"vllm-routing: token {short[0]} uses fewer than {subject.top_k} experts in a layer, but vLLM "
                       "takes as many for every token", near, f"the {len(whole)} requests without such tokens")

    def encode(self, subject: RoutingTrace, model: ModelSpec | None, path: Path) -> Content:
        """Return ids and weights; where the trace has no weights, every expert of a token weighs the same."""
        ids = subject.expert_ids.astype(np.int32)
        weights = subject.gate_weights
        if weights is None:
            weights = np.full(ids.shape, 1.0 / subject.top_k, np.float32)
        return safetensors_bytes({"expert_ids": ids, "weights": weights},
                                 {"schema": ROUTING_SCHEMA, "num_experts": str(subject.num_experts)})

    def check(self, content: Content, subject: RoutingTrace, model: ModelSpec | None) -> None:
        """Read the file; the ids must be the trace's."""
        if not np.array_equal(check_routing(one_file(content), num_experts=subject.num_experts)["expert_ids"],
                              subject.expert_ids):
            raise CheckError("vllm-routing: the ids are not the trace's")

    def command(self, subject: RoutingTrace, model: ModelSpec | None, path: Path) -> str:
        """Return a server's command line with the plug-in's and the simulator's variables."""
        name = shlex.quote(model.name if model else subject.model or "MODEL")
        return (f"env {ROUTING_VARIABLE}={shlex.quote(str(path))} VLLM_MOE_ROUTING_SIMULATION_STRATEGY={STRATEGY} "
                f"vllm serve {name} --enable-expert-parallel --enforce-eager")

    def notes(self, subject: RoutingTrace, model: ModelSpec | None) -> tuple[str, ...]:
        """Return what is replayed and what is not."""
        return (
            "Install the plug-in first: pip install ./integrations/vllm-moesim. Put the checkpoint's path after vllm serve.",
            "For timing only: the model's outputs are not valid. Tokens take the trace's rows in order, wrapping round; "
            "which request a row came from is not matched.",
            "--enforce-eager is needed: a captured graph would replay one step's routing for ever. Micro-batches, "
            "pipeline stages and draft models break the order of layers; the strategy stops when it sees that.")
