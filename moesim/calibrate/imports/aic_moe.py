"""aiconfigurator's ``moe_perf`` as ``grouped_ffn`` over (tokens, groups, largest_group).

A row says how many tokens of how many experts and top-k, and a distribution's name, not the counts per expert.

``balanced`` is a rule without chance, so the counts follow (`balanced_counts`). With expert parallelism the row is
one rank's: the one with the first experts / ep experts, which gets what the rule gives those (`rank0`). A token's row
here is one (token, expert) pair; `tokens` is their number, `groups` the experts with any, `largest_group` the most.

``power_law_*`` is drawn at random and the draw is not in the table: such rows are left out.

That a table holds what its distribution says is checked against physics: the distinct experts' weights cannot be read
faster than the memory delivers them. Where one row is faster (routers with limited groups, kernels that skip experts,
experts of two matrices read as three), no row of this shape and kernel is used.
"""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from moesim.calibrate.imports.aic_files import Gpu, read_table
from moesim.calibrate.imports.base import Findings, TableKey, seconds_from_ms, work_dtype
from moesim.calibrate.shapes import expert_shape
from moesim.errors import InputError, unknown
from moesim.hardware.cost import GROUPED_AXES
from moesim.model.spec import ModelSpec
from moesim.units import MIB

if TYPE_CHECKING:
    import pandas as pd

# bytes per weight, scales included: fp4 with one byte per 16 (nvfp4) or 32 (mxfp4), int4 with two bytes per 128
WEIGHT_BYTES = {"float16": 2.0, "bfloat16": 2.0, "fp8": 1.0, "fp8_block": 1.0, "nvfp4": 0.5625, "int4_wo": 0.515625,
                "w4a16_mxfp4": 0.53125, "w4a8_mxfp4_mxfp8": 0.53125}
EXPERT_PARALLEL = ("rank0", "off")
NOT_GATED = "nongated"
# what may stay in caches from one run to the next; more than the largest second-level cache of the GPUs in the tables
CACHE_BYTES = 256 * MIB
MAX_TOKENS = 1 << 18
_NUMBERS = ("num_tokens", "hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size", "moe_ep_size", "latency")
_WORDS = ("framework", "version", "device", "kernel_source", "moe_dtype", "distribution")


@cache
def balanced_counts(tokens: int, num_experts: int, top_k: int) -> npt.NDArray[np.int64] | None:
    """Return int64[expert], the tokens of every expert by the collector's rule ``balanced``; None if it names one twice.

    With ``stride = ceil(experts / k)`` choice j of token t is expert ``(t + j stride) mod experts`` from `stride` tokens
    on, and ``(floor(t stride / tokens) + j stride) mod experts`` below (aiconfigurator, collector/helper.py).
    """
    stride = math.ceil(num_experts / top_k)
    token = np.arange(tokens, dtype=np.int64)
    start = token if tokens >= stride else token * stride // tokens
    chosen = (start[:, None] + stride * np.arange(top_k, dtype=np.int64)) % num_experts
    ordered = np.sort(chosen, axis=1)
    if (ordered[:, 1:] == ordered[:, :-1]).any():
        return None
    return np.bincount(chosen.ravel(), minlength=num_experts)


