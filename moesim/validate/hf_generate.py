"""Greedy generation with its logits and routing kept, by the plain model and by the offloaded one alike."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from moesim.errors import CheckError
from moesim.traces.capture_generate import Generation, Request, RequestRun, Settings
from moesim.traces.capture_hooks import PassRouting
from moesim.traces.steps import Step
from moesim.traces.trace import DECODE, PHASES, PREFILL, RoutingTrace


@dataclass(frozen=True)
class Generated:
    """What a model generated, request after request, one forward pass after the other.

    Attributes:
        tokens: per request the generated token ids. logits: per pass torch[vocabulary], of the last token.
        trace, steps: the routing, and the passes as rows of it. start_ns, end_ns: of the whole, by `time.perf_counter_ns`.
    """

    tokens: tuple[tuple[int, ...], ...]
    logits: tuple[Any, ...]
    trace: RoutingTrace
    steps: tuple[Step, ...]
    start_ns: int
    end_ns: int

    @property
    def num_tokens(self) -> int:
        """Number of generated tokens."""
        return sum(map(len, self.tokens))


class Recorder(Protocol):
    """What records the routing of each pass: a `RouterRecorder`, or the offloaded model itself."""

    layer_ids: list[int]
    num_experts: int

    def attached(self) -> AbstractContextManager[Any]:
        """Hook in."""

    def take(self) -> PassRouting:
        """Return the routing of the last pass."""


def generate(model: Any, recorder: Recorder, requests: Sequence[Request], new_tokens: int) -> Generated:
    """Generate `new_tokens` for each request alone, greedily, without stopping early."""
    import torch

    settings = Settings(max_new_tokens=new_tokens, seed=0, temperature=0.0, stop_at_eos=False)
    logits: list[Any] = []
    handle = model.register_forward_hook(lambda _, args, output: logits.append(output.logits[0, -1].clone()))
    try:
        with torch.inference_mode(), recorder.attached():
            generation = Generation(model, recorder, settings)  # type: ignore[arg-type]
            start = time.perf_counter_ns()
            runs = [generation.run([request])[0] for request in requests]
            end = time.perf_counter_ns()
    finally:
        handle.remove()
    lasts = [int(logits[(place + 1) * new_tokens - 1].float().argmax()) for place in range(len(runs))]
    tokens = tuple((*run.fed[run.prompt_tokens :], last) for run, last in zip(runs, lasts, strict=True))
    trace = _trace(runs, recorder, type(model).__name__)
    return Generated(tokens, tuple(logits), trace, _steps(trace), start, end)


def _trace(runs: Sequence[RequestRun], recorder: Recorder, name: str) -> RoutingTrace:
    joined = [run.joined() for run in runs]
    lengths = [len(run.fed) for run in runs]
    position = np.concatenate([np.arange(length) for length in lengths])
    prompt = np.repeat([run.prompt_tokens for run in runs], lengths)
    steps = [run.steps() for run in runs]
    first = np.cumsum([0, *(int(own[-1]) + 1 for own in steps[:-1])])
    weights = [part.weights for part in joined if part.weights is not None]
    return RoutingTrace(
        expert_ids=np.concatenate([part.ids for part in joined]),
        gate_weights=np.concatenate(weights) if len(weights) == len(joined) else None,
        request_id=np.repeat([run.request_id for run in runs], lengths),
        position=position,
        phase=np.where(position < prompt, PREFILL, DECODE),
        step=np.concatenate([own + start for own, start in zip(steps, first, strict=True)]),
        num_experts=recorder.num_experts,
        layer_ids=np.array(recorder.layer_ids),
        token_id=np.concatenate([run.fed for run in runs]),
        model=name,
        source=f"captured from {name} by {Generation.origin}",
    )


def _steps(trace: RoutingTrace) -> tuple[Step, ...]:
    passes = [np.flatnonzero(trace.step == number) for number in range(int(trace.step.max()) + 1)]
    return tuple(Step(number, PHASES[int(trace.phase[rows[0]])], rows, trace.request_id[rows])
                 for number, rows in enumerate(passes))


def check_equal(plain: Generated, offloaded: Generated) -> None:
    """Raise CheckError unless tokens, logits (bit for bit) and routing of two generations are equal."""
    import torch

    for number, (one, other) in enumerate(zip(plain.logits, offloaded.logits, strict=True)):
        if not torch.equal(one, other):
            raise CheckError(f"the logits of pass {number} differ from the plain model's by up to "
                             f"{float((one.float() - other.float()).abs().max()):.3g}")
    if plain.tokens != offloaded.tokens:
        raise CheckError("the generated tokens differ from the plain model's")
    if not np.array_equal(plain.trace.expert_ids, offloaded.trace.expert_ids):
        raise CheckError("the routing differs from the plain model's")


def largest_difference(one: Generated, other: Generated) -> float:
    """Return the largest absolute difference of two generations' logits, over the passes before their tokens part."""
    worst = 0.0
    for place, (own, others) in enumerate(zip(one.logits, other.logits, strict=True)):
        request, number = divmod(place, len(one.tokens[0]))
        if one.tokens[request][:number] == other.tokens[request][:number]:
            worst = max(worst, float((own.float() - others.float()).abs().max()))
    return worst


