"""The parts of `accuracy.py`: what each family runs, as units of one round each that give `Outcome`s.

A unit is what is repeated and what an interrupted run keeps. The rounds of all parts take turns, so that the same case is run
minutes apart.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from typing import NamedTuple

import pandas as pd

from moesim.calibrate.imports import import_profile
from moesim.calibrate.imports.aic_moe import as_measured
from moesim.calibrate.transfer import expert_table
from moesim.hardware.cost import CostModel
from moesim.hardware.load import load_hardware
from moesim.hardware.profile import CalibrationProfile, MeasuredTable
from moesim.hardware.tables import TableFit
from moesim.lowering.machine import OffloadMachine
from moesim.lowering.offload import OffloadProgram
from moesim.lowering.work import experts_work
from moesim.model.catalog import load_model
from moesim.model.spec import ModelSpec
from moesim.placement.place import place, problem_from_trace
from moesim.placement.plan import PlacementPlan
from moesim.scenario.offload import Offload
from moesim.scenario.schema import Point, ValidationModel
from moesim.scenario.validation import first_layers, small_model
from moesim.traces.denoise import DenoiseSettings, denoise_trace
from moesim.traces.denoise_passes import DenoisePasses, denoise_passes
from moesim.traces.split import split_requests
from moesim.traces.steps import closed_loop_steps
from moesim.traces.store import read_trace
from moesim.traces.trace import RoutingTrace
from moesim.units import GB
from moesim.validate.campaign import OffloadCampaign, OffloadCase, run_round
from moesim.validate.campaign_kernels import held_out_sizes, kernel_outcomes, size_name, table_outcomes
from moesim.validate.campaign_probe import two_sided
from moesim.validate.campaign_report import Outcome, Target
from moesim.validate.local import local_machine
from moesim.validate.offload import OffloadValidation
from moesim.validate.ranks_case import PROCESSES, SEQUENTIAL, RanksCase, RanksSettings, num_cores
from moesim.validate.ranks_validate import validate_ranks
from moesim.validate.refresh_run import validate_refresh
from moesim.validate.refresh_world import RefreshSizes
from moesim.validate.world import OffloadWorld, WorldConfig

SEED, DEVICE, CHUNKS, RATE = 0, "cpu", 3, 3 * GB
TRACE = "builtin:tiny-olmoe"
WITHOUT_OVERLAP, WITH_OVERLAP, KERNELS = Target(0.02, 0.10), Target(0.04, 0.10), Target(0.04, 0.10)
TABLES = Target(0.10)
LEAST_TAU, LEAST_DRY_STEPS = 0.95, 4


@dataclass(frozen=True)
class Effort:
    """How much is run: of everything less with `--quick`. `probe_rounds` of micro-benchmarks per block; seconds per kernel round."""

    rounds: int
    slots: tuple[int, ...]
    policies: tuple[str, ...]
    steps: int
    layers: int
    probe_rounds: int
    ranks_steps: int
    kernel_s: float
    dtypes: tuple[str, ...] = ("float32", "bfloat16")


FULL = Effort(3, (8, 16, 32, 48), ("lru", "lfu", "static"), 12, 4, 16, 8, 12.0)
QUICK = Effort(2, (8, 32), ("lru", "static"), 8, 3, 12, 4, 6.0)


class Unit(NamedTuple):
    """One round of one part."""

    name: str
    run: Callable[[], list[Outcome]]


@dataclass(frozen=True)
class Part:
    """What `--only` names. `units` of a round; `ordered`: families whose cases are held against each other by their order."""

    name: str
    units: Callable[[Effort, int], Iterator[Unit]]
    ordered: tuple[str, ...] = ()
    rounds: int | None = None
    absent: Callable[[], str] = lambda: ""


def model_and_traces(effort: Effort) -> tuple[ModelSpec, RoutingTrace, RoutingTrace]:
    """Return the small model, and the trace's requests in two halves: to learn and calibrate on, and to judge."""
    trace = read_trace(TRACE)
    model = small_model(ValidationModel(num_layers=effort.layers), trace)
    return model, *split_requests(first_layers(trace, effort.layers), 0.5, SEED)


