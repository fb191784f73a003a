"""Placement: the problem, the plan, solvers with proven bounds, metrics. Start at `place.place`."""