def balanced_size(tokens: int, num_experts: int, top_k: int, ep_size: int) -> tuple[int, int, int] | None:
    """Return (tokens, groups, largest_group) of the rank with the first experts; None where the rule does not say."""
    counts = balanced_counts(tokens, num_experts, top_k)
    if counts is None or num_experts % ep_size:
        return None
    own = counts[:num_experts // ep_size]
    return int(own.sum()), int((own > 0).sum()), int(own.max())


def add_experts(found: Findings, gpu: Gpu, model: ModelSpec, *, moe_dtype: str | None, kernel: str | None,
                expert_parallel: str, moe_tp: int) -> None:
    """Add the routed experts of a model; see the module for the rules.

    Raises:
        InputError: an unknown option value, several dtypes or kernels of which none is named, a damaged table.
    """
    if expert_parallel not in EXPERT_PARALLEL:
        raise unknown("expert_parallel", expert_parallel, EXPERT_PARALLEL)
    path = gpu.engine_table("moe_perf")
    if path is None:
        raise InputError(f"{gpu.folder}: no moe_perf of {gpu.engine} {gpu.engine_version}")
    rows = _of_shape(read_table(path, _NUMBERS, _WORDS), model, moe_tp)
    if rows.empty:
        found.left_out[f"moe_perf: no rows of {_shape_words(model, moe_tp)}"] += 1
        return
    dtype = _moe_dtype(rows, model, moe_dtype)
    rows = rows[rows["moe_dtype"] == dtype]
    rows = _of_kernel(rows, model, kernel)
    found.files.append(path)
    found.facts |= {"device": rows["device"].iloc[0], "framework": f"{gpu.engine} {gpu.engine_version}",
                    "moe_kernel": rows["kernel_source"].iloc[0], "moe_dtype": dtype}
    found.facts["moe_tp"] = moe_tp
    _add_rows(found, gpu, as_measured(model, dtype, moe_tp), _spread_known(found, rows, expert_parallel))


def as_measured(model: ModelSpec, moe_dtype: str, moe_tp: int) -> ModelSpec:
    """Return the model with its experts stored in a table's dtype and cut over `moe_tp` ranks."""
    width = model.expert_intermediate_size // moe_tp
    return model.replace(weight_bytes=WEIGHT_BYTES[moe_dtype], expert_intermediate_size=width)


def _spread_known(found: Findings, rows: pd.DataFrame, expert_parallel: str) -> pd.DataFrame:
    """Return the rows whose tokens per expert follow from the table; note the others."""
    for name, count in rows["distribution"].value_counts().items():
        if name != "balanced":
            found.left_out[f"moe_perf, distribution {name}: tokens per expert are not in the table"] += int(count)
    rows = rows[rows["distribution"] == "balanced"]
    if expert_parallel == "off":
        several = rows["moe_ep_size"] > 1
        found.left_out["moe_perf, moe_ep_size above 1: switched off"] += int(several.sum())
        rows = rows[~several]
    return rows


def _add_rows(found: Findings, gpu: Gpu, spec: ModelSpec, rows: pd.DataFrame) -> None:
    sized = []
    for tokens, ep_size, latency in rows[["num_tokens", "moe_ep_size", "latency"]].itertuples(index=False):
        possible = 1 <= tokens <= MAX_TOKENS and ep_size >= 1
        size = balanced_size(int(tokens), spec.num_experts, spec.top_k, int(ep_size)) if possible else None
        if size is None:
            found.left_out["moe_perf, balanced: the rule does not say who gets which token at this size"] += 1
        else:
            sized.append((size, seconds_from_ms(float(latency))))
    reason = _impossible(sized, spec, gpu.memory_bytes_per_s())
    if reason:
        found.left_out[reason] += len(sized)
        return
    key = TableKey("grouped_ffn", "gpu", expert_shape(spec), work_dtype(spec), GROUPED_AXES)
    for size, seconds in sized:
        found.add(key, size, seconds, f"{gpu.folder}: moe_perf")
    found.notes.append("grouped_ffn: tokens, groups and largest group of the rank with the first experts, by the rule "
                       "'balanced'; a time is the engine's whole MoE operator (permute, kernels, combine; TensorRT-LLM: "
                       "router too), run again and again, so small weights may lie in caches")


def _impossible(sized: list[tuple[tuple[int, int, int], float]], spec: ModelSpec, bytes_per_s: float) -> str | None:
    """Return why these rows cannot be what they say, if one is faster than its weights can be read."""
    worst, words = 1.0, None
    for (_, groups, _), seconds in sized:
        least = (groups * spec.expert_bytes - CACHE_BYTES) / bytes_per_s
        if least > 0 and seconds / least < worst:
            worst = seconds / least
            words = (f"moe_perf, balanced: {seconds:.3g} s to read {groups} experts of {spec.expert_bytes} bytes, which "
                     f"take the memory {least:.3g} s at least: fewer were read than the table says")
    return words


def _of_shape(rows: pd.DataFrame, model: ModelSpec, moe_tp: int) -> pd.DataFrame:
    if moe_tp < 1 or model.expert_intermediate_size % moe_tp:
        raise InputError(f"moe_tp {moe_tp} does not divide the experts' width {model.expert_intermediate_size}")
    wanted = {"hidden_size": model.expert_width, "inter_size": model.expert_intermediate_size, "topk": model.top_k,
              "num_experts": model.num_experts, "moe_tp_size": moe_tp}
    for column, value in wanted.items():
        rows = rows[rows[column] == value]
    return rows


def _shape_words(model: ModelSpec, moe_tp: int) -> str:
    return (f"top-{model.top_k} of {model.num_experts} experts, hidden {model.expert_width}, width "
            f"{model.expert_intermediate_size}, moe_tp {moe_tp}")


def _moe_dtype(rows: pd.DataFrame, model: ModelSpec, wanted: str | None) -> str:
    there = sorted(set(rows["moe_dtype"]))
    if wanted is not None:
        if wanted not in there or wanted not in WEIGHT_BYTES:
            raise unknown("moe_dtype of this shape", wanted, [name for name in there if name in WEIGHT_BYTES])
        return wanted
    fitting = [name for name in there if WEIGHT_BYTES.get(name) == model.weight_bytes]
    if len(fitting) != 1:
        found = f"fits {' and '.join(fitting)}" if fitting else "fits none"
        raise InputError(f"model {model.name!r}: {model.weight_bytes:g} bytes per weight {found} of the table's "
                         f"{', '.join(there)}: choose with moe_dtype=...")
    return fitting[0]


def _of_kernel(rows: pd.DataFrame, model: ModelSpec, wanted: str | None) -> pd.DataFrame:
    """Return the rows of one kernel; one that says it has no gate fits only experts without."""
    there = [name for name in sorted(set(rows["kernel_source"])) if not (NOT_GATED in name and model.gated)]
    if wanted is not None and wanted not in there:
        raise unknown("kernel of this shape and dtype", wanted, there)
    if wanted is None and len(there) != 1:
        raise InputError(f"{len(there)} kernels for this shape and dtype ({', '.join(there)}): choose with kernel=...")
    return rows[rows["kernel_source"] == (wanted or there[0])]
