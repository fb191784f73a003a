"""Expert-aware batches: which of the waiting decode tokens share a pass (Read-ME, ExpertFlow), against arrival order.

Both need to know a token's experts before it runs: exactly so where the router is decoupled from the layers (Read-ME), by
prediction in ExpertFlow. Here the trace's own routing is that knowledge, so these batches are those of a perfect predictor.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from moesim.errors import InputError, unknown
from moesim.traces.steps import Request, Step, check_loop, pack_prompts, waiting_requests
from moesim.traces.trace import DECODE, DENOISE, PHASES, PREFILL, RoutingTrace

MAX_ROUNDS = 20

# What a batcher is given: the trace, the row of each waiting token in order of arrival, the most tokens of a pass. It
# returns passes, each a list of places in `rows`; what it leaves out goes on waiting.
Batcher = Callable[[RoutingTrace, np.ndarray, int], list[list[int]]]


def arrival_order(trace: RoutingTrace, rows: np.ndarray, budget: int) -> list[list[int]]:
    """The tokens that have waited longest."""
    del trace
    return [list(range(min(budget, len(rows))))]


def longest_queues(trace: RoutingTrace, rows: np.ndarray, budget: int) -> list[list[int]]:
    """Read-ME's batches (NeurIPS 2024, arXiv 2410.19123): one queue per expert, the longest first.

    A queue that fits in what is left of the budget is taken whole, and the next longest is looked at; one that does not
    fills the budget with its head. Of equal queues the lower expert goes first. Read-ME's models give a token the same
    expert in every layer; elsewhere a token queues for the heaviest expert of its first layer.
    """
    queues: dict[int, deque[int]] = defaultdict(deque)
    for place, expert in enumerate(_first_expert(trace, rows).tolist()):
        queues[expert].append(place)
    taken: list[int] = []
    for _, queue in sorted(queues.items(), key=lambda item: (-len(item[1]), item[0])):
        left = budget - len(taken)
        taken += [queue.popleft() for _ in range(min(left, len(queue)))]
        if queue or len(taken) == budget:
            break
    return [taken]


def similar_paths(trace: RoutingTrace, rows: np.ndarray, budget: int) -> list[list[int]]:
    """ExpertFlow's token scheduler (arXiv 2410.17954, DAC 2026): two adjacent batches regrouped by balanced 2-means.

    The tokens of two batches are points in {0, 1}^(layers x experts); distance is the share of places in which they
    differ. The two halves of the arrival order are the first clusters; then each token's preference for one mean over the
    other is ranked, and the first half goes there, until nothing changes. The better of start and end is kept, by the
    experts that both batches read together (the paper minimises that sum; it does not say what happens when the
    clusters read more).
    """
    rows = rows[: 2 * budget]
    if len(rows) <= budget:
        return [list(range(len(rows)))]
    paths, half = _paths(trace, rows), (len(rows) + 1) // 2
    first = np.arange(len(rows)) < half
    best, least = first, _experts_read(paths, first)
    for _ in range(MAX_ROUNDS):
        means = [paths[first].mean(axis=0), paths[~first].mean(axis=0)]
        lean = ((paths - means[0]) ** 2).sum(axis=1) - ((paths - means[1]) ** 2).sum(axis=1)
        moved = np.zeros(len(rows), bool)
        moved[np.argsort(lean, kind="stable")[:half]] = True
        if np.array_equal(moved, first):
            break
        first, read = moved, _experts_read(paths, moved)
        if read < least:
            best, least = moved, read
    return [np.flatnonzero(best).tolist(), np.flatnonzero(~best).tolist()]


BATCHERS: dict[str, Batcher] = {"fifo": arrival_order, "read-me": longest_queues, "expertflow": similar_paths}


def batched_steps(trace: RoutingTrace, batcher: str, *, batch_size: int, waiting: int, max_steps: int | None = None,
                  include_prefill: bool = True, max_prefill_tokens: int = 8192, repeat: bool = False,
                  seed: int = 0) -> list[Step]:
    """Return the passes of a server that keeps ``batch_size + waiting`` requests active and runs `batch_size` at once.

    Requests enter, leave and prefill as in `steps.closed_loop_steps`; which of the waiting tokens share a decode pass is
    the batcher's choice. A request that was not chosen keeps its place in the order of arrival.

    Args:
        batcher: ``fifo``, ``read-me`` or ``expertflow``. waiting: requests beyond a pass, at least 1.

    Raises:
        InputError: an unknown batcher, a size below 1, a trace with denoising passes, `repeat` without `max_steps`, or
            nothing left to run.
    """
    if batcher not in BATCHERS:
        raise unknown("batcher", batcher, BATCHERS)
    if waiting < 1:
        raise InputError(f"waiting must be at least 1, got {waiting}: without waiting tokens there is nothing to choose")
    check_loop(batch_size, max_steps, max_prefill_tokens, repeat)
    if np.any(trace.phase == DENOISE):
        raise InputError("expert-aware batches are of decode tokens; this trace has denoising passes")
    steps: list[Step] = []
    for phase, parts in _passes(trace, BATCHERS[batcher], batch_size, waiting, max_prefill_tokens,
                                waiting_requests(trace, include_prefill, repeat, seed)):
        if max_steps is not None and len(steps) >= max_steps:
            break
        ids = np.repeat(np.array([request for request, _ in parts], np.int32), [len(rows) for _, rows in parts])
        steps.append(Step(len(steps), PHASES[phase], np.concatenate([rows for _, rows in parts]), ids))
    if not steps:
        raise InputError("the trace has only prefill rows and include_prefill is off: no step is left")
    return steps


def experts_per_pass(trace: RoutingTrace, steps: Sequence[Step]) -> float:
    """Return the mean number of distinct experts that a layer of a decode pass reads."""
    decode = [step for step in steps if step.phase == PHASES[DECODE]]
    if not decode:
        raise InputError("there is no decode pass")
    read = [_paths(trace, step.rows).any(axis=0).sum() for step in decode]
    return float(np.mean(read)) / trace.num_layers


def _passes(trace: RoutingTrace, choose: Batcher, batch_size: int, waiting: int, max_prefill_tokens: int,
            queue: Iterator[Request]) -> Iterator[tuple[int, list[tuple[int, np.ndarray]]]]:
    """Yield (phase, [(request, rows)]) in order of execution."""
    active: list[Request] = []
    while True:
        active = [request for request in active if not request.done]
        while len(active) < batch_size + waiting and (new := next(queue, None)) is not None:
            active.append(new)
        if not active:
            return
        prompts = [(r.request_id, r.pop()) for r in active if r.next_phase == PREFILL]
        for parts in pack_prompts(prompts, max_prefill_tokens):
            yield PREFILL, parts
        if prompts:
            continue
        rows = np.array([request.next_row for request in active])
        chosen = choose(trace, rows, batch_size)
        for places in chosen:
            yield DECODE, [(active[place].request_id, active[place].pop()) for place in places]
        ran = {place for places in chosen for place in places}
        active = [r for place, r in enumerate(active) if place not in ran] + [active[place] for place in sorted(ran)]


def _first_expert(trace: RoutingTrace, rows: np.ndarray) -> np.ndarray:
    """int[row]: the expert of the first layer with the largest gate weight, else the first one named."""
    experts = trace.expert_ids[rows, 0]
    if trace.gate_weights is None:
        return experts[:, 0]
    heaviest = np.where(experts >= 0, trace.gate_weights[rows, 0], -1.0).argmax(axis=1)
    return experts[np.arange(len(rows)), heaviest]


def _paths(trace: RoutingTrace, rows: np.ndarray) -> np.ndarray:
    """float32[row, layer * expert]: 1 where a token uses an expert."""
    ids = trace.expert_ids[rows].astype(np.int64)
    paths = np.zeros((len(rows), trace.num_layers, trace.num_experts + 1), np.float32)
    np.put_along_axis(paths, ids, 1.0, axis=2)  # padding, -1: the last column
    return paths[:, :, :-1].reshape(len(rows), -1)


def _experts_read(paths: np.ndarray, first: np.ndarray) -> int:
    return int(paths[first].any(axis=0).sum() + paths[~first].any(axis=0).sum())
