"""Micro-benchmarks beside an offloaded run: its own modules on other inputs, alone and while experts are copied.

An expert is timed by calling a layer's experts on random rows with a random choice among resident experts; all that is
no expert by a pass whose experts get no choice; a load by a call on an absent expert. Single calls come in random order.
"""

from __future__ import annotations

import copy
import inspect
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moesim.cache.cache import ExpertCache
from moesim.cache.policies.lru import LruPolicy
from moesim.cache.policy import PolicyContext
from moesim.calibrate.kernels import wait_until
from moesim.units import s_from_ns
from moesim.validate.hf_loader import Loader
from moesim.validate.hf_model import OffloadedModel
from moesim.validate.hf_plan import HfCase
from moesim.validate.hf_runtime import ExpertRuntime, Span
from moesim.validate.hf_weights import SlotPool, SlowTier
from moesim.validate.probe import Block, Samples

MAX_POINTS = 4
MISSES_PER_ROUND = 2


@dataclass(frozen=True)
class HfProbePlan:
    """Sizes to measure: tokens of one expert's call, and (tokens, cached tokens before them) of passes."""

    expert_tokens: tuple[int, ...]
    passes: tuple[tuple[int, int], ...]


def probe_plan(case: HfCase) -> HfProbePlan:
    """Return the sizes that occur in the case, thinned to a few of each."""
    lengths = [(len(step.rows), int(case.trace.position[step.rows[0]])) for step in case.steps]
    prompts, decodes = (_few({pair for pair in lengths if (pair[1] > 0) == later}) for later in (False, True))
    counts = {int(count) for tokens in case.access_tokens for count in np.unique(tokens)}
    return HfProbePlan(tuple(sorted({*_few(counts), *(tokens for tokens, _ in prompts + decodes)})), (*prompts, *decodes))


def _few(values: set[Any]) -> list[Any]:
    """Return at most `MAX_POINTS` of the values, the ends among them."""
    ordered = sorted(values)
    places = np.linspace(0, len(ordered) - 1, min(MAX_POINTS, len(ordered))).round().astype(int)
    return [ordered[place] for place in dict.fromkeys(places.tolist())]


@dataclass
class HfBlock:
    """One block of micro-benchmarks: durations, and what a load costs beside its copy (seconds each)."""

    block: Block
    load_overhead_s: list[float] = field(default_factory=list)

    def merged(self, other: HfBlock) -> HfBlock:
        """Return the samples of both blocks."""
        return HfBlock(self.block.merged(other.block), self.load_overhead_s + other.load_overhead_s)


