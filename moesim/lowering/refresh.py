"""Diffusion language models on a GPU and a CPU: a set of experts per layer that is refreshed every now and then.

A layer keeps `budget` experts on the GPU. The experts of a pass that are missing there are computed by the CPU, one call
each. A refresh happens after the router of the pass whose counts it uses, so that this pass profits already; it moves
whole experts and is waited for (TIDE, arXiv 2605.20179, and its released code). The layers of a pass follow one another,
so its time is the sum over layers of what each one takes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from moesim.errors import InputError, unknown
from moesim.hardware.cost import CostModel
from moesim.hardware.work import DenseWork
from moesim.lowering.machine import OffloadMachine
from moesim.lowering.work import attention_work, dense_work, experts_work, head_work, router_work, shared_work
from moesim.model.spec import ModelSpec
from moesim.traces.denoise_passes import DenoisePasses
from moesim.traces.trace import RoutingTrace
from moesim.units import ns_from_s

CONTENTS = ("counts", "released")


@dataclass(frozen=True)
class RefreshCosts:
    """Whole nanoseconds of what a layer does.

    Attributes:
        gpu_ns, cpu_ns: int64[tokens], one expert's call with so many tokens (index 0: no call, 0 ns); on the CPU with
            the way of its rows there and back.
        in_ns, out_ns: one expert to the GPU, and back (0: the host keeps a copy, so that an evicted expert is dropped).
        overlap: whether GPU and CPU work at the same time (the paper's text) or one after the other (the released code).
    """

    gpu_ns: np.ndarray
    cpu_ns: np.ndarray
    in_ns: int
    out_ns: int = 0
    overlap: bool = True

    def __post_init__(self) -> None:
        for table in (self.gpu_ns, self.cpu_ns):
            if table.ndim != 1 or table.shape != self.gpu_ns.shape or table[0] != 0 or table.min() < 0:
                raise InputError("refresh costs: gpu_ns and cpu_ns must be int64[tokens], not negative, 0 for no tokens")
            table.setflags(write=False)
        if min(self.in_ns, self.out_ns) < 0:
            raise InputError(f"refresh costs: a move cannot take {self.in_ns} or {self.out_ns} ns")

    def layer_ns(self, gpu_ns: np.ndarray, cpu_ns: np.ndarray) -> np.ndarray:
        """Return the time of the experts from that of the two sides."""
        return np.maximum(gpu_ns, cpu_ns) if self.overlap else gpu_ns + cpu_ns

    def move_ns(self, promotions: np.ndarray, demotions: np.ndarray) -> np.ndarray:
        """Return the time of a refresh that takes so many experts in and out; the copies go one after another."""
        return promotions * self.in_ns + demotions * self.out_ns


def refresh_costs(model: ModelSpec, machine: OffloadMachine, cost: CostModel, max_tokens: int, *,
                  write_back: bool = False, overlap: bool = True) -> RefreshCosts:
    """Return the costs of a model on a machine, each call priced as `OffloadProgram` prices its tasks.

    Args:
        max_tokens: the largest number of tokens that one expert gets in a pass.
        write_back: whether an evicted expert is copied back to the host, as the released code does.

    Raises:
        InputError: the CPU cannot compute where the experts lie.
    """
    if not machine.cpu_sees_experts:
        raise InputError(f"refresh: the CPU computes misses, but the experts lie in {machine.slow_memory!r}")
    overhead = {kind: cost.task_overhead(kind).seconds for kind in ("expert", "cpu_expert", "send", "receive", "load")}
    gpu, cpu = np.zeros(max_tokens + 1, np.int64), np.zeros(max_tokens + 1, np.int64)
    for tokens in range(1, max_tokens + 1):
        work = experts_work(model, tokens, 1, tokens)
        gpu[tokens] = ns_from_s(cost.grouped_ffn(machine.device, work).seconds + overhead["expert"])
        cpu[tokens] = ns_from_s(cost.grouped_ffn(machine.cpu, work).seconds + overhead["cpu_expert"])
        if not machine.shares_memory:
            rows_s = machine.activation_copy(cost, round(tokens * model.hidden_size * model.activation_bytes)).seconds
            cpu[tokens] += ns_from_s(rows_s + overhead["send"]) + ns_from_s(rows_s + overhead["receive"])
    there, back = (machine.slow_memory, machine.fast_memory), (machine.fast_memory, machine.slow_memory)
    in_ns = ns_from_s(cost.route_copy(*there, model.expert_bytes).seconds + overhead["load"])
    out_ns = ns_from_s(cost.route_copy(*back, model.expert_bytes).seconds + overhead["load"]) if write_back else 0
    return RefreshCosts(gpu, cpu, in_ns, out_ns, overlap)


@dataclass(frozen=True)
class RefreshProblem:
    """What a refresh policy is run on; read-only arrays.

    Attributes:
        passes: the passes and their counts.
        budget: GPU experts per layer.
        initial: bool[layer, expert], the set before the first pass.
        targets: bool[step, layer, expert], the set that a refresh at this step leaves (`target_sets`).
        other_ns: int64[step], all of the pass that no refresh changes: attention, routers, shared and dense parts, head.

    Raises:
        InputError: shapes that disagree, sets of another size than the budget.
    """

    passes: DenoisePasses
    costs: RefreshCosts
    budget: int
    initial: np.ndarray
    targets: np.ndarray
    other_ns: np.ndarray
    call_gpu_ns: np.ndarray = field(init=False, repr=False)
    call_cpu_ns: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        shape = self.passes.counts.shape
        if self.initial.shape != shape[1:] or self.targets.shape != shape or self.other_ns.shape != shape[:1]:
            raise InputError(f"refresh: sets of shape {self.initial.shape} and {self.targets.shape} and other_ns of "
                             f"{self.other_ns.shape} do not fit counts of {shape}")
        sizes = (self.initial.sum(axis=-1), self.targets.sum(axis=-1))
        if any((size != self.budget).any() for size in sizes):
            raise InputError(f"refresh: every set must hold {self.budget} experts")
        if self.passes.counts.max() >= len(self.costs.gpu_ns):
            raise InputError(f"refresh: an expert gets {self.passes.counts.max()} tokens, the costs end at "
                             f"{len(self.costs.gpu_ns) - 1}")
        object.__setattr__(self, "call_gpu_ns", self.costs.gpu_ns[self.passes.counts])
        object.__setattr__(self, "call_cpu_ns", self.costs.cpu_ns[self.passes.counts])
        for value in (self.initial, self.targets, self.other_ns, self.call_gpu_ns, self.call_cpu_ns):
            value.setflags(write=False)

    @property
    def num_steps(self) -> int:
        """Number of passes."""
        return self.passes.num_steps

    @property
    def num_layers(self) -> int:
        """Number of MoE layers."""
        return self.passes.counts.shape[1]

    def experts_ns(self, step: int, resident: np.ndarray) -> np.ndarray:
        """Return int64[layer], the time of the experts of a pass with bool[layer, expert] on the GPU."""
        gpu = np.where(resident, self.call_gpu_ns[step], 0).sum(axis=1)
        cpu = np.where(resident, 0, self.call_cpu_ns[step]).sum(axis=1)
        return self.costs.layer_ns(gpu, cpu)

    def moves_ns(self, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        """Return int64[...], the time to go from one set bool[..., expert] to another."""
        return self.costs.move_ns((after & ~before).sum(axis=-1), (before & ~after).sum(axis=-1))


def refresh_problem(model: ModelSpec, trace: RoutingTrace, passes: DenoisePasses, machine: OffloadMachine,
                    cost: CostModel, budget: int, *, popularity: np.ndarray | None = None, write_back: bool = False,
                    overlap: bool = True) -> RefreshProblem:
    """Return the problem of a trace's denoising passes on a machine.

    Args:
        budget: GPU experts per layer.
        popularity: int[layer, expert], how often training requests used each expert; the most used ones are there
            at the start, and ties of counts go by it. Without it the first `budget` experts are (the released code).
        write_back, overlap: as in `refresh_costs`.

    Raises:
        InputError: another model's trace, a budget out of range, or experts that do not fit on the GPU.
    """
    trace.check_model(model)
    if not 1 <= budget <= model.num_experts:
        raise InputError(f"refresh: budget must be 1 ... {model.num_experts} experts per layer, got {budget}")
    machine.check_memory(model, budget * model.num_moe_layers, int(passes.block_end.max()))
    shape = model.num_moe_layers, model.num_experts
    prior = np.zeros(shape, np.int64) if popularity is None else np.asarray(popularity, np.int64)
    if prior.shape != shape:
        raise InputError(f"refresh: popularity must be [layer, expert] = {shape}, got {prior.shape}")
    costs = refresh_costs(model, machine, cost, int(passes.counts.max()), write_back=write_back, overlap=overlap)
    return RefreshProblem(passes, costs, budget, top_sets(prior, budget), target_sets(passes.counts, budget, prior),
                          other_ns(model, trace, passes, machine.device, cost))


def top_sets(rank: np.ndarray, budget: int) -> np.ndarray:
    """Return bool[..., expert], the `budget` largest of int[..., expert]; the lower id wins a tie."""
    order = np.argsort(-rank, axis=-1, kind="stable")[..., :budget]
    found = np.zeros(rank.shape, bool)
    np.put_along_axis(found, order, True, axis=-1)
    return found


def target_sets(counts: np.ndarray, budget: int, prior: np.ndarray) -> np.ndarray:
    """Return bool[step, layer, expert], the set that a refresh at a step leaves: the most used experts of that pass.

    Ties (among them the experts that the pass does not use) go to the expert used more so far, `prior`
    int64[layer, expert] included. So the set depends on the routing up to its step, and not on earlier refreshes.
    """
    so_far = np.cumsum(counts, axis=0) - counts + prior
    return top_sets(counts * (int(so_far.max()) + 1) + so_far, budget)


def other_ns(model: ModelSpec, trace: RoutingTrace, passes: DenoisePasses, device: str, cost: CostModel) -> np.ndarray:
    """Return int64[step], the time of a pass without its routed experts on `device`, one operation after another.

    Tokens of the active block attend to all of it and to what is before; routed tokens before it to what is before them.
    The head is applied to the active block.
    """
    found = np.zeros(passes.num_steps, np.int64)
    for step in range(passes.num_steps):
        found[step] = sum(times * ns_from_s(cost.dense(device, work).seconds + cost.task_overhead(work.op).seconds)
                          for times, work in pass_works(model, trace, passes, step))
    return found


def pass_works(model: ModelSpec, trace: RoutingTrace, passes: DenoisePasses, step: int) -> list[tuple[int, DenseWork]]:
    """Return (times, work) of the operations of a pass that are no routed expert (see `other_ns`)."""
    rows, active = passes.rows[step], int(passes.active[step])
    before = np.sort(trace.position[rows])[:len(rows) - active]
    context = active * int(passes.block_end[step]) + int((before + 1).sum())
    works = [(model.num_layers, attention_work(model, len(rows), context)), (1, head_work(model, active)),
             (model.num_moe_layers, router_work(model, len(rows)))]
    if model.shared_intermediate_size:
        works.append((model.num_moe_layers, shared_work(model, len(rows))))
    if model.num_dense_layers:
        works.append((model.num_dense_layers, dense_work(model, len(rows))))
    return works


@dataclass(frozen=True)
class RefreshResult:
    """What a schedule cost, int64[step, layer] each.

    `gpu_ns` and `cpu_ns` are the two sides' calls, `experts_ns` what they take together, `move_ns` the refresh;
    `promotions` and `demotions` count experts, `misses` and `miss_tokens` the CPU's calls and their tokens. `refreshed` is
    bool[step, layer]. `other_ns` int64[step] is the rest of the pass.
    """

    refreshed: np.ndarray
    gpu_ns: np.ndarray
    cpu_ns: np.ndarray
    experts_ns: np.ndarray
    move_ns: np.ndarray
    promotions: np.ndarray
    demotions: np.ndarray
    misses: np.ndarray
    miss_tokens: np.ndarray
    other_ns: np.ndarray

    @property
    def layer_ns(self) -> np.ndarray:
        """int64[layer], experts and moves over all passes: what a schedule can change."""
        return (self.experts_ns + self.move_ns).sum(axis=0)

    @property
    def schedule_ns(self) -> int:
        """Experts and moves over all passes and layers."""
        return int(self.layer_ns.sum())

    @property
    def total_ns(self) -> int:
        """All passes."""
        return self.schedule_ns + int(self.other_ns.sum())


def run_schedule(problem: RefreshProblem, refresh: np.ndarray, *, contents: str = "counts") -> RefreshResult:
    """Walk through the passes and refresh where bool[step, layer] says so.

    Args:
        contents: what a refresh leaves. ``counts``: the step's set of `RefreshProblem.targets`. ``released``: as the
            released code: the used experts among the `budget` most used come in, and for each one a resident that is not
            among them goes, in order of id (there: in the order of a Python set), however often it is used.

    Raises:
        InputError: a schedule of another shape, or unknown contents.
    """
    shape = problem.num_steps, problem.num_layers
    if refresh.shape != shape or refresh.dtype != np.bool_:
        raise InputError(f"refresh: a schedule must be bool[step, layer] = {shape}, got {refresh.dtype}{refresh.shape}")
    if contents not in CONTENTS:
        raise unknown("refresh contents", contents, CONTENTS)
    resident = problem.initial
    names = ("gpu_ns", "cpu_ns", "experts_ns", "move_ns", "promotions", "demotions", "misses", "miss_tokens")
    table = {name: np.zeros(shape, np.int64) for name in names}
    for step in range(problem.num_steps):
        after = problem.targets[step] if contents == "counts" else _released(problem, step, resident)
        after = np.where(refresh[step][:, None], after, resident)
        for name, value in _step_row(problem, step, resident, after).items():
            table[name][step] = value
        resident = after
    return RefreshResult(refreshed=refresh.copy(), other_ns=problem.other_ns, **table)


def _step_row(problem: RefreshProblem, step: int, before: np.ndarray, after: np.ndarray) -> dict[str, np.ndarray]:
    counts = problem.passes.counts[step]
    gpu = np.where(after, problem.call_gpu_ns[step], 0).sum(axis=1)
    cpu = np.where(after, 0, problem.call_cpu_ns[step]).sum(axis=1)
    promotions, demotions = (after & ~before).sum(axis=1), (before & ~after).sum(axis=1)
    return {"gpu_ns": gpu, "cpu_ns": cpu, "experts_ns": problem.costs.layer_ns(gpu, cpu),
            "move_ns": problem.costs.move_ns(promotions, demotions), "promotions": promotions, "demotions": demotions,
            "misses": (~after & (counts > 0)).sum(axis=1), "miss_tokens": np.where(after, 0, counts).sum(axis=1)}


def _released(problem: RefreshProblem, step: int, resident: np.ndarray) -> np.ndarray:
    counts = problem.passes.counts[step]
    wanted = top_sets(counts, problem.budget) & (counts > 0)
    promoted = wanted & ~resident
    spare = resident & ~wanted
    leaves = spare & (np.cumsum(spare, axis=1) <= promoted.sum(axis=1)[:, None])
    return (resident & ~leaves) | promoted
