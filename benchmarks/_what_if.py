"""How many token-points a sweep does per second: decisions once, then every machine (`simulate.what_if`)."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median

import numpy as np

from moesim.hardware.cost import CostModel
from moesim.hardware.load import load_hardware
from moesim.lowering.machine import offload_machine
from moesim.lowering.offload_works import work_ns
from moesim.model.catalog import load_model
from moesim.scenario.offload import Offload
from moesim.scenario.schema import Point
from moesim.simulate.executors import execute_compiled
from moesim.simulate.what_if import what_if
from moesim.traces.blocks import block_trace
from moesim.traces.split import split_requests
from moesim.traces.steps import closed_loop_steps

SEED = 0


@dataclass(frozen=True)
class WhatIfRate:
    """One sweep: tokens times machines per CPU second; `decide_s` is the one run that takes the decisions."""

    name: str
    tokens: int
    machines: int
    patterns: int
    decide_s: float
    price_s: float
    time_s: float

    @property
    def token_points_per_s(self) -> float:
        """Token-points per CPU second, pricing of every machine included; the decisions are shared."""
        return self.tokens * self.machines / (self.price_s + self.time_s)


def what_if_rate(name: str, model_name: str, hardware_name: str, slots: int, num_tokens: int = 1024,
                 num_machines: int = 256, repeats: int = 3) -> WhatIfRate:
    """Measure one model on one machine with LRU, copies of misses, one token per step."""
    model, hardware = load_model(model_name), load_hardware(hardware_name)
    trace = block_trace(2 * num_tokens, model.num_moe_layers, model.num_experts, model.top_k, seed=SEED)
    train, test = split_requests(trace, 0.5, SEED)
    steps = closed_loop_steps(test, batch_size=1, max_steps=num_tokens, include_prefill=False, repeat=True, seed=SEED)
    offload = Offload(model, train, test, steps, offload_machine(hardware), SEED)
    rates = np.geomspace(8e9, 128e9, num_machines)
    program = offload.program(Point("lru", slots), CostModel(hardware))
    start = time.process_time()
    run = what_if(execute_compiled(program).arrays, program.steps)
    decide_s = time.process_time() - start
    run.step_ns(np.ones((1, len(run.works)), np.int64))
    price, timed = [], []
    for _ in range(repeats):
        start = time.process_time()
        durations = np.stack([_durations(run.works, offload, rate) for rate in rates])
        priced = time.process_time()
        run.step_ns(durations)
        price.append(priced - start)
        timed.append(time.process_time() - priced)
    return WhatIfRate(name, len(steps), num_machines, len(run.patterns.offsets) - 1, decide_s, median(price), median(timed))


def _durations(works: object, offload: Offload, rate: float) -> np.ndarray:
    import dataclasses

    from moesim.hardware.vary import vary

    machine = dataclasses.replace(offload.machine, hardware=vary(offload.machine.hardware, {"pcie.bytes_per_s": float(rate)}))
    return work_ns(works, offload.model, machine, CostModel(machine.hardware))  # type: ignore[arg-type]
