"""DeepSpeed's layout: experts lie contiguously by rank, so a plan is a renumbering of the experts."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from moesim.export.check.plans import deepspeed_rows
from moesim.export.check.rows import check_same
from moesim.export.engines.exflow import single_homes
from moesim.export.engines.target import Content, PlanTarget, Refusal, known, one_file
from moesim.model.spec import ModelSpec
from moesim.placement.plan import PlacementPlan


class DeepSpeed(PlanTarget):
    """JSON: the inference section ``moe`` and, per MoE layer, which expert takes which new id.

    DeepSpeed (0.19.8) has no placement file. Rank r holds the ids ``r * E / ep_size ...``, so the plan is reached by
    giving experts new ids in the checkpoint: in the names of the files
    ``layer_{l}_expert_{id}_mp_rank_{m}_model_states.pt``, in the keys inside them (``deepspeed_experts.{id}.``: the loader
    looks for the id of the file name there), and in the order of the rows of each router's weight.
    """

    name, suffixes = "deepspeed", (".json",)
    suffix_reason = "it is JSON"
    what = "new expert ids that make DeepSpeed's contiguous layout the plan"

    def refusal(self, subject: PlacementPlan, model: ModelSpec | None) -> Refusal[PlacementPlan] | None:
        """Refuse replicas: an id stands once."""
        if subject.num_slots == subject.num_experts:
            return super().refusal(subject, model)
        return Refusal(f"deepspeed: an expert is stored once, but the plan has {subject.num_slots} slots for "
                       f"{subject.num_experts} experts in each layer", single_homes(subject),
                       "one copy of each expert, kept on a rank that holds it wherever equal counts allow")

    def encode(self, subject: PlacementPlan, model: ModelSpec | None, path: Path) -> Content:
        """Return the JSON document."""
        moe = {"enabled": True, "ep_size": subject.num_ranks, "moe_experts": [subject.num_experts]}
        document = {"inference_config": {"moe": moe}, "model_layers": list(known(model).moe_layers),
                    "old_expert_of_new_id": subject.physical_to_logical.tolist()}
        return (json.dumps(document) + "\n").encode()

    def check(self, content: Content, subject: PlacementPlan, model: ModelSpec | None) -> None:
        """Read the document: permutations, and the plan's."""
        rows = deepspeed_rows(one_file(content), num_layers=subject.num_layers, num_experts=subject.num_experts,
                              ep_size=subject.num_ranks)
        check_same(self.name, rows, subject.physical_to_logical.tolist())

    def command(self, subject: PlacementPlan, model: ModelSpec | None, path: Path) -> str:
        """Return Python that reads the file."""
        load = f"import json; print(json.load(open({str(path)!r}))['inference_config'])"
        return f"python -c {shlex.quote(load)}"

    def notes(self, subject: PlacementPlan, model: ModelSpec | None) -> tuple[str, ...]:
        """Return what has to be done with the numbers."""
        return (
            "DeepSpeed loads no placement: new id i of MoE layer l is old expert old_expert_of_new_id[l][i]. Rename "
            "layer_<l>_expert_<old>_mp_rank_<m>_model_states.pt accordingly (l counts MoE layers from 0), change "
            "deepspeed_experts.<old>. in the keys inside it to the new id too, and reorder the rows of that layer's gate "
            "weight in the same way: router[new] = router[old].",
            "The section inference_config goes into deepspeed.init_inference's config.")
