"""Proven bounds, one file per method. `moesim.placement.prove` picks among them."""

from moesim.placement.bounds.balance import balance_bound, copies_by_load
from moesim.placement.bounds.matching import affinity_bound, counted_transitions

__all__ = ["affinity_bound", "balance_bound", "copies_by_load", "counted_transitions"]
