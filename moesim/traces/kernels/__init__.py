"""Compiled loops of `moesim.traces` (numba); imported inside functions only."""
