"""The parts of a layer that are not routed: attention over contexts, router, shared experts, dense layers, the head."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from moesim.calibrate.bench import Bench, Call, Offer, Size, turns
from moesim.calibrate.experts import TOKENS
from moesim.calibrate.kernels import expert_ffn, make_attention, router_topk
from moesim.calibrate.operands import Operands, copies_to_be_cold, dtype_bytes
from moesim.calibrate.shapes import attention_shape, dense_shape, head_shape, router_shape, shared_shape
from moesim.hardware.profile import TableKey

CONTEXTS = (64, 256, 1024, 4096)
ATTENTION_TOKENS = TOKENS[:-1:2]
HEAD_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128)
PROJECTION_TOKENS = 64  # projecting a token takes about as long as attending to this many cached ones; orders sizes only


def dense_benches(ops: Operands, kind: str, dtype: str) -> Offer:
    """Return the parts that the model has; attention of another kind than grouped-query has no kernel here."""
    model = ops.model
    found = Offer([_router(ops, kind, dtype), _head(ops, kind, dtype)])
    if model.attention.kind == "gqa":
        found.benches.append(_attention(ops, kind, dtype))
    else:
        found.notes.append(f"attention {dtype} is left out: the kernel is grouped-query attention, {model.name!r} has "
                           f"{model.attention.kind!r}")
    parts = (("shared_expert", shared_shape(model), model.shared_intermediate_size),
             ("dense", dense_shape(model), model.dense_intermediate_size))
    found.benches += [_feed_forward(ops, TableKey(op, kind, shape, dtype, ("tokens",)), width)
                      for op, shape, width in parts if width]
    return found


def _by_tokens(tokens: Iterable[int]) -> tuple[Size, ...]:
    return tuple((float(count),) for count in tokens)


def _attention(ops: Operands, kind: str, dtype: str) -> Bench:
    layers = [make_attention(ops.model, max(CONTEXTS), ops.device, ops.dtype, ops.generator) for _ in range(4)]
    pairs = [(tokens, tokens * context) for tokens in ATTENTION_TOKENS for context in CONTEXTS]
    pairs.sort(key=lambda pair: pair[1] + PROJECTION_TOKENS * pair[0])
    key = TableKey("attention", kind, attention_shape(ops.model), dtype, ("tokens", "context"))

    def prepare(size: Size) -> Call:
        tokens, context = map(int, size)
        rows = ops.token_rows(tokens)
        return Call(turns(lambda place: layers[place].forward(rows, context), len(layers)))

    return Bench(key, tuple((float(tokens), float(context)) for tokens, context in pairs), prepare)


def _router(ops: Operands, kind: str, dtype: str) -> Bench:
    model = ops.model
    key = TableKey("router", kind, router_shape(model), dtype, ("tokens",))
    return _of_weights(ops, key, TOKENS, (model.num_experts, model.hidden_size),
                       lambda rows, weight: router_topk(rows, weight, model.top_k))


def _head(ops: Operands, kind: str, dtype: str) -> Bench:
    model = ops.model
    key = TableKey("head", kind, head_shape(model), dtype, ("tokens",))
    return _of_weights(ops, key, HEAD_TOKENS, (model.vocab_size, model.hidden_size), lambda rows, weight: rows @ weight.T)


def _feed_forward(ops: Operands, key: TableKey, width: int) -> Bench:
    hidden = ops.model.hidden_size
    return _of_weights(ops, key, TOKENS, (3 * hidden * width,), partial(_swiglu, hidden, width))


def _swiglu(hidden: int, width: int, rows: Any, blob: Any) -> Any:
    return expert_ffn(rows, blob, hidden, width)


def _of_weights(ops: Operands, key: TableKey, tokens: Iterable[int], shape: tuple[int, ...],
                run: Callable[[Any, Any], object]) -> Bench:
    """Return a benchmark of rows times a weight of this shape, several of which rotate."""
    weights = list(_weights(ops, shape))

    def prepare(size: Size) -> Call:
        rows = ops.token_rows(int(size[0]))
        return Call(turns(lambda place: run(rows, weights[place]), len(weights)))

    return Bench(key, _by_tokens(tokens), prepare)


def _weights(ops: Operands, shape: tuple[int, ...]) -> Iterator[Any]:
    size = 1
    for part in shape:
        size *= part
    for _ in range(copies_to_be_cold(size * dtype_bytes(ops.dtype_name))):
        yield ops.random(*shape).mul_(ops.model.hidden_size**-0.5)
