"""How good placement plans are, how much better any plan could be, and how long both take.

Run ``python benchmarks/placement.py`` (some 10 minutes; ``--only NAME`` runs one part, ``--check`` exits 1 when a
target is missed). Instances: `placement_instances.py`, the project's own generator. Times are wall seconds on the
machine at hand, compiled loops warmed up first (their first compilation is reported apart). A gap is certified:
(bound - value) / the larger of both, the bound proven for every plan, its certificate re-checked by
`moesim.placement.verify` where the last column says so.
"""

from __future__ import annotations

import argparse
import dataclasses
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median

import numpy as np
from placement_instances import DEEPSEEK, MIXTRAL, SWITCH
from threadpoolctl import threadpool_limits

from moesim.placement.certificate import Certificate
from moesim.placement.metrics import rank_load
from moesim.placement.place import place
from moesim.placement.problem import PlacementProblem
from moesim.placement.progress import Progress
from moesim.placement.result import SolveResult, SolveStatus
from moesim.placement.solvers import SOLVERS
from moesim.placement.step_sample import ExchangeRates
from moesim.placement.verify.verify import check_certificate

SEED = 0
MEMORY_TARGET_BYTES = 4 * 2**30
# seconds of a row on a rank, of a token on a port inside a node and between nodes (us; only ratios matter)
ROW, NODE, CLUSTER = 0.22, 0.10, 0.43


@dataclass(frozen=True)
class Row:
    """One line: what was reached, in what time, what was asked for, and whether it was met."""

    instance: str
    reached: str
    seconds: str
    target: str
    met: bool
    verified: str = "-"


def verified(problem: PlacementProblem, certificate: Certificate | None) -> str:
    """Re-check a certificate; return ``yes``, or ``-`` where there is none (a wrong one raises)."""
    if certificate is None:
        return "-"
    check_certificate(problem, certificate)
    return "yes"


def with_rates(problem: PlacementProblem, top_k: int) -> PlacementProblem:
    """Return the problem with the rates of the joint instances."""
    return dataclasses.replace(problem, rates=ExchangeRates(ROW, NODE, CLUSTER, 1.0 / top_k))


def timed(run: Callable[[], SolveResult]) -> tuple[SolveResult, float]:
    """Return a result and its wall seconds."""
    started = time.perf_counter()
    result = run()
    return result, time.perf_counter() - started


def exact_rows() -> Iterator[Row]:
    """Mixtral: the proven optimum of all layers at once."""
    for num_ranks, per_node in ((4, 4), (8, 8), (8, 4)):
        problem = with_rates(MIXTRAL.problem(num_ranks, per_node), MIXTRAL.top_k)
        for objective in ("affinity", "bottleneck"):
            place(problem, "exact", objective=objective)  # warm up
            result, seconds = timed(lambda p=problem, o=objective: place(p, "exact", objective=o, seed=SEED))
            optimal = result.status is SolveStatus.OPTIMAL
            nodes = num_ranks // per_node
            yield Row(f"32 x 8 on {num_ranks} GPUs, {nodes} node{'s' * (nodes > 1)}, {objective}",
                      f"{result.objective:.6g}, {result.status.value}", f"{seconds:.2f}",
                      "proven optimum in 2 s", optimal and seconds <= 2.0, verified(problem, result.certificate))


def affinity_row(name: str, problem: PlacementProblem, node_weight: float, total_s: float, plan_s: float | None,
                 search_share: float, spare_s: float) -> Row:
    """Plan and bound of one affinity instance within `total_s`, the first plan within `plan_s`."""
    from moesim.placement.bounds.chain_sdp import prove_affinity

    times: list[float] = []
    progress = Progress(lambda report: times.append(report.seconds) if report.objective is not None else None, "max")
    started = time.perf_counter()
    result = SOLVERS["affinity"](problem, seed=SEED, time_limit_s=search_share * total_s, node_weight=node_weight,
                                 progress=progress)
    left_s = total_s - (time.perf_counter() - started)
    proof = prove_affinity(problem, seed=SEED, time_limit_s=left_s - spare_s, node_weight=node_weight,
                           incumbent=result.plan, progress=progress)
    seconds = time.perf_counter() - started
    kept = progress.objective  # the prover rounds its relaxation to plans of its own
    assert kept is not None
    bound = min(proof.bound, result.objective_bound or 1.0)
    gap = (bound - kept) / bound
    first = min(times, default=seconds)
    with threadpool_limits(1, user_api="blas"):
        recheck = verified(problem, proof)
    met = gap <= 0.04 and seconds <= total_s and (plan_s is None or first <= plan_s)
    plan_text = "" if plan_s is None else f", first plan {first:.1f} s"
    return Row(name, f"kept {kept:.4f}, bound {bound:.4f}, gap {gap:.1%}{plan_text}", f"{seconds:.1f}",
               f"gap <= 4 % in {total_s:.0f} s" + ("" if plan_s is None else f", plan in {plan_s:.0f} s"), met,
               recheck)