# ---------------------------------------------------------------- offloaded inference

WIDTH, RECALL = 4, 0.8  # experts that are fetched ahead; how often HybriMoE's predictor is right, a stated what-if


def points(effort: Effort) -> dict[str, Point]:
    """Return the cases of offloaded inference by name: a grid, and two published systems' rules at one size."""
    grid = [Point(policy, slots, prefetch, WIDTH if prefetch != "none" else 0, miss=miss) for miss, prefetch, policy, slots in
            itertools.product(("load", "cpu"), ("none", "transition"), effort.policies, effort.slots)]
    slots = effort.slots[len(effort.slots) // 2]
    grid += [Point("lru", slots, miss="fiddler"), Point("mrs", slots, "hybrimoe", WIDTH, RECALL, "hybrimoe")]
    return {f"{one.policy}, {one.slots_per_layer} slots, {mechanism(one)}": one for one in grid}


def mechanism(point: Point) -> str:
    """Return how misses are handled and what is fetched ahead."""
    return f"{point.miss}" + ("" if point.prefetch == "none" else f" + {point.prefetch} prefetch")


def dry_run(point: Point) -> str:
    """Return which dry run a case needs: a decision takes longer, the more experts are missing."""
    return f"{mechanism(point)}, {point.slots_per_layer} slots"


def offload_family(point: Point) -> str:
    """Return the family of a case."""
    return "offload: published rules" if point.miss not in ("load", "cpu") else f"offload: {mechanism(point)}"


def offload_units(effort: Effort, number: int) -> Iterator[Unit]:
    """Yield one round of all cases."""
    yield Unit("offload", lambda: run_round(offload_campaign(effort), number, probe_rounds=effort.probe_rounds, seed=SEED))


@cache
def offload_campaign(effort: Effort) -> OffloadCampaign:
    """Return the cases over their world, which is filled once."""
    model, train, test = model_and_traces(effort)
    machine = two_sided(local_machine(DEVICE, RATE))
    judged = _offload(model, train, test, machine, effort.steps)
    dry = _offload(model, train, train, machine, max(LEAST_DRY_STEPS, effort.steps // 4))
    slots = max(effort.slots) * model.num_moe_layers
    contexts = [int(one.test.position[step.rows].max()) + 1 for one in (judged, dry) for step in one.steps]
    world = OffloadWorld(model, slots, WorldConfig(DEVICE, "float32", RATE, max(contexts), CHUNKS, SEED))
    of = points(effort)
    first = next(iter(of.values()))
    typical = {dry_run(point): point for point in of.values()}
    shared = OffloadValidation(
        model, test, judged.steps, machine, world, partial(judged.program, first), partial(dry.program, first), DEVICE, slots,
        tuple(judged.program(first, CostModel(machine.hardware)).transfers.chunk_bytes), with_cpu=True)
    cases = tuple(OffloadCase(name, offload_family(point), dry_run(point), _builder(judged, point)) for name, point in of.items())
    return OffloadCampaign(shared, cases, {name: _builder(dry, point) for name, point in typical.items()}, train, dry.steps)


def _offload(model: ModelSpec, train: RoutingTrace, part: RoutingTrace, machine: OffloadMachine, max_steps: int) -> Offload:
    steps = closed_loop_steps(part, batch_size=1, max_steps=max_steps, include_prefill=False, repeat=True, seed=SEED)
    return Offload(model, train, part, steps, machine, SEED, chunks=CHUNKS)


def _builder(offload: Offload, point: Point) -> Callable[[CostModel], OffloadProgram]:
    return lambda cost: offload.program(point, cost)


# ---------------------------------------------------------------- diffusion, expert parallelism, kernels

INTERVALS = (1, 2, 4, 8)


def diffusion_units(effort: Effort, number: int) -> Iterator[Unit]:
    """Yield one run of every refresh interval."""
    yield Unit("diffusion", lambda: _diffusion(effort, number))


def _diffusion(effort: Effort, number: int) -> list[Outcome]:
    sizes = RefreshSizes(2, 64, 512, 512)
    found = validate_refresh(_passes(), sizes, budget=16, intervals=INTERVALS, bytes_per_s=RATE, repeats=1,
                             rounds=2 * effort.probe_rounds, seed=SEED + number)
    rows = found.rows[["tau", "predicted_s", "measured_s"]].itertuples(index=False)
    return [Outcome("diffusion: refresh intervals", f"every {tau} steps", number, predicted, measured) for tau, predicted, measured in rows]


@cache
def _passes() -> DenoisePasses:
    settings = DenoiseSettings(1, 2, num_experts=64, top_k=8, blocks_per_request=2, block_size=16, prompt_tokens=16)
    return denoise_passes(denoise_trace(settings, seed=SEED))


def ranks_units(effort: Effort, number: int) -> Iterator[Unit]:
    """Yield the plans on 2 and on 4 ranks."""
    for ranks in (2, 4):
        yield Unit(f"ranks {ranks}", partial(_ranks, effort, ranks, number))


def ranks_family(num_ranks: int) -> str:
    """Return the family; ranks that would share cores run one after another, with modelled exchanges."""
    return f"expert parallel: {num_ranks} ranks" + ("" if _mode(num_ranks) == PROCESSES else ", sequential")


def _mode(num_ranks: int) -> str:
    return PROCESSES if num_ranks <= num_cores() else SEQUENTIAL


def _ranks(effort: Effort, num_ranks: int, number: int) -> list[Outcome]:
    settings = RanksSettings(mode=_mode(num_ranks), device=DEVICE, repeats=1, calibration_share=1.0, seed=SEED + number)
    report = validate_ranks(_ranks_case(effort, num_ranks), settings).report
    return [_ranks_outcome(ranks_family(num_ranks), name, one.kinds, one.runs, number) for name, one in report.plans.items()]


def _ranks_outcome(family: str, name: str, kinds: pd.DataFrame, runs: pd.DataFrame, number: int) -> Outcome:
    rows = kinds[kinds["kind"] != "end to end"]
    apart = dict(zip(rows["kind"], (rows["predicted_s"] - rows["measured_s"]).tolist(), strict=True))
    predicted, measured = (float(runs[column].iloc[0]) for column in ("predicted_s", "measured_s"))
    return Outcome(family, name, number, predicted, measured, apart)


@cache
def _ranks_case(effort: Effort, num_ranks: int) -> RanksCase:
    model, train, test = model_and_traces(effort)
    judged, other = (closed_loop_steps(part, batch_size=16, max_steps=effort.ranks_steps, include_prefill=False, repeat=True, seed=SEED)
                     for part in (test, train))
    return RanksCase(model, test, judged, train, other, _plans(train, num_ranks))


def _plans(train: RoutingTrace, num_ranks: int) -> dict[str, PlacementPlan]:
    found: dict[str, PlacementPlan] = {}
    for solver, extra in (("contiguous", 0), ("lpt", 0), ("eplb", 16)):
        problem = problem_from_trace(train, num_ranks=num_ranks, ranks_per_node=num_ranks, redundant_experts=extra)
        plan = place(problem, solver, seed=SEED, time_limit_s=2.0).plan
        if plan is not None:
            found[solver] = plan
    return found


def kernel_units(effort: Effort, number: int) -> Iterator[Unit]:
    """Yield a calibration in each dtype."""
    model = small_model(ValidationModel(num_layers=1), read_trace(TRACE))
    for dtype in effort.dtypes:
        yield Unit(f"kernels {dtype}", partial(kernel_outcomes, model, dtype=dtype, seconds=effort.kernel_s, number=number, seed=SEED,
                                               device=DEVICE))


# ---------------------------------------------------------------- tables of other machines

GPU, ENGINE, VERSION, MOE_DTYPE, HARDWARE = "h100_sxm", "trtllm", "1.3.0rc20", "fp8_block", "h100-sxm"
TABLE_MODELS = ("qwen3-235b-a22b", "deepseek-v3")


def table_units(effort: Effort, number: int) -> Iterator[Unit]:
    """Yield the check on aiconfigurator's tables; nothing is run, so one round says all."""
    del effort
    yield Unit("aiconfigurator", lambda: tables_outcomes(number))


def tables_absent() -> str:
    """Return why there are no tables here, or nothing."""
    return "" if find_spec("aiconfigurator_core") else "aiconfigurator-core is not installed (pip install aiconfigurator-core, 82 MB)"


def tables_outcomes(number: int) -> list[Outcome]:
    """Return every second size of each model's expert table from the others, and each shape from the other shape, nothing fitted."""
    profiles = {name: import_profile("aiconfigurator", [GPU], model=name, engine=ENGINE, version=VERSION, moe_dtype=MOE_DTYPE)
                for name in TABLE_MODELS}
    tables = {name: expert_table(profile) for name, profile in profiles.items()}
    found = []
    for name, table in tables.items():
        out = held_out_sizes(table.sizes)
        kept, held = (_some(table, [place for place, size in enumerate(table.sizes) if (size in out) == wanted]) for wanted in (False, True))
        found += table_outcomes(kept, held, held.sizes, f"aiconfigurator: other sizes, {name}", number)
    for known, other in itertools.permutations(TABLE_MODELS, 2):
        found += other_shape(profiles[known], known, profiles[other], other, number)
    return found


def _some(table: MeasuredTable, places: list[int]) -> MeasuredTable:
    return dataclasses.replace(table, spread=(), samples=(), sizes=tuple(table.sizes[place] for place in places),
                               seconds=tuple(table.seconds[place] for place in places))


def other_shape(known: CalibrationProfile, name: str, held: CalibrationProfile, held_name: str, number: int) -> list[Outcome]:
    """Return one model's expert times predicted from another's by the ratio of nameplate costs (`calibrate.transfer`)."""
    hardware = load_hardware(HARDWARE)
    cost, device = CostModel(hardware), hardware.ranks[0]
    old, new = (partial(experts_work, as_measured(load_model(model), MOE_DTYPE, profile.fingerprint["moe_tp"]))
                for model, profile in ((name, known), (held_name, held)))
    table, fit, found = expert_table(held), TableFit(expert_table(known)), []
    for size, seconds in zip(table.sizes, table.seconds, strict=True):
        tokens, groups, largest = map(int, size)
        ratio = (cost.grouped_ffn(device, new(tokens, groups, largest)).seconds
                 / cost.grouped_ffn(device, old(tokens, groups, largest)).seconds)
        found.append(Outcome(f"aiconfigurator: other shape, {held_name} from {name}", size_name(table, size), number,
                             fit.lookup(size).seconds * ratio, seconds))
    return found


PARTS = (
    Part("offload", offload_units, ("offload",)),
    Part("diffusion", diffusion_units, ("diffusion: refresh intervals",)),
    Part("ranks", ranks_units, ("expert parallel: 2 ranks", "expert parallel: 4 ranks")),
    Part("kernels", kernel_units),
    Part("aiconfigurator", table_units, rounds=1, absent=tables_absent),
)


def target_of(family: str) -> Target:
    """Return what a family is to reach."""
    if family.startswith("kernels"):
        return KERNELS
    if family.startswith("aiconfigurator"):
        return TABLES
    plain = family == "offload: load" or family.startswith("expert parallel")
    return WITHOUT_OVERLAP if plain else WITH_OVERLAP
