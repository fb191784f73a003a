"""Objectives: what a plan is judged by, each with the execution model in which it matters.

One file per family, one entry here. `home` execution: every token's attention runs on its home rank and tokens
return there after each layer (DeepEP and the engines built on it). `coherent` execution: a token's attention runs
wherever it is, and it moves on from layer to layer (ExFlow's context-coherent expert parallelism).
"""

from __future__ import annotations

from moesim.placement.objectives.affinity import AFFINITY, HOPS
from moesim.placement.objectives.balance import BALANCE
from moesim.placement.objectives.bottleneck import BOTTLENECK
from moesim.placement.objectives.fanout import FANOUT
from moesim.placement.objectives.migration import MIGRATION
from moesim.placement.objectives.objective import Objective
from moesim.placement.objectives.step_time import STEP_TIME
from moesim.registry import Registry

OBJECTIVES: Registry[Objective] = Registry("objective", "moesim.objectives", {
    one.name: one for one in (BALANCE, AFFINITY, HOPS, BOTTLENECK, FANOUT, STEP_TIME, MIGRATION)})
