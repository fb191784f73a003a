"""How many tokens a plan needs to be made from before its gain is real on other tokens."""

from __future__ import annotations

import math

PAIRS_PER_CELL = 3.0
USES_PER_EXPERT = 200.0


def tokens_needed(num_experts: int, top_k: int, objectives: tuple[str, ...]) -> int:
    """Return the tokens below which a plan for these objectives mostly fits noise.

    What is counted for transitions and token sets are E^2 cells of pairs, k^2 pairs per token: with fewer than some
    3 pairs per cell a plan loses more than a few percent of what it keeps when the tokens change (64 experts, top-1:
    .437 kept on the 300 tokens that it was made from, .211 on others; .354 and .347 with 10,000). Loads are E counts: 200 uses
    of an expert give its load to 7 %.
    """
    pairs = {"affinity", "hops", "bottleneck", "fanout", "step_time"} & set(objectives)
    by_load = USES_PER_EXPERT * num_experts / top_k
    by_pairs = PAIRS_PER_CELL * num_experts**2 / top_k**2 if pairs else 0.0
    return math.ceil(max(by_load, by_pairs))
