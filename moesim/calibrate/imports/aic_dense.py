"""aiconfigurator's ``gemm_perf`` and ``generation_attention_perf``: matrix products, and decode attention with its projections.

moesim's ``attention`` is a layer's projections and its attention kernel. The tables hold them apart, so its time is
the sum of three measured ones at the same batch: query-key-value product, kernel, output product; rotary
embedding and norms are not in it. Each part must be there at exactly this size; nothing is interpolated.

Prompts (``context_attention_perf``) are left out: their cached keys are read once for many rows, decode's once per
row, and one table over (tokens, context) cannot hold both. Latent attention is left out: its module tables are
keyed by a model's name, not by sizes.
"""

from __future__ import annotations

from moesim.calibrate.imports.aic_files import Gpu, read_table
from moesim.calibrate.imports.base import Findings, TableKey, seconds_from_ms, work_dtype
from moesim.calibrate.shapes import attention_shape
from moesim.model.spec import ModelSpec

_GEMM_NUMBERS, _GEMM_WORDS = ("m", "n", "k", "latency"), ("kernel_source", "gemm_dtype")
_NUMBERS = ("batch_size", "isl", "num_heads", "num_key_value_heads", "head_dim", "window_size", "beam_width", "step", "latency")
_WORDS = ("kernel_source", "attn_dtype", "kv_cache_dtype")
PLAIN = "bfloat16"
Products = dict[int, float]


def add_dense(found: Findings, gpu: Gpu, model: ModelSpec) -> None:
    """Add ``gemm`` tables over (tokens) of the model's projections, and ``attention`` over (tokens, context).

    Raises:
        InputError: a damaged table, or several versions of one.
    """
    attention = model.attention
    if attention.kind != "gqa" or model.mixer_params:
        found.left_out[f"attention of kind {attention.kind!r}: not in tables that are keyed by sizes"] += 1
        return
    if model.other_weight_bytes != 2 or model.activation_bytes != 2:
        found.left_out["attention: weights outside the experts are not bfloat16, which products of the table it takes "
                       "is not known"] += 1
        return
    inner, outer = attention.num_heads * attention.head_dim, model.hidden_size
    keys = 2 * attention.num_kv_heads * attention.head_dim
    products = _gemms(found, gpu, [(inner + keys, outer), (outer, inner)], work_dtype(model))
    kernel = _decode(found, gpu, model)
    if len(products) == 2 and kernel:
        _add_attention(found, gpu, model, products, kernel)


def _add_attention(found: Findings, gpu: Gpu, model: ModelSpec, products: list[Products],
                   kernel: dict[tuple[int, int], float]) -> None:
    key = TableKey("attention", "gpu", attention_shape(model), work_dtype(model), ("tokens", "context"))
    for (batch, context), seconds in kernel.items():
        if all(batch in product for product in products):
            total = seconds + sum(product[batch] for product in products)
            found.add(key, (batch, batch * context), total, f"{gpu.folder}: attention")
        else:
            found.left_out["attention: no product of this batch"] += 1
    found.notes.append("attention: the sum of two measured products and the measured kernel; norms and rotary embedding "
                       "are not in it; one request per row, each with context / tokens cached tokens")


def _gemms(found: Findings, gpu: Gpu, shapes: list[tuple[int, int]], dtype: str) -> list[Products]:
    """Return seconds by rows for each (n, k) that the table has; also as tables."""
    path = gpu.engine_table("gemm_perf")
    if path is None:
        found.left_out[f"gemm_perf: none of {gpu.engine} {gpu.engine_version}"] += 1
        return []
    rows = read_table(path, _GEMM_NUMBERS, _GEMM_WORDS)
    rows = rows[rows["gemm_dtype"] == PLAIN]
    products = []
    for n, k in shapes:
        part = rows[(rows["n"] == n) & (rows["k"] == k)]
        if part.empty or part["kernel_source"].nunique() > 1:
            found.left_out[f"gemm_perf: no product n {n}, k {k} of one kernel in {PLAIN}"] += 1
            continue
        for m, latency in part[["m", "latency"]].itertuples(index=False):
            found.add(TableKey("gemm", "gpu", f"n{n}.k{k}", dtype, ("tokens",)), (m,), seconds_from_ms(latency), str(path))
        products.append({int(m): seconds_from_ms(float(value)) for m, value in part.groupby("m")["latency"].median().items()})
    if products:
        found.files.append(path)
    return products


def _decode(found: Findings, gpu: Gpu, model: ModelSpec) -> dict[tuple[int, int], float]:
    """Return seconds by (batch, tokens that each row attends to)."""
    path = gpu.engine_table("generation_attention_perf")
    if path is None:
        found.left_out[f"generation_attention_perf: none of {gpu.engine} {gpu.engine_version}"] += 1
        return {}
    a = model.attention
    wanted = {"num_heads": a.num_heads, "num_key_value_heads": a.num_kv_heads, "head_dim": a.head_dim, "window_size": 0,
              "beam_width": 1, "isl": 1, "attn_dtype": PLAIN, "kv_cache_dtype": PLAIN}
    rows = read_table(path, _NUMBERS, _WORDS)
    for column, value in wanted.items():
        rows = rows[rows[column] == value]
    if rows.empty or rows["kernel_source"].nunique() > 1:
        found.left_out[f"generation_attention_perf: no rows of one kernel for {a.num_heads} heads, {a.num_kv_heads} of "
                       f"keys, width {a.head_dim}, in {PLAIN}"] += 1
        return {}
    found.files.append(path)
    found.facts["attention_kernel"] = rows["kernel_source"].iloc[0]
    medians = rows.groupby(["batch_size", "step"])["latency"].median()
    # `step` tokens are in the cache, and the new one
    return {(int(batch), int(step) + 1): seconds_from_ms(float(value)) for (batch, step), value in medians.items()}
