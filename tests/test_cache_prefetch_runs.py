"""Every prefetcher in an offloaded run: what it fetched is accounted for, and the run can be repeated."""

from __future__ import annotations

import numpy as np
import offload_worlds
import pytest

from moesim.cache.cache import ExpertCache
from moesim.cache.policy import PolicyContext, make_policy
from moesim.cache.prefetch import PREFETCHERS, PrefetchContext, make_prefetcher
from moesim.cache.prefetchers.training import token_accesses, use_tokens
from moesim.cache.scores import RouterScores
from moesim.hardware.cost import CostModel
from moesim.lowering.offload import OffloadProgram
from moesim.lowering.offload_policy import OffloadPolicy
from moesim.scenario.offload import Offload
from moesim.simulate.simpy_executor import execute_simpy

SEEDS = (0, 2, 8, 18)  # 2 to 4 layers, 2 to 8 steps, loads and CPU, pools per layer and shared


def context(offload: Offload) -> PrefetchContext:
    """Return everything that a prefetcher may want for a run."""
    training, starts = token_accesses(offload.train)
    model, steps = offload.model, [step.rows for step in offload.steps]
    rows = np.random.default_rng(offload.seed).dirichlet(np.ones(model.num_experts), offload.stream.num_accesses)
    return PrefetchContext(
        model.num_moe_layers, model.num_experts, width=4, transitions=offload.transitions, popularity=offload.popularity,
        future=offload.stream, future_tokens=use_tokens(offload.test, steps), recall=0.8, seed=offload.seed, lookahead=2,
        scores=RouterScores(model.top_k, rows, rows), training=training, training_starts=starts, copy_s=0.5,
        makespan=lambda tokens, resident: float(sum(1 if expert in resident else 3 for expert in tokens)))


def run(name: str, seed: int) -> tuple[dict[str, int], list[int]]:
    """Return the counts of a run over all layers, and when its tasks ended."""
    offload, point = offload_worlds.random_case(seed)
    model = offload.model
    cache = ExpertCache(
        model.num_moe_layers, model.num_experts, max(2, model.num_experts // 2),
        make_policy("lru", PolicyContext(model.num_moe_layers, model.num_experts)), shared=offload.shared)
    program = OffloadProgram(
        model, offload.test, offload.steps, offload.machine, CostModel(offload.machine.hardware), cache,
        OffloadPolicy(point.miss, offload.admit, offload.chunks), make_prefetcher(name, context(offload)))
    execution = execute_simpy(program)
    return {key: int(value.sum()) for key, value in program.cache_counts.items()}, np.asarray(execution.end_ns).tolist()


@pytest.mark.parametrize("name", PREFETCHERS.names())
def test_what_is_fetched_ahead_is_accounted_for(name: str) -> None:
    """Useful, late and useless are no more than what was fetched; every access is a hit, late or a miss; a run repeats."""
    fetched = 0
    for seed in SEEDS:
        counts, ends = run(name, seed)
        fetched += counts["prefetches"]
        became = counts["useful_prefetches"] + counts["late_prefetches"] + counts["useless_prefetches"]
        assert became <= counts["prefetches"]
        assert counts["hits"] + counts["late_hits"] + counts["misses"] == counts["accesses"]
        assert run(name, seed) == (counts, ends)
    assert (fetched > 0) == (name != "none")
