"""Re-check bounds and plans with code that shares nothing with the solvers (see `verify.verify`)."""