class HfProbe:
    """Measures blocks for one case on the run's own tier, slots and modules (the slots' contents are lost)."""

    def __init__(self, offloaded: OffloadedModel, case: HfCase, tier: SlowTier, pool: SlotPool, copy_bytes: int) -> None:
        self._offloaded, self._case, self._tier, self._pool = offloaded, case, tier, pool
        self._plan, self._copy_bytes = probe_plan(case), copy_bytes
        config = offloaded.model.config.get_text_config()
        self._hidden, self._vocabulary = int(config.hidden_size), int(config.vocab_size)
        self._width = min(case.trace.top_k, case.slots_per_layer)
        self._logits: Any = None

    def block(self, rounds: int, seed: int) -> HfBlock:
        """Run one block."""
        import torch

        random = np.random.default_rng(seed)
        found = HfBlock(Block(Samples(), Samples()))
        with (torch.inference_mode(), self._offloaded.attached(), self._runtime(random) as (runtime, loader)):
            self._offloaded.runtime = runtime
            contexts = {pair: self._context(pair[1], random) for pair in self._plan.passes}
            self._logits = self._forward(1, None, random).logits
            self._calls(rounds, random, contexts, found.block.alone, runtime)
            self._misses(rounds * MISSES_PER_ROUND, random, runtime, loader, found)
            with self._traffic(seed, found.block.beside):
                self._calls(rounds, random, contexts, found.block.beside, runtime)
        return found

    @contextmanager
    def _runtime(self, random: np.random.Generator) -> Iterator[tuple[ExpertRuntime, Loader]]:
        """Yield a runtime whose slots are full of random experts."""
        trace, plan = self._case.trace, self._case.plan
        cache = ExpertCache(trace.num_layers, trace.num_experts, self._case.slots_per_layer,
                            LruPolicy(PolicyContext(trace.num_layers, trace.num_experts)))
        for layer in range(trace.num_layers):
            for expert in random.permutation(trace.num_experts)[: cache.slots_per_layer].tolist():
                cache.preload(cache.keys_of(layer, [expert]))
                self._pool.fill(cache.slot_of(layer, expert), self._tier.of(layer, expert))
        with Loader(self._tier, self._pool, plan.device, plan.bytes_per_s) as loader:
            yield ExpertRuntime(self._tier, self._pool, loader, cache, device=plan.device), loader

    def _calls(self, rounds: int, random: np.random.Generator, contexts: dict[tuple[int, int], Any], samples: Samples,
               runtime: ExpertRuntime) -> None:
        calls: list[Any] = [*self._plan.expert_tokens * 2, *self._plan.passes] * rounds
        for place in random.permutation(len(calls)).tolist():
            before = len(runtime.spans)
            if isinstance(calls[place], tuple):
                self._pass(calls[place], contexts[calls[place]], random, runtime)
                _add_pass(samples, calls[place], runtime.spans[before:])
            else:
                self._experts(calls[place], random, runtime)
                _add_experts(samples, calls[place], runtime.spans[before:])

    def _experts(self, tokens: int, random: np.random.Generator, runtime: ExpertRuntime) -> None:
        layer = int(random.integers(self._case.trace.num_layers))
        chosen = random.permutation(runtime.cache.residents(layer))[: self._width]
        self._call(layer, np.tile(chosen, (tokens, 1)), runtime)

    def _call(self, layer: int, ids: np.ndarray, runtime: ExpertRuntime) -> None:
        import torch

        model = self._offloaded.model
        hidden = torch.randn(len(ids), self._hidden, dtype=model.dtype, device=model.device)
        runtime.begin_pass(len(ids))
        self._offloaded.call_experts(layer, hidden, torch.tensor(ids, device=model.device))

    def _context(self, tokens: int, random: np.random.Generator) -> Any:
        """Return the model's cache after so many random tokens (None for none)."""
        return self._forward(tokens, None, random).past_key_values if tokens else None

    def _pass(self, size: tuple[int, int], context: Any, random: np.random.Generator, runtime: ExpertRuntime) -> None:
        """What lies between two passes of a generation, then a pass."""
        context = copy.deepcopy(context)
        runtime.mark()
        int(self._logits[0, -1].float().cpu().argmax())
        self._logits = self._forward(size[0], context, random).logits

    def _forward(self, tokens: int, context: Any, random: np.random.Generator) -> Any:
        """One pass whose experts compute nothing."""
        import torch

        model = self._offloaded.model
        options = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        ids = torch.tensor(random.integers(self._vocabulary, size=(1, tokens)), device=model.device)
        self._offloaded.skip_experts = True
        try:
            return model(input_ids=ids, past_key_values=context, use_cache=True, **options)
        finally:
            self._offloaded.skip_experts = False
            self._offloaded.take()

    def _misses(self, count: int, random: np.random.Generator, runtime: ExpertRuntime, loader: Loader,
                found: HfBlock) -> None:
        """Calls on one absent expert each: the copy, and what the load costs beside it."""
        cache = runtime.cache
        for _ in range(count):
            layer = int(random.integers(cache.num_layers))
            residents = cache.residents(layer)
            if len(residents) == cache.num_experts:
                cache.release(layer, residents[0])
            absent = sorted(set(range(cache.num_experts)) - set(cache.residents(layer)))
            self._call(layer, np.array([[random.choice(absent)]]), runtime)
            load = loader.finished[-1]
            found.block.alone.seconds["copy", (self._copy_bytes,)].append(s_from_ns(load.end_ns - load.start_ns))
            waited = load.resumed_ns - load.end_ns if load.resumed_ns else 0
            found.load_overhead_s.append(s_from_ns(load.start_ns - load.asked_ns + waited))

    @contextmanager
    def _traffic(self, seed: int, samples: Samples) -> Iterator[None]:
        """Copy random experts into a passing slot all the time."""
        over = threading.Event()
        thread = threading.Thread(target=self._copy_on, args=(over, seed, samples), daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _copy_on(self, over: threading.Event, seed: int, samples: Samples) -> None:
        import torch

        torch.set_num_threads(1)
        random, rate, trace = np.random.default_rng([seed, 1]), self._case.plan.bytes_per_s, self._case.trace
        with torch.inference_mode():
            while not over.is_set():
                layer, expert = int(random.integers(trace.num_layers)), int(random.integers(trace.num_experts))
                start = time.perf_counter()
                self._pool.fill(self._pool.num_slots, self._tier.of(layer, expert))
                if rate:
                    wait_until(start + self._tier.expert_bytes / rate)
                samples.seconds["copy", (self._copy_bytes,)].append(time.perf_counter() - start)


def _add_experts(samples: Samples, tokens: int, spans: Sequence[Span]) -> None:
    for span in spans:
        if span.kind in ("router", "expert"):
            samples.seconds[span.kind, (tokens,)].append(s_from_ns(span.end_ns - span.start_ns))


def _add_pass(samples: Samples, size: tuple[int, int], spans: Sequence[Span]) -> None:
    tokens, before = size
    context = tokens * before + tokens * (tokens + 1) // 2
    own = [s_from_ns(span.end_ns - span.start_ns) for span in spans if span.kind == "attention"]
    samples.seconds["attention", (tokens, context)].append(sum(own) / len(own))
    samples.seconds["head", (1,)].extend(
        s_from_ns(span.end_ns - span.start_ns) for span in spans if span.kind == "head")
