"""SGLang's ``--init-expert-location`` file."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np

from moesim.export.check.plans import sglang_rows
from moesim.export.check.rows import check_same
from moesim.export.engines.target import Content, PlanTarget, known, one_file
from moesim.model.spec import ModelSpec
from moesim.placement.plan import PlacementPlan


class SGLang(PlanTarget):
    """JSON with the one key ``physical_to_logical_map`` (0.5.23).

    int[model layer, slot]: the rows of dense layers, which the engine reads but never uses, hold slot
    mod num_experts. GPU g owns slots ``g * slots / ep_size ...``, as in the plan.
    """

    name, suffixes = "sglang", (".json",)
    suffix_reason = "SGLang tells the format of --init-expert-location by its suffix"
    what = "JSON for --init-expert-location"

    def encode(self, subject: PlacementPlan, model: ModelSpec | None, path: Path) -> Content:
        """Return the JSON document."""
        model = known(model)
        rows = np.tile(np.arange(subject.num_slots) % subject.num_experts, (model.num_layers, 1))
        rows[list(model.moe_layers)] = subject.physical_to_logical
        return (json.dumps({"physical_to_logical_map": rows.tolist()}) + "\n").encode()

    def check(self, content: Content, subject: PlacementPlan, model: ModelSpec | None) -> None:
        """Read the document as SGLang does."""
        model = known(model)
        rows = sglang_rows(one_file(content), num_layers=model.num_layers, moe_layers=model.moe_layers,
                           num_experts=subject.num_experts, num_redundant=subject.num_slots - subject.num_experts,
                           ep_size=subject.num_ranks)
        check_same(self.name, rows, subject.physical_to_logical.tolist())

    def command(self, subject: PlacementPlan, model: ModelSpec | None, path: Path) -> str:
        """Return a server's command line; several GPUs exchange tokens through DeepEP."""
        ranks = subject.num_ranks
        exchange = (f"--dp-size {ranks} --enable-dp-attention --moe-a2a-backend deepep "
                    "--ep-dispatch-algorithm static ") if ranks > 1 else ""
        return (f"python -m sglang.launch_server --model-path {shlex.quote(known(model).name)} --tp-size {ranks} "
                f"--ep-size {ranks} {exchange}--ep-num-redundant-experts {subject.num_slots - subject.num_experts} "
                f"--init-expert-location {shlex.quote(str(path))}")

    def notes(self, subject: PlacementPlan, model: ModelSpec | None) -> tuple[str, ...]:
        """Return what SGLang does with the file."""
        return (
            "Put the checkpoint's path after --model-path; on several servers add --nnodes, --node-rank and "
            "--dist-init-addr.",
            "SGLang accepts a map of the wrong width and fails later: keep --ep-num-redundant-experts and "
            "--ep-size as given here.",
            "moesim splits an expert's tokens evenly over its replicas; SGLang's static dispatch prefers a "
            "replica on the sender's own GPU, then on its node.",
            "Only model classes that define get_model_config_for_expert_location use the map (DeepSeek, Qwen, "
            "GLM, GPT-OSS, LLaDA2, ...; not Mixtral, OLMoE, Phi, DBRX or Jamba).")