def affinity_rows() -> Iterator[Row]:
    """64 experts: a suite of strengths and seeds."""
    for one in SWITCH:
        for num_ranks in (8, 16):
            yield affinity_row(f"{one.name}, {num_ranks} GPUs", one.problem(num_ranks, 8), 0.0, 30.0, None, 0.15, 0.5)


def deepseek_rows() -> Iterator[Row]:
    """58 x 256: flat (same GPU) and by node (same node)."""
    for num_ranks in (32, 64):
        problem = DEEPSEEK.problem(num_ranks, 8)
        for weight, level in ((0.0, "flat"), (1.0, "by node")):
            yield affinity_row(f"58 x 256 top-8, {num_ranks} GPUs, {level}", problem, weight, 60.0, 3.0, 0.1, 5.0)


def joint_row(name: str, problem: PlacementProblem, better: float, search_s: float) -> Row:
    """The bottleneck objective against balance-then-assign, and its certified gap."""
    from moesim.placement.bounds.bottleneck import prove_bottleneck
    from moesim.placement.objectives import OBJECTIVES
    from moesim.placement.solvers.bottleneck import balance_then_assign

    value = OBJECTIVES["bottleneck"].value
    base = value(problem, balance_then_assign(problem))
    started = time.perf_counter()
    result = place(problem, "bottleneck", seed=SEED, time_limit_s=search_s)
    left_s = max(1.0, 28.5 - (time.perf_counter() - started))
    proof = prove_bottleneck(problem, seed=SEED, time_limit_s=left_s, incumbent=result.plan)
    seconds = time.perf_counter() - started
    assert result.objective is not None
    bound = max(proof.bound, result.objective_bound or 0.0)
    gain, gap = (base - result.objective) / base, (result.objective - bound) / result.objective
    return Row(name, f"{gain:.1%} better, gap {gap:.1%}", f"{seconds:.1f}",
               f"{better:.0%} better than balance-then-assign, gap <= 15 %, 30 s",
               gain >= better and gap <= 0.15 and seconds <= 30.0, verified(problem, proof))


def joint_rows() -> Iterator[Row]:
    """Compute and communication at once."""
    for one in SWITCH[::2]:
        yield joint_row(f"{one.name}, 16 GPUs", with_rates(one.problem(16, 8), one.top_k), 0.20, 12.0)
    for num_ranks, better in ((32, 0.10), (64, 0.06)):
        yield joint_row(f"58 x 256 top-8, {num_ranks} GPUs", with_rates(DEEPSEEK.problem(num_ranks, 8), 8), better, 22.0)


def balance_loads() -> dict[str, np.ndarray]:
    """Loads float64[58, 256] of the kinds that balancers are tried on."""
    rng = np.random.default_rng(SEED)
    zipf = rng.permuted(np.tile(1e6 / np.arange(1, 257), (58, 1)), axis=1)
    return {"trace": DEEPSEEK.problem(32, 8).expert_load, "zipf 1.0": np.floor(zipf),
            "lognormal 1.0": np.floor(1000 * rng.lognormal(0, 1.0, (58, 256))),
            "lognormal 1.5": np.floor(1000 * rng.lognormal(0, 1.5, (58, 256)))}


