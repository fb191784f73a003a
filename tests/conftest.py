"""Fixtures that several parts share: a tiny model, a trace of its shape, a scenario over both."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

TINY_CONFIG = {
    "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "hidden_size": 64,
    "intermediate_size": 96, "num_hidden_layers": 3, "num_local_experts": 8, "num_experts_per_tok": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128, "torch_dtype": "bfloat16"}

TINY_SCENARIO = """\
schema: moesim.scenario/1
name: tiny
seed: 3
model: tiny/config.json
trace: tiny.trace.parquet
trace_stands_in: true
output: results/tiny
studies:
  - kind: expert_parallel
    name: four-gpus
    title: Four GPUs
    hardware: {name: h100-sxm, gpus_per_node: 4}
    workload: {batch_size: 8, max_steps: 3}
    placement:
      plans:
        - {solver: contiguous}
        - {solver: eplb, redundant_experts: 4, options: {policy: global}}
  - kind: offload
    name: one-gpu
    hardware: {name: rtx-4090}
    workload: {batch_size: 1, max_steps: 4}
    points:
      - {policy: [lru, static], slots_per_layer: [2, 4]}
"""

# packages that `tests/engines/install.sh python` unpacked; tests marked `engines` skip without them
sys.path.append(str(Path(os.environ.get("MOESIM_ENGINES", "/tmp/moesim-engines")) / "site"))

# a test that wants the compiled engines asks for them; none starts a process that compiles beside the others
os.environ["MOESIM_BACKGROUND_COMPILE"] = "0"

# CI tries the same examples every time, so that a green run stays green; at home every run explores new ones.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Path:
    """A folder with tiny/config.json, tiny.trace.parquet of that shape and tiny.yaml over both."""
    from moesim.traces.store import write_trace
    from moesim.traces.synth import synthetic_trace

    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(TINY_CONFIG))
    write_trace(synthetic_trace(160, 3, 8, 2, 8, seed=1), tmp_path / "tiny.trace.parquet")
    (tmp_path / "tiny.yaml").write_text(TINY_SCENARIO)
    return tmp_path


@pytest.fixture
def folder(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny model, trace and scenario, in the working directory."""
    monkeypatch.chdir(tiny_folder)
    return tiny_folder
