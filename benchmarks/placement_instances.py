"""The placement instances of `benchmarks/placement.py`: the project's own generator at the sizes of real models."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from moesim.placement.place import problem_from_trace
from moesim.placement.problem import PlacementProblem
from moesim.traces.blocks import block_trace
from moesim.traces.trace import RoutingTrace

NUM_TOKENS = 20_000


@dataclass(frozen=True)
class Instance:
    """One trace to place: sizes, the generator's strength of structure, and its seed."""

    name: str
    num_layers: int
    num_experts: int
    top_k: int
    strength: float
    zipf: float
    seed: int = 0

    def trace(self) -> RoutingTrace:
        """Return the instance's trace (kept, once made)."""
        return _trace(self)

    def problem(self, num_ranks: int, ranks_per_node: int, **more: object) -> PlacementProblem:
        """Return the problem of placing it on a cluster."""
        return problem_from_trace(self.trace(), num_ranks=num_ranks, ranks_per_node=ranks_per_node,
                                  **more)  # type: ignore[arg-type]


@cache
def _trace(one: Instance) -> RoutingTrace:
    return block_trace(NUM_TOKENS, one.num_layers, one.num_experts, one.top_k, strength=one.strength, zipf=one.zipf,
                       seed=one.seed)


MIXTRAL = Instance("32 x 8 top-2", 32, 8, 2, 2.0, 0.4)
SWITCH = tuple(Instance(f"24 x 64 top-1, strength {strength:g}, seed {seed}", 24, 64, 1, strength, 0.5, seed)
               for strength in (1.0, 2.0, 4.0) for seed in (0, 1))
DEEPSEEK = Instance("58 x 256 top-8", 58, 256, 8, 0.5, 0.4)
