"""Re-check counting bounds on the largest rank load, in whole numbers and fractions."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np

from moesim.errors import CheckError
from moesim.placement.certificate import Certificate
from moesim.placement.problem import PlacementProblem


def check_counting(problem: PlacementProblem, certificate: Certificate) -> float:
    """Return a bound on ``sum_l max_r load[l, r]`` that the certificate's ``layer_bound`` float64[layer] supports.

    A layer's bound B counts if one of three facts holds, each exact in fractions: the mean rank load is at least B;
    or, for copies of which every share is below B, the experts need ``sum_e (floor(load_e / B) + 1)`` slots, more than
    there are; or, with one slot per expert, some j heaviest-first positions force a rank to B (pigeonhole: of j R + 1
    experts one of R ranks holds j + 1). Otherwise the layer counts with its mean alone.

    Raises:
        CheckError: ``layer_bound`` is missing, has another shape, or is not finite.
    """
    claimed = certificate.arrays.get("layer_bound")
    if claimed is None or claimed.shape != (problem.num_layers,) or claimed.dtype.kind != "f":
        raise CheckError(f"counting certificate: layer_bound must be float64[{problem.num_layers}]")
    if not np.all(np.isfinite(claimed)):
        raise CheckError("counting certificate: layer_bound must be finite")
    total = Fraction(0)
    for load, bound in zip(problem.expert_load, claimed, strict=True):
        tokens = [Fraction(float(value)) for value in load]
        mean = sum(tokens, Fraction(0)) / problem.num_ranks
        wanted = Fraction(float(bound))
        holds = wanted > mean and (_too_few_slots(tokens, wanted, problem.num_slots)
                                   or _whole(tokens, wanted, problem) or _pigeonhole(tokens, wanted, problem))
        total += wanted if holds else mean if wanted > mean else wanted
    return _below(total)


def _too_few_slots(tokens: list[Fraction], bound: Fraction, num_slots: int) -> bool:
    """Whether copies that all carry less than `bound` need more slots than there are."""
    return bound > 0 and sum(math.floor(value / bound) + 1 for value in tokens) > num_slots


def _whole(tokens: list[Fraction], bound: Fraction, problem: PlacementProblem) -> bool:
    """Whether whole loads without copies force a whole largest load of at least `bound`."""
    if problem.num_slots != len(tokens) or any(value.denominator != 1 for value in tokens):
        return False
    return math.ceil(sum(tokens) / problem.num_ranks) >= bound


def _pigeonhole(tokens: list[Fraction], bound: Fraction, problem: PlacementProblem) -> bool:
    if problem.num_slots != len(tokens):
        return False
    rising, size = sorted(tokens), problem.slots_per_rank
    for held in range(1, size + 1):
        heavy = rising[len(rising) - ((held - 1) * problem.num_ranks + 1):]  # one rank has `held` of these
        if sum(heavy[:held]) + sum(rising[:size - held]) >= bound:
            return True
    return False


def _below(value: Fraction) -> float:
    """Return the largest float64 that is not above `value`."""
    near = float(value)
    return near if Fraction(near) <= value else math.nextafter(near, -math.inf)


CHECKS: dict[str, Callable[[PlacementProblem, Certificate], float]] = {"counting": check_counting}
