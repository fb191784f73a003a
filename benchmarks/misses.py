"""Miss rules against the proven optimum of the layer's timing model, and the time that one decision takes.

`python benchmarks/misses.py` prints the tables of docs/misses.md. Layers are made-up routing (`traces.synth`, seeded) of
catalog models at nameplate costs, the most popular quarter of each layer's experts resident; the first table has layers with random
times, small enough to try every assignment. Makespans and shares are exact; times are CPU time of this machine.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moesim.hardware.cost import CostModel
from moesim.hardware.load import load_hardware
from moesim.lowering.expert_times import ExpertTimes
from moesim.lowering.machine import offload_machine
from moesim.lowering.misses.exact import enumerated, solve
from moesim.lowering.misses.makespan import makespan_ns
from moesim.lowering.misses.registry import make_rule
from moesim.lowering.misses.rule import LayerWork
from moesim.model.catalog import load_model
from moesim.traces.synth import synthetic_trace

SEED = 0
RULES = ("load", "cpu", "cpu-only", "fiddler", "fiddler-repository", "hybrimoe", "hybrimoe-repository", "dali", "exact")
MODELS = ("mixtral-8x7b", "deepseek-v2-lite", "qwen3-30b-a3b")
BATCHES = (1, 8, 64)
HARDWARE = "rtx-3090"
RESIDENT_SHARE = 0.25
MOST_LAYERS = 120


@dataclass(frozen=True)
class Measured:
    """One rule over a list of layers: mean and least share of the optimum, all makespans, CPU seconds per decision."""

    rule: str
    mean_share: float
    least_share: float
    makespans_ns: int
    decision_s: float


def random_layers(number: int = 500) -> list[LayerWork]:
    """Return layers of 2 to 8 experts, 1 to 12 rows each, times that follow the rows, half of the experts resident."""
    draw, layers = random.Random(SEED), []
    for _ in range(number):
        rows = tuple(draw.randint(1, 12) for _ in range(draw.randint(2, 8)))
        gpu, cpu, copy = draw.randint(1, 4), draw.randint(1, 4), draw.randint(0, 1)
        layers.append(LayerWork(
            0, 0, tuple(range(len(rows))), rows, tuple(draw.random() < 0.5 for _ in rows), (gpu,) * len(rows),
            tuple(cpu * each for each in rows), (2 * copy,) * len(rows), draw.randint(2, 20), 1))
    return layers


def model_layers(model_name: str, batch: int, most: int = MOST_LAYERS) -> list[LayerWork]:
    """Return the layers of decode steps of `batch` requests on `HARDWARE`, at most `most`."""
    model, machine = load_model(model_name), offload_machine(load_hardware(HARDWARE))
    times = ExpertTimes(model, machine, CostModel(machine.hardware), 1, on_cpu=machine.cpu_sees_experts)
    layers = min(model.num_moe_layers, 12)
    trace = synthetic_trace(256 + 64 * batch, layers, model.num_experts, model.top_k, 64, seed=SEED)
    popular = [np.bincount(trace.expert_ids[:256, layer].ravel(), minlength=model.num_experts) for layer in range(layers)]
    keep = round(RESIDENT_SHARE * model.num_experts)
    resident = [set(np.argsort(-count, kind="stable")[:keep].tolist()) for count in popular]
    works = []
    for number in range(min(most, 64 * layers)):
        step, layer = divmod(number, layers)
        rows = trace.expert_ids[256 + step * batch: 256 + (step + 1) * batch, layer]
        counts = np.bincount(rows.ravel(), minlength=model.num_experts)
        experts = np.flatnonzero(counts).tolist()
        works.append(times.layer(experts, counts[experts].tolist(), [each in resident[layer] for each in experts],
                                 layer=layer, now=number, step_tokens=batch))
    return works


def measure(rule_name: str, layers: Sequence[LayerWork], best_ns: Sequence[int]) -> Measured:
    """Return a rule's figures; `exact` starts each decision with nothing remembered."""
    rule, spent, makespans = make_rule(rule_name), 0.0, []
    for work in layers:
        enumerated.cache_clear()
        start = time.process_time()
        assignment = rule.assign(work)
        spent += time.process_time() - start
        makespans.append(makespan_ns(work, assignment))
    shares = [best / found for best, found in zip(best_ns, makespans, strict=True)]
    return Measured(rule_name, statistics.fmean(shares), min(shares), sum(makespans), spent / len(layers))


@dataclass(frozen=True)
class Case:
    """A list of layers with every rule's figures; `proven` optima."""

    title: str
    layers: list[LayerWork]
    proven: int
    rows: list[Measured]


def measure_case(title: str, layers: list[LayerWork]) -> Case:
    """Solve the layers and measure every rule on them."""
    solved = [solve(work) for work in layers]
    best_ns = [one.bound_ns for one in solved]
    proven = sum(one.makespan_ns == one.bound_ns for one in solved)
    return Case(title, layers, proven, [measure(name, layers, best_ns) for name in RULES])


def _print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print("\n| " + " | ".join(header) + " |\n" + "|---" * len(header) + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |")


def main() -> None:
    """Print what the cases are, the shares of the optimum, and the times of decisions."""
    cases = [measure_case("random", random_layers())]
    cases += [measure_case(f"{model}, batch {batch}", model_layers(model, batch)) for model in MODELS for batch in BATCHES]
    _print_table(("case", "layers", "experts per layer", "absent", "optima proven"), [
        (case.title, str(len(case.layers)), f"{statistics.fmean(len(work.experts) for work in case.layers):.1f}",
         f"{statistics.fmean(work.resident.count(False) for work in case.layers):.1f}", str(case.proven)) for case in cases])
    columns = list(zip(*(case.rows for case in cases), strict=True))
    print("\nMean share of the optimum (least), %")
    _print_table(("rule", *(case.title for case in cases)), [
        (rows[0].rule, *(f"{row.mean_share * 100:.1f} ({row.least_share * 100:.0f})" for row in rows)) for rows in columns])
    print("\nCPU time per decision, us")
    _print_table(("rule", *(case.title for case in cases)), [
        (rows[0].rule, *(f"{row.decision_s * 1e6:,.0f}" for row in rows)) for rows in columns])


if __name__ == "__main__":
    main()
