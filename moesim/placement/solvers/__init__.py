"""Solvers: one file each, one entry here. Third parties use the entry-point group ``moesim.solvers``.

A solver is a function ``(problem, *, seed, time_limit_s, **options) -> SolveResult``.
"""

from __future__ import annotations

from collections.abc import Callable

from moesim.placement.result import SolveResult
from moesim.placement.solvers.affinity import affinity
from moesim.placement.solvers.auto import auto
from moesim.placement.solvers.balance import balance
from moesim.placement.solvers.bottleneck import bottleneck
from moesim.placement.solvers.contiguous import contiguous
from moesim.placement.solvers.eplb import eplb
from moesim.placement.solvers.exact import exact
from moesim.placement.solvers.exflow import exflow
from moesim.placement.solvers.ilp import ilp
from moesim.placement.solvers.joint import joint
from moesim.placement.solvers.lpt import lpt
from moesim.placement.solvers.moetuner import moetuner
from moesim.placement.solvers.random_ import random_
from moesim.placement.solvers.sglang import eplb_sglang
from moesim.placement.solvers.tensorrt_llm import eplb_tensorrt_llm
from moesim.placement.solvers.vllm import eplb_vllm
from moesim.registry import Registry

Solver = Callable[..., SolveResult]

SOLVERS: Registry[Solver] = Registry("placement solver", "moesim.solvers", {
    "contiguous": contiguous,
    "random": random_,
    "lpt": lpt,
    "eplb": eplb,
    "eplb-vllm": eplb_vllm,
    "eplb-sglang": eplb_sglang,
    "eplb-tensorrt-llm": eplb_tensorrt_llm,
    "balance": balance,
    "affinity": affinity,
    "exflow": exflow,
    "moetuner": moetuner,
    "ilp": ilp,
    "joint": joint,
    "exact": exact,
    "bottleneck": bottleneck,
    "auto": auto,
})
