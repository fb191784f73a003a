"""Compiled loops of `moesim.simulate` (numba); imported inside functions only."""
