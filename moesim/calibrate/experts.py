"""Expert layers under forced routing: tokens x distinct experts x the largest expert's tokens, in every form and dtype."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from moesim.calibrate.bench import Bench, Call, Offer, Run, Size, turns
from moesim.calibrate.forms import Int4Expert, Int8Expert, batched_ffn, grouped_ffn, int4_weight_bytes, quantised_ffn
from moesim.calibrate.kernels import expert_ffn
from moesim.calibrate.operands import MAX_ROWS, SMALL_POOL_BYTES, Operands, pool_count
from moesim.calibrate.shapes import expert_shape
from moesim.errors import InputError
from moesim.hardware.cost import GROUPED_AXES
from moesim.hardware.profile import GROUPED_FFN, TableKey

TOKENS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512)
GROUPS = (1, 2, 4, 8, 16, 32, 64)
FEW_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
FEW_GROUPS = (1, 4, 16, 64)
GROUP_ROWS = 8  # reading an expert's weights takes about as long as computing this many rows; orders sizes only
UNSUPPORTED = (AttributeError, NotImplementedError, RuntimeError, TypeError, InputError)


def forced_sizes(tokens: Iterable[int], groups: Iterable[int], most_groups: int) -> tuple[Size, ...]:
    """Return (tokens, groups, largest group): spread evenly, halfway (in ratio), and as unevenly as can be; by rising cost."""
    sizes = set()
    for count in tokens:
        for parts in (one for one in groups if one <= min(count, most_groups)):
            even, most = -(-count // parts), count - parts + 1
            sizes |= {(count, parts, even), (count, parts, round(math.sqrt(even * most))), (count, parts, most)}
    ordered = sorted(sizes, key=lambda size: (size[0] + GROUP_ROWS * size[1], size))
    return tuple((float(count), float(parts), float(largest)) for count, parts, largest in ordered)


def forced_counts(size: Size) -> tuple[int, ...]:
    """Return rows per group of a size: the largest first, the others even."""
    tokens, groups, largest = map(int, size)
    if groups == 1:
        return (tokens,)
    rest, extra = divmod(tokens - largest, groups - 1)
    return (largest, *(rest + (place < extra) for place in range(groups - 1)))


def expert_benches(ops: Operands, kind: str, dtype: str, *, main: bool) -> Offer:
    """Return the eager loop (the form that costs are taken from), grouped GEMM and padded batches of one dtype.

    Args:
        kind: of the device, as hardware files name it. dtype: as tables name it.
        main: measure the loop on the whole grid and give it more time; else on a sparse one, as the other forms.
    """
    shape, most = expert_shape(ops.model), ops.model.num_experts
    grid = forced_sizes(TOKENS, GROUPS, most) if main else forced_sizes(FEW_TOKENS, FEW_GROUPS, most)
    few = forced_sizes(FEW_TOKENS, FEW_GROUPS, min(most, ops.count))
    padded = tuple(size for size in few if size[1] * size[2] <= MAX_ROWS)
    key = partial(TableKey, device=kind, shape=shape, dtype=dtype, axes=GROUPED_AXES)
    found = Offer([Bench(key(op=GROUPED_FFN), grid, partial(loop_call, ops), 3.0 if main else 1.0)])
    forms = (("grouped_mm", few, partial(_grouped, ops)), ("bmm", padded, partial(_batched, ops)))
    for form, sizes, prepare in forms:
        reason = refusal(lambda prepare=prepare: prepare((2.0, 2.0, 1.0)).run())  # type: ignore[misc]
        if reason:
            found.notes.append(f"{GROUPED_FFN}.{form} {dtype} is left out: torch cannot run it here: {reason}")
        else:
            found.benches.append(Bench(key(op=f"{GROUPED_FFN}.{form}"), sizes, prepare))
    return found


def refusal(run: Run) -> str:
    """Return why a kernel cannot run here, or nothing."""
    try:
        run()
    except UNSUPPORTED as error:
        return " ".join(str(error).split())[:160] or type(error).__name__
    return ""


def loop_call(ops: Operands, size: Size) -> Call:
    """Return the eager loop: one SwiGLU per distinct expert."""
    blocks = [ops.expert_rows(count) for count in forced_counts(size)]

    def run() -> None:
        for rows in blocks:
            expert_ffn(rows, ops.next_blobs(1)[0], ops.hidden, ops.width)

    return Call(run)


def _grouped(ops: Operands, size: Size) -> Call:
    import torch

    counts = forced_counts(size)
    ends = torch.tensor(counts).cumsum(0).to(device=ops.device, dtype=torch.int32)
    rows = ops.expert_rows(sum(counts)).contiguous()
    return Call(lambda: grouped_ffn(rows, ops.next_blobs(len(counts)), ends, ops.hidden, ops.width))


def _batched(ops: Operands, size: Size) -> Call:
    groups, longest = int(size[1]), int(size[2])
    rows = ops.expert_rows(groups * longest).reshape(groups, longest, ops.hidden)
    return Call(lambda: batched_ffn(rows, ops.next_blobs(groups), ops.hidden, ops.width))


def quantised_benches(ops: Operands, kind: str, dtype: str) -> Offer:
    """Return the eager loop over experts with weights of 8 and 4 bits; activations in the operands' dtype."""
    found = Offer()
    for name, make in (("int8", Int8Expert.random), ("int4", Int4Expert.random)):
        try:
            first = make(ops.hidden, ops.width, ops.dtype, ops.device, ops.generator)
            quantised_ffn(ops.expert_rows(2), first)
        except UNSUPPORTED as error:
            reason = " ".join(str(error).split())[:160] or type(error).__name__
            found.notes.append(f"{GROUPED_FFN} with {name} weights is left out: torch cannot run it here: {reason}")
        else:
            found.benches.append(_quantised_bench(ops, kind, dtype, first))
    return found


def _quantised_bench(ops: Operands, kind: str, dtype: str, first: Int8Expert | Int4Expert) -> Bench:
    weight_bytes = int4_weight_bytes(first.group) if isinstance(first, Int4Expert) else first.weight_bytes
    model = ops.model.replace(weight_bytes=weight_bytes)
    pool = [first, *(first.clone() for _ in range(pool_count(model.expert_bytes, SMALL_POOL_BYTES) - 1))]
    turn = turns(lambda place: pool[place], len(pool))
    key = TableKey(GROUPED_FFN, kind, expert_shape(model), dtype, GROUPED_AXES)
    sizes = forced_sizes(FEW_TOKENS, FEW_GROUPS, model.num_experts)
    return Bench(key, sizes, partial(_quantised_call, ops, turn))


def _quantised_call(ops: Operands, turn: Callable[[], Any], size: Size) -> Call:
    blocks = [ops.expert_rows(count).contiguous() for count in forced_counts(size)]

    def run() -> None:
        for rows in blocks:
            quantised_ffn(rows, turn())

    return Call(run)