def balance_rows() -> Iterator[Row]:
    """Redundant experts: 58 layers of 256 experts."""
    for name, load in balance_loads().items():
        for num_ranks, num_slots in ((32, 288), (64, 320), (128, 384), (320, 320)):
            problem = PlacementProblem(load, num_ranks, num_slots // num_ranks, 8)
            place(PlacementProblem(load[:1], num_ranks, num_slots // num_ranks, 8), "balance")  # warm up
            result, seconds = timed(lambda p=problem: place(p, "balance", seed=SEED, time_limit_s=1.0))
            greedy = place(problem, "eplb")
            assert result.objective is not None
            assert result.objective_bound is not None
            above = result.objective / result.objective_bound - 1
            mean_load = rank_load(result.plan, load).mean(axis=1).sum()
            met = above <= 1e-3 and seconds <= 1.0 and result.objective <= greedy.objective * (1 + 1e-12)
            yield Row(f"{name}, {num_ranks} GPUs, {num_slots} slots",
                      f"max/mean {result.objective / mean_load:.4f}, EPLB {greedy.objective / mean_load:.4f}, "
                      f"{above:.3%} above the bound", f"{seconds:.2f}",
                      "within 0.1 % of the bound, never above EPLB, 58 layers in 1 s", met,
                      verified(problem, result.certificate))


def split_rows() -> Iterator[Row]:
    """The exact split of a batch's tokens over replicas, against the LP."""
    from scipy.optimize import linprog

    from moesim.placement.split import split_layer

    rng = np.random.default_rng(SEED)
    load = DEEPSEEK.problem(64, 8).expert_load[:8]
    for num_ranks, num_slots in ((32, 288), (64, 320), (64, 384)):
        plan = place(PlacementProblem(load, num_ranks, num_slots // num_ranks, 8), "balance").plan
        times, off = [], []
        for layer in range(8):
            batch = rng.multinomial(32_768, load[layer] / load[layer].sum()).astype(float)
            row = plan.physical_to_logical[layer]
            split_layer(row, batch, num_ranks)  # warm up
            for _ in range(5):
                started = time.perf_counter()
                split = split_layer(row, batch, num_ranks)
                times.append(time.perf_counter() - started)
            reached = split.tokens.reshape(num_ranks, -1).sum(axis=1).max()
            off.append(abs(reached / _lp_largest(linprog, row, num_ranks, batch) - 1))
        worst = max(off)
        yield Row(f"{num_ranks} GPUs, {num_slots} slots, batches of 32,768", f"largest load within {worst:.1e} of the LP",
                  f"{1e3 * median(times):.3f} ms", "equal to the LP, 0.5 ms",
                  worst <= 1e-6 and median(times) <= 0.5e-3)


def _lp_largest(linprog: Callable[..., object], row: np.ndarray, num_ranks: int, batch: np.ndarray) -> float:
    """Return the LP's smallest possible largest rank load (HiGHS through scipy)."""
    num_slots = len(row)
    ranks = np.arange(num_slots) // (num_slots // num_ranks)
    upper = np.zeros((num_ranks, num_slots + 1))
    upper[ranks, np.arange(num_slots)] = 1.0
    upper[:, -1] = -1.0
    equal = np.zeros((len(batch), num_slots + 1))
    equal[row, np.arange(num_slots)] = 1.0
    cost = np.zeros(num_slots + 1)
    cost[-1] = 1.0
    return float(linprog(cost, upper, np.zeros(num_ranks), equal, batch, method="highs").fun)  # type: ignore[attr-defined]


PARTS: dict[str, tuple[str, Callable[[], Iterator[Row]]]] = {
    "exact": ("Mixtral, exact", exact_rows),
    "affinity": ("64 experts, affinity", affinity_rows),
    "deepseek": ("58 x 256, affinity", deepseek_rows),
    "joint": ("Joint balance and communication", joint_rows),
    "balance": ("Balance with redundant experts", balance_rows),
    "split": ("Exact split over replicas", split_rows),
}


def main() -> int:
    """Run the parts, print a table each, and return 1 where `--check` finds a target missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=sorted(PARTS), action="append", help="run this part (may be repeated)")
    parser.add_argument("--check", action="store_true", help="exit 1 when a target is missed")
    arguments = parser.parse_args()
    missed: list[str] = []
    for name in arguments.only or PARTS:
        title, rows = PARTS[name]
        print(f"\n**{title}**\n\n| instance | reached | seconds | target | met | certificate re-checked |\n"
              "|---|---|---|---|---|---|")
        for row in rows():
            print(f"| {row.instance} | {row.reached} | {row.seconds} | {row.target} | {'yes' if row.met else '**no**'} | "
                  f"{row.verified} |", flush=True)
            if not row.met:
                missed.append(f"{title}: {row.instance}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"\nPeak memory {peak / 2**30:.2f} GiB (target: under 4).")
    if peak > MEMORY_TARGET_BYTES:
        missed.append("memory")
    print("Every target met." if not missed else f"Missed: {'; '.join(missed)}.")
    return 1 if arguments.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
