"""Compiled loops of `moesim.cache` (numba); imported inside functions only."""
