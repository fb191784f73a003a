"""TensorRT-LLM's load-balancer YAML, a static plan."""

from __future__ import annotations

import io
import json
import shlex
from pathlib import Path
from typing import Any

from moesim.export.check.plans import tensorrt_rows
from moesim.export.check.rows import check_same
from moesim.export.engines.target import Content, PlanTarget, Refusal, known, one_file
from moesim.model.spec import ModelSpec
from moesim.placement.plan import PlacementPlan


class TensorRTLLM(PlanTarget):
    """Slots of each MoE layer by the model's own layer number, with one line per layer."""

    name, suffixes = "tensorrt-llm", (".yaml", ".yml")
    suffix_reason = "TensorRT-LLM reads this file as YAML"
    what = "load-balancer YAML for moe_config"

    def refusal(self, subject: PlacementPlan, model: ModelSpec | None) -> Refusal[PlacementPlan] | None:
        """Refuse one rank, and what no engine takes."""
        if subject.num_ranks == 1:
            return Refusal("tensorrt-llm: the load balancer needs expert parallelism over several ranks, "
                           "but the plan has 1 rank")
        return super().refusal(subject, model)

    def encode(self, subject: PlacementPlan, model: ModelSpec | None, path: Path) -> Content:
        """Return the YAML document."""
        from ruamel.yaml import YAML

        document = {"num_slots": subject.num_slots, "layer_updates_per_iter": 0, "initial_global_assignments": dict(
            zip(known(model).moe_layers, subject.physical_to_logical.tolist(), strict=True))}
        yaml: Any = YAML(typ="safe", pure=True)
        yaml.default_flow_style, yaml.width, yaml.sort_base_mapping_type_on_output = None, 2**20, False
        text = io.BytesIO()
        yaml.dump(document, text)
        return text.getvalue()

    def check(self, content: Content, subject: PlacementPlan, model: ModelSpec | None) -> None:
        """Read the document as the strict configuration class does."""
        rows = tensorrt_rows(one_file(content), moe_layers=known(model).moe_layers, num_experts=subject.num_experts,
                             ep_size=subject.num_ranks)
        check_same(self.name, rows, subject.physical_to_logical.tolist())

    def command(self, subject: PlacementPlan, model: ModelSpec | None, path: Path) -> str:
        """Return a command that writes the file of arguments that names the plan, then starts the server."""
        extra = path.with_name(f"{path.stem}.llm_args.yaml")
        lines = ("enable_attention_dp: true", "moe_config:", "  backend: WIDEEP",
                 f"  load_balancer: {json.dumps(str(path))}")
        return (f"printf '%s\\n' {' '.join(map(shlex.quote, lines))} > {shlex.quote(str(extra))} && "
                f"trtllm-serve {shlex.quote(known(model).name)} --tp_size {subject.num_ranks} "
                f"--ep_size {subject.num_ranks} --extra_llm_api_options {shlex.quote(str(extra))}")

    def notes(self, subject: PlacementPlan, model: ModelSpec | None) -> tuple[str, ...]:
        """Return what TensorRT-LLM does with the file."""
        return (
            "Put the checkpoint's path after trtllm-serve.",
            "Older versions take the file as a top-level moe_load_balancer, or under pytorch_backend_config.",
            "Every MoE layer that the engine builds must be in the file: a multi-token-prediction layer, which "
            "the plan does not hold, would be refused.",
            "Load balancing is known for DeepSeek-V3, Mixtral, Llama 4, Qwen2-MoE and Qwen3-MoE.")
