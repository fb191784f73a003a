"""Refresh policies of a diffusion language model against each other, coresets, and the time of the best schedule.

`python benchmarks/refresh.py` prints the tables of docs/diffusion.md. Everything is simulated on made-up routing
(`moesim.traces.denoise`, seeded) with nameplate costs; only the times of the last table are measured, in CPU seconds.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moesim.hardware.cost import CostModel
from moesim.hardware.load import load_hardware
from moesim.lowering.machine import offload_machine
from moesim.lowering.refresh import RefreshCosts, RefreshProblem, target_sets, top_sets
from moesim.lowering.refresh_hbm import coreset_rows
from moesim.lowering.refresh_rows import diffusion_rows
from moesim.lowering.refresh_schedule import edge_costs, shortest_schedule
from moesim.model.catalog import load_model
from moesim.traces.coresets import des_seq, des_vote, dmoe, expected_union
from moesim.traces.denoise import DenoiseSettings, denoise_scored, denoise_trace
from moesim.traces.denoise_passes import DenoisePasses, denoise_passes, distinct_experts, lag_similarity

SEED, REPEATS = 0, 5
MODEL = "llada2.0-mini"
LAGS = (1, 2, 3, 5, 8)


@dataclass(frozen=True)
class Case:
    """One machine and what its refreshes cost; `budget` GPU experts of 256 per layer."""

    title: str
    hardware: str
    budget: int
    routed: str = "block"
    write_back: bool = False
    overlap: bool = True


CASES = (
    Case("A: RTX 4090, 64 experts, KV cache, one way, overlap", "rtx-4090", 64),
    Case("B: A100, 64 experts, KV cache, one way, overlap", "a100-sxm", 64),
    Case("C: A100, 128 experts, KV cache, one way, overlap", "a100-sxm", 128),
    Case("D: A100, 128 experts, no KV cache, both ways, no overlap (the released code's costs)", "a100-sxm", 128, "prefix",
         write_back=True, overlap=False),
)


def settings(routed: str = "block", num_requests: int = 4) -> DenoiseSettings:
    """Return requests of 256 tokens after a prompt of 64, LLaDA2.0-mini's sizes, the generator's fitted defaults."""
    return DenoiseSettings(num_requests, load_model(MODEL).num_moe_layers, routed=routed)


def policy_rows(case: Case) -> list[dict[str, Any]]:
    """Return the rows of one case: half of the requests train, half are run."""
    hardware = load_hardware(case.hardware)
    return diffusion_rows(
        load_model(MODEL), denoise_trace(settings(case.routed), seed=SEED), offload_machine(hardware), CostModel(hardware),
        budget=case.budget, write_back=case.write_back, overlap=case.overlap, seed=SEED)


def similarity_rows() -> list[dict[str, Any]]:
    """Return the fitted curve and the distinct experts by block size."""
    passes = denoise_passes(denoise_trace(settings(), seed=SEED))
    rows: list[dict[str, Any]] = [{"lag": lag, "cosine": value}
                                  for lag, value in zip(LAGS, lag_similarity(passes, LAGS), strict=True)]
    for size, published in ((16, 49), (24, 61), (32, 70)):
        own = DenoiseSettings(4, 4, block_size=size, prompt_tokens=0)
        unique = float(distinct_experts(denoise_passes(denoise_trace(own, seed=SEED))).mean())
        rows.append({"block_size": size, "unique_experts": unique, "published": published,
                     "no_locality": expected_union(256, 8, size)})
    return rows


def coreset_table() -> list[dict[str, Any]]:
    """Return the rows of the coreset methods, all weights in the memory of an H100."""
    model, hardware = load_model(MODEL), load_hardware("h100-sxm")
    trace, scores = denoise_scored(settings(num_requests=1), seed=SEED)
    passes = denoise_passes(trace)
    traces = {("none", 0.0): trace}
    traces |= {("des-seq", float(keep)): des_seq(trace, passes, keep, scores=scores) for keep in (3, 2)}
    traces |= {("des-vote", beta): des_vote(trace, passes, beta, scores=scores) for beta in (0.15, 0.10)}
    traces |= {("dmoe", mass): dmoe(trace, passes, mass, scores=scores) for mass in (0.6,)}
    return coreset_rows(model, traces, CostModel(hardware), hardware.ranks[0])


@dataclass(frozen=True)
class ScheduleTime:
    """CPU seconds of one layer's best schedule: the edges' costs, and the dynamic program over them."""

    steps: int
    edges_s: float
    program_s: float
    refreshes: int


def schedule_times(sizes: Sequence[int] = (64, 256, 1024, 2048), num_experts: int = 256) -> list[ScheduleTime]:
    """Return the times for one layer of so many experts, a quarter of them on the GPU; the least of `REPEATS` runs."""
    own = DenoiseSettings(max(sizes) // 64, 1, num_experts=num_experts)
    passes = denoise_passes(denoise_trace(own, seed=SEED))
    found = []
    for steps in sizes:
        problem = _problem(passes, steps)
        edges_s, edges = _least_s(lambda problem=problem: edge_costs(problem, 0))
        program_s, (refreshes, _) = _least_s(lambda edges=edges: shortest_schedule(edges))
        found.append(ScheduleTime(steps, edges_s, program_s, len(refreshes)))
    return found


def _problem(passes: DenoisePasses, steps: int) -> RefreshProblem:
    cut = DenoisePasses(passes.counts[:steps], passes.rows[:steps], passes.request[:steps], passes.block[:steps],
                        passes.step_in_block[:steps], passes.active[:steps], passes.block_end[:steps])
    tokens = np.arange(int(cut.counts.max()) + 1)
    costs = RefreshCosts(np.where(tokens, 11_000 + 10 * tokens, 0), np.where(tokens, 100_000 + 400 * tokens, 0), 210_000)
    budget = cut.counts.shape[2] // 4
    prior = np.zeros(cut.counts.shape[1:], np.int64)
    return RefreshProblem(cut, costs, budget, top_sets(prior, budget), target_sets(cut.counts, budget, prior),
                          np.zeros(steps, np.int64))


def _least_s(run: Any) -> tuple[float, Any]:
    times = []
    for _ in range(REPEATS):
        start = time.process_time()
        result = run()
        times.append(time.process_time() - start)
    return min(times), result


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print("\n| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |")


def _print_policies(case: Case) -> None:
    print(f"\n**{case.title}**")
    _table(("policy", "knows", "tau", "refreshes per block", "misses", "experts s", "moves s", "ms per step", "tokens/s",
            "over optimal"),
           [(row["policy"], row["knows"], str(row["tau"] or ""), f"{row['refreshes_per_block']:.2f}",
             f"{row['miss_rate']:.1%}", f"{row['experts_s']:.2f}", f"{row['moves_s']:.2f}", f"{row['step_s'] * 1000:.2f}",
             f"{row['tokens_per_s']:.1f}", f"{row['over_optimal']:.1%}") for row in policy_rows(case)])


def _print_coresets() -> None:
    rows = []
    for row in coreset_table():
        known = row["published_experts"] is not None
        name = f"{row['method']} {row['setting']:g}" if row["setting"] else row["method"]
        rows.append((name, f"{row['unique_experts']:.1f}",
                     f"{row['published_experts']:g}" if known else "", f"{row['expert_bytes_per_layer'] / 1e6:.0f}",
                     f"{row['experts_s_per_step'] * 1000:.2f}", f"{row['published_accuracy']:.2%}" if known else ""))
    _table(("method", "unique experts", "published", "MB per layer", "experts, ms per step", "published relative accuracy"),
           rows)


def main() -> None:
    """Print all tables."""
    rows = similarity_rows()
    _table(("lag", "cosine similarity"), [(str(row["lag"]), f"{row['cosine']:.4f}") for row in rows if "lag" in row])
    _table(("block size", "distinct experts", "published (dMoE)", "no locality"),
           [(str(row["block_size"]), f"{row['unique_experts']:.1f}", str(row["published"]), f"{row['no_locality']:.0f}")
            for row in rows if "block_size" in row])
    for case in CASES:
        _print_policies(case)
    print()
    _print_coresets()
    _table(("passes", "edges, CPU ms", "dynamic program, CPU ms", "refreshes"),
           [(str(one.steps), f"{one.edges_s * 1000:.1f}", f"{one.program_s * 1000:.2f}", str(one.refreshes))
            for one in schedule_times()])


if __name__ == "__main__":
    main()
