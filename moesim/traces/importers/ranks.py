"""Counts and ids of several ranks: one after another, or the same tokens counted by each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from moesim.errors import InputError

RANKS = ("auto", "sum", "one")


def joined_counts(per_rank: Sequence[np.ndarray], ranks: str, notes: list[str]) -> np.ndarray:
    """Return the counts of all ranks: their sum, or one rank's where every rank counted the same tokens.

    Without data parallelism of attention each rank sees every token, so a sum would be a multiple.

    Args:
        per_rank: int64 arrays of one shape, one per rank.
        ranks: "sum", "one", or "auto" (one if they are all the same, else the sum).

    Raises:
        InputError: another word, or "one" for ranks that differ.
    """
    if ranks not in RANKS:
        raise InputError(f"ranks must be one of {', '.join(RANKS)}, got {ranks!r}")
    same = len(per_rank) > 1 and all(np.array_equal(array, per_rank[0]) for array in per_rank[1:])
    if ranks == "one" and len(per_rank) > 1 and not same:
        raise InputError("ranks=one: the ranks counted different tokens")
    if same and ranks != "sum":
        notes.append(f"all {len(per_rank)} ranks counted the same tokens (no data parallelism): one of them is taken; "
                     f"ranks=sum adds them up")
        return per_rank[0]
    if len(per_rank) > 1:
        notes.append(f"the counts of {len(per_rank)} ranks are added up")
    total = np.zeros_like(per_rank[0])
    for array in per_rank:
        if (array > np.iinfo(np.int64).max // (2 * len(per_rank))).any():
            raise InputError("counts too large to add up")
        total = total + array
    return total
