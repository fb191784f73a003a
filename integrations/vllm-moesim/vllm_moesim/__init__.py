"""vLLM plug-in: expert placement by a moesim plan (`MOESIM_EPLB_PLAN`), routing from a trace (`MOESIM_ROUTING`)."""

from __future__ import annotations

import os

PLAN_VARIABLE, ROUTING_VARIABLE, STRATEGY = "MOESIM_EPLB_PLAN", "MOESIM_ROUTING", "moesim"


def register() -> None:
    """Put in place what the environment names; vLLM calls this in every process, and may call it again.

    Raises:
        ImportError, KeyError: a vLLM whose policy table or routing simulator is elsewhere.
        ValueError: a file that is not what its variable promises.
    """
    if plan := os.environ.get(PLAN_VARIABLE):
        from vllm_moesim.policy import install_policy

        install_policy(plan)
    if routing := os.environ.get(ROUTING_VARIABLE):
        from vllm_moesim.routing import install_strategy

        install_strategy(STRATEGY, routing)
