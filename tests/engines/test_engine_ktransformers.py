"""kt-kernel's mask builder and sglang-kt's own reading of the activation file give the wanted mask."""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np
import pytest
from engines.engine_folder import need, run_engine_code
from export_worlds import KEPT, TAIL_MODEL

from moesim.export.engines import export
from moesim.export.residency import Residency

pytestmark = pytest.mark.engines

BUILDER = '''
import torch
from kt_kernel import generate_gpu_experts_masks
counts = torch.load(sys.argv[1], weights_only=True, map_location="cpu")["logical_count"]
print(json.dumps(generate_gpu_experts_masks(counts.sum(dim=0).float(), int(sys.argv[2])).tolist()))
'''

ENGINE = '''
import ast, logging, torch
import torch.distributed as dist
from typing import Optional
from kt_kernel import generate_gpu_experts_masks
wrapper, counts, ratio, layers, experts, first = sys.argv[1:7]
logger, _KT_GPU_EXPERTS_MASKS, get_tensor_model_parallel_rank = logging.getLogger(), None, lambda: 0
body = [node for node in ast.parse(open(wrapper).read()).body if getattr(node, "name", "") == "_init_kt_gpu_experts_masks"]
exec(compile(ast.Module(body, []), "kt_ep_wrapper", "exec"), globals())
config = SimpleNamespace(num_hidden_layers=int(layers), num_experts=int(experts), first_k_dense_replace=int(first))
arguments = SimpleNamespace(get_hf_config=lambda: config, kt_gpu_experts_ratio=float(ratio), kt_num_gpu_experts=None,
                            kt_expert_placement_strategy="frequency", init_expert_location=counts)
print(json.dumps(_init_kt_gpu_experts_masks(arguments).tolist()))
'''


def word_after(command: str, flag: str) -> str:
    """The word after a flag of a command line."""
    words = shlex.split(command)
    return words[words.index(flag) + 1]


@pytest.mark.parametrize("kept", [KEPT, Residency(np.zeros((3, 4), bool)), Residency(np.ones((3, 4), bool)),
                                  Residency(np.eye(3, 4, dtype=bool))])
def test_the_engine_builds_the_wanted_mask(kept: Residency, tmp_path: Path) -> None:
    """From the file and the ratio of our command line, with dense layers set to True by the engine."""
    wrapper = need("sglang-kt", "sglang", "srt", "layers", "moe", "kt_ep_wrapper.py")
    report = export(kept, TAIL_MODEL, "ktransformers", tmp_path / "x.pt")
    ratio = word_after(report.start_command, "--kt-gpu-experts-ratio")
    mask = run_engine_code(ENGINE, wrapper, report.path, ratio, 5, 4, 2, python_path=(need("kt-kernel"), need("gguf")))
    assert mask == [[True] * 4, [True] * 4, *kept.on_gpu.tolist()]


def test_the_kernels_mask_builder_alone(tmp_path: Path) -> None:
    """Before dense layers are set: the wanted experts and no others."""
    path = export(KEPT, TAIL_MODEL, "ktransformers", tmp_path / "x.pt").path
    mask = run_engine_code(BUILDER, path, KEPT.num_on_gpu, python_path=(need("kt-kernel"), need("gguf")))
    assert mask == [[False] * 4, [False] * 4, *KEPT.on_gpu.tolist()]
