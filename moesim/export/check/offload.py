"""Rules of engines that keep some experts on the GPU: KTransformers' mask and rules, llama.cpp's overrides.

Each function does with the written file what the engine does, and returns bool[layer, expert] or bool[layer], what
then lies on the GPU, for the model's own layers.
"""

from __future__ import annotations

import io
import re
import shlex
from collections.abc import Sequence

import numpy as np

from moesim.errors import CheckError

GGUF_EXPERTS = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps", "ffn_gate_up_exps")
GGUF_OTHERS = ("attn_q", "ffn_gate_inp", "ffn_gate_shexp", "ffn_down_shexp", "ffn_down", "ffn_up")
MAX_OVERRIDES = 4096


def ktransformers_mask(data: bytes, *, ratio: float, moe_layers: Sequence[int], num_layers: int,
                       num_experts: int) -> np.ndarray:
    """Return the mask that sglang-kt (0.7.2, strategy ``frequency``) makes of an activation file; raises CheckError.

    Counts are summed over their first axis, the ``int(ratio * experts of MoE layers)`` largest of all layers go to the
    GPU, and dense layers are set to True.
    """
    import torch

    counts = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)["logical_count"]
    if tuple(counts.shape[1:]) != (num_layers, num_experts) or counts.ndim != 3:
        raise CheckError(f"ktransformers: counts {tuple(counts.shape)}, expected [pass, {num_layers}, {num_experts}]")
    total = counts.sum(dim=0).numpy()
    chosen = int(len(moe_layers) * num_experts * ratio)
    order = np.argsort(-total.ravel(), kind="stable")
    if 0 < chosen < total.size and total.ravel()[order[chosen - 1]] == total.ravel()[order[chosen]]:
        raise CheckError(f"ktransformers: which {chosen} experts are the most used is not decided by the counts")
    mask = np.zeros(total.size, bool)
    mask[order[:chosen]] = True
    mask = mask.reshape(total.shape)
    mask[[layer for layer in range(num_layers) if layer not in set(moe_layers)]] = True
    return mask


def rule_layers(data: bytes, *, moe_layers: Sequence[int]) -> np.ndarray:
    """Return bool[MoE layer], generated on the GPU under KTransformers' optimise rules: the first match wins."""
    from ruamel.yaml import YAML

    rules = YAML(typ="safe", pure=True).load(data.decode())
    return np.array([_device_of(f"model.layers.{layer}.mlp.experts", rules).startswith("cuda") for layer in moe_layers])


def _device_of(module: str, rules: list[dict[str, dict[str, object]]]) -> str:
    for rule in rules:
        if re.match(str(rule["match"]["name"]), module):
            kwargs = rule["replace"]["kwargs"]
            assert isinstance(kwargs, dict)
            device, op = kwargs["generate_device"], kwargs["generate_op"]
            if (device == "cpu") != (op == "KExpertsCPU"):
                raise CheckError(f"ktransformers-rules: {op} cannot run on {device}")
            return str(device)
    raise CheckError(f"ktransformers-rules: no rule for {module}")


def llama_layers(script: bytes, *, num_layers: int) -> np.ndarray:
    """Return bool[model layer], expert tensors on the GPU, under the arguments of a llama.cpp script; raises CheckError.

    As the engine: split at commas, then at the first ``=``; the first expression that is found in a tensor's name
    wins. Every expert tensor of a layer must go the same way, and no other tensor may be moved.
    """
    words = shlex.split(script.decode().splitlines()[-1])
    if words[words.index("-ngl") + 1] != "999":
        raise CheckError("llama.cpp: -ngl must put every layer on the GPU, so that overrides say what stays off it")
    overrides = [pair.split("=", 1) for place, word in enumerate(words) if word in ("-ot", "--override-tensor")
                 for pair in words[place + 1].split(",")]
    if len(overrides) > MAX_OVERRIDES or any(len(pair) != 2 or pair[1] != "CPU" for pair in overrides):
        raise CheckError(f"llama.cpp: overrides must read EXPRESSION=CPU, found {overrides}")
    return np.array([_layer_on_gpu(layer, [pair[0] for pair in overrides]) for layer in range(num_layers)])


def _layer_on_gpu(layer: int, expressions: list[str]) -> bool:
    def moved(name: str) -> bool:
        return any(re.search(expression, f"blk.{layer}.{name}.weight") for expression in expressions)

    experts = {moved(name) for name in GGUF_EXPERTS}
    if len(experts) != 1 or any(moved(name) for name in GGUF_OTHERS):
        raise CheckError(f"llama.cpp: the overrides split the tensors of layer {layer}")
    return not experts.pop()
