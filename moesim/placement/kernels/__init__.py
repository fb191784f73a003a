"""Compiled inner loops (numba). Modules here import numba at the top: import them inside functions only."""
