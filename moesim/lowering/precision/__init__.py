"""Offloaded inference with experts in several widths: HOBBIT, EdgeMoE and D2MoE as programs."""
