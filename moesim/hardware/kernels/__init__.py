"""Compiled loops of `moesim.hardware` (numba); imported inside functions only."""
