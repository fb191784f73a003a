"""Forward passes from a trace: closed-loop continuous batching, a fixed number of requests at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from moesim.errors import InputError
from moesim.traces.trace import DECODE, DENOISE, PHASES, PREFILL, RoutingTrace

_MAX_REQUEST_ID = np.iinfo(np.int32).max


@dataclass(frozen=True)
class Step:
    """One forward pass of a batch.

    Attributes:
        index: 0, 1, ... in order of execution.
        phase: one of ``prefill``, ``decode``, ``denoise``.
        rows: int64[token], indexes into the trace; rows of one request adjoin, in position order.
        requests: int32[token], the request of each row.
    """

    index: int
    phase: str
    rows: np.ndarray
    requests: np.ndarray

    @property
    def num_tokens(self) -> int:
        """Number of tokens in the pass."""
        return len(self.rows)


@dataclass
class Request:
    """An admitted request: its passes ``(phase, rows)``, of which those from `cursor` on are to come."""

    request_id: int
    passes: list[tuple[int, np.ndarray]]
    cursor: int = 0

    @property
    def done(self) -> bool:
        """Whether no pass is left."""
        return self.cursor >= len(self.passes)

    @property
    def next_phase(self) -> int | None:
        """The phase of the next pass, None after the last."""
        return None if self.done else self.passes[self.cursor][0]

    @property
    def next_row(self) -> int:
        """The row of the token that it decodes next."""
        return int(self.passes[self.cursor][1][0])

    def pop(self) -> np.ndarray:
        """Return the rows of the next pass and go on."""
        self.cursor += 1
        return self.passes[self.cursor - 1][1]


def closed_loop_steps(trace: RoutingTrace, *, batch_size: int, max_steps: int | None = None,
                      include_prefill: bool = True, max_prefill_tokens: int = 8192, repeat: bool = False,
                      seed: int = 0) -> list[Step]:
    """Return the passes of a server that keeps `batch_size` requests active (continuous batching).

    A newly admitted request's prompt goes into a prefill pass, several prompts together up to
    `max_prefill_tokens` (a longer prompt is cut); then every active request decodes one token per
    decode pass (one denoising step per denoise pass). A request that ends makes room for the next,
    in an order shuffled by `seed`. Prefill goes before decode, as in Orca (Yu et al., OSDI 2022)
    and in vLLM without chunked prefill. Without `max_steps` every row comes exactly once.

    Args:
        max_steps: stop after so many passes of any phase.
        include_prefill: False leaves prompts out: requests enter at their first decode token.
        repeat: when the requests run out, start again with a copy under new ids
            (request_id + copy * (largest id + 1)); needs `max_steps`.

    Raises:
        InputError: a size below 1, `repeat` without `max_steps`, or nothing left to run.
    """
    check_loop(batch_size, max_steps, max_prefill_tokens, repeat)
    queue = waiting_requests(trace, include_prefill, repeat, seed)
    steps: list[Step] = []
    for phase, parts in _passes(queue, batch_size, max_prefill_tokens):
        if max_steps is not None and len(steps) >= max_steps:
            break
        rows = np.concatenate([rows for _, rows in parts])
        ids = np.repeat(np.array([request for request, _ in parts], dtype=np.int32),
                        [len(rows) for _, rows in parts])
        steps.append(Step(len(steps), PHASES[phase], rows, ids))
    if not steps:
        raise InputError("the trace has only prefill rows and include_prefill is off: no step is left")
    return steps


def check_loop(batch_size: int, max_steps: int | None, max_prefill_tokens: int, repeat: bool) -> None:
    """Raise InputError for sizes below 1, or a loop without an end."""
    sizes = {"batch_size": batch_size, "max_steps": max_steps, "max_prefill_tokens": max_prefill_tokens}
    for name, value in sizes.items():
        if value is not None and value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    if repeat and max_steps is None:
        raise InputError("repeat needs max_steps: a trace that starts again never ends")


def waiting_requests(trace: RoutingTrace, include_prefill: bool, repeat: bool, seed: int) -> Iterator[Request]:
    """Yield the requests in their shuffled order, over and over with new ids when `repeat`."""
    rows = np.arange(trace.num_tokens)
    if not include_prefill:
        rows = rows[trace.phase != PREFILL]
    rows = rows[np.argsort(trace.request_id[rows], kind="stable")]
    if not len(rows):
        return
    cuts = np.flatnonzero(np.diff(trace.request_id[rows])) + 1
    requests = np.split(rows, cuts)
    order = np.random.default_rng(seed).permutation(len(requests))
    stride = int(trace.request_id.max()) + 1
    copy = 0
    while copy == 0 or repeat:
        for index in order:
            own = requests[index]
            yield Request(_copied_id(int(trace.request_id[own[0]]), copy, stride), _split_passes(trace, own))
        copy += 1


def _copied_id(request_id: int, copy: int, stride: int) -> int:
    copied = request_id + copy * stride
    if copied > _MAX_REQUEST_ID:
        raise InputError(f"request {request_id}, copy {copy}: its id {copied} does not fit int32; "
                         f"number the requests from 0")
    return copied


def _split_passes(trace: RoutingTrace, rows: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """Split a request's rows: a prompt whole, one decode token each, one denoising step each."""
    phase, step = trace.phase[rows], trace.step[rows]
    starts = (phase[1:] != phase[:-1]) | (phase[1:] == DECODE)
    starts |= (phase[1:] == DENOISE) & (step[1:] != step[:-1])
    return [(int(trace.phase[part[0]]), part) for part in np.split(rows, np.flatnonzero(starts) + 1)]


def _passes(queue: Iterator[Request], batch_size: int,
            max_prefill_tokens: int) -> Iterator[tuple[int, list[tuple[int, np.ndarray]]]]:
    """Yield (phase, [(request, rows)]) in order of execution."""
    active: list[Request] = []
    while True:
        active = [request for request in active if not request.done]
        while len(active) < batch_size and (new := next(queue, None)) is not None:
            active.append(new)
        if not active:
            return
        prompts = [(r.request_id, r.pop()) for r in active if r.next_phase == PREFILL]
        for parts in pack_prompts(prompts, max_prefill_tokens):
            yield PREFILL, parts
        if prompts:
            continue  # a request that was only a prompt has made room
        ready = {phase: [r for r in active if r.next_phase == phase] for phase in (DECODE, DENOISE)}
        for phase, members in ready.items():
            if members:
                yield phase, [(r.request_id, r.pop()) for r in members]


def pack_prompts(prompts: list[tuple[int, np.ndarray]], limit: int) -> Iterator[list[tuple[int, np.ndarray]]]:
    """Put prompts together in order while they fit in `limit` tokens; cut one that is longer alone."""
    batch: list[tuple[int, np.ndarray]] = []
    used = 0
    for request, rows in prompts:
        if batch and used + len(rows) > limit:
            yield batch
            batch, used = [], 0
        for start in range(0, len(rows), limit):
            if used == limit:
                yield batch
                batch, used = [], 0
            piece = rows[start:start + limit]
            batch.append((request, piece))
            used += len(piece)
    if batch:
        yield batch
