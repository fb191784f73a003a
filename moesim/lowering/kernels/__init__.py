"""Compiled loops of `moesim.lowering` (numba); imported inside functions only."""
