"""One small run of every engine: what `compile_ahead` compiles the kernels with."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from moesim.cache.cache import ExpertCache
from moesim.cache.policy import PolicyContext, access_stream, make_policy
from moesim.hardware.cost import CostModel
from moesim.hardware.load import load_hardware
from moesim.lowering.expert_parallel import ExpertParallelProgram
from moesim.lowering.machine import offload_machine
from moesim.lowering.offload import OffloadProgram
from moesim.lowering.offload_policy import OffloadPolicy
from moesim.model.spec import AttentionSpec, ModelSpec
from moesim.placement.plan import PlacementPlan
from moesim.traces.steps import closed_loop_steps
from moesim.traces.synth import synthetic_trace

_LAYERS, _EXPERTS, _TOP_K = 2, 4, 2


def run_small_cases() -> None:
    """Run each engine once on a model of two layers; a second call compiles nothing."""
    from moesim.lowering.expert_parallel_times import step_ends_ns
    from moesim.simulate.compiled_executor import execute_program
    from moesim.simulate.executors import execute_compiled, offload_times
    from moesim.simulate.run import simulate

    for program in small_programs():
        simulate(program, executor=execute_compiled)
    execute_program(_offload("lru"))
    offload_times(_offload("lru"))
    step_ends_ns(_expert_parallel())
    _what_if()


def small_programs() -> Iterator[OffloadProgram | ExpertParallelProgram]:
    """Yield an offload program of each kind of cache policy, and an expert-parallel one."""
    for policy in ("lru", "lfu", "belady", "static"):
        yield _offload(policy)
    yield _expert_parallel()


def _expert_parallel() -> ExpertParallelProgram:
    trace = synthetic_trace(16, _LAYERS, _EXPERTS, _TOP_K, 4, seed=0)
    steps = closed_loop_steps(trace, batch_size=2, max_steps=2, seed=0)
    hardware = load_hardware("h100-sxm", gpus_per_node=2)
    plan = PlacementPlan(np.tile(np.arange(_EXPERTS), (_LAYERS, 1)), 2, _EXPERTS)
    return ExpertParallelProgram(_model(), trace, steps, plan, CostModel(hardware))


def _offload(policy: str) -> OffloadProgram:
    model, trace = _model(), synthetic_trace(16, _LAYERS, _EXPERTS, _TOP_K, 4, seed=0)
    steps = closed_loop_steps(trace, batch_size=2, max_steps=3, seed=0)
    context = PolicyContext(_LAYERS, _EXPERTS, np.ones((_LAYERS, _EXPERTS)), access_stream(trace, [step.rows for step in steps]))
    hardware = load_hardware("rtx-4090")
    cache = ExpertCache(_LAYERS, _EXPERTS, 2, make_policy(policy, context))
    return OffloadProgram(model, trace, steps, offload_machine(hardware), CostModel(hardware), cache, OffloadPolicy())


def _what_if() -> None:
    from moesim.lowering.offload_works import work_ns
    from moesim.simulate.executors import execute_compiled
    from moesim.simulate.what_if import what_if

    program = _offload("lru")
    run = what_if(execute_compiled(program).arrays, program.steps)
    run.step_ns(work_ns(run.works, program.model, program.machine, program.cost)[None])


def _model() -> ModelSpec:
    return ModelSpec(
        name="small", num_layers=_LAYERS, moe_layers=tuple(range(_LAYERS)), num_experts=_EXPERTS, top_k=_TOP_K, hidden_size=64,
        expert_intermediate_size=96, shared_intermediate_size=32, attention=AttentionSpec(4, 2, 16), vocab_size=128)
