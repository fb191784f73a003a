"""The registry of miss rules, open to third parties through the entry-point group ``moesim.misses``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from moesim.cache.policy import information_level
from moesim.errors import InputError, did_you_mean
from moesim.lowering.misses.cpu import CpuMissRule, CpuOnlyRule
from moesim.lowering.misses.dali import DaliRule
from moesim.lowering.misses.exact import ExactRule
from moesim.lowering.misses.fiddler import FiddlerRepositoryRule, FiddlerRule
from moesim.lowering.misses.hybrimoe import HybriMoeRepositoryRule, HybriMoeRule
from moesim.lowering.misses.ktransformers import KTransformersRule
from moesim.lowering.misses.llamacpp import LlamaCppRule
from moesim.lowering.misses.load import LoadRule
from moesim.lowering.misses.rule import MissRule
from moesim.registry import Registry

MISS_RULES: Registry[Callable[..., MissRule]] = Registry("miss rule", "moesim.misses", {
    "load": LoadRule,
    "gpu-only": LoadRule,
    "cpu": CpuMissRule,
    "cpu-only": CpuOnlyRule,
    "fiddler": FiddlerRule,
    "fiddler-repository": FiddlerRepositoryRule,
    "hybrimoe": HybriMoeRule,
    "hybrimoe-repository": HybriMoeRepositoryRule,
    "dali": DaliRule,
    "exact": ExactRule,
    "ktransformers": KTransformersRule,
    "llamacpp": LlamaCppRule,
})


def make_rule(name: str, **options: Any) -> MissRule:
    """Return a rule with these options.

    Raises:
        InputError: an unknown name or option, an option's value that the rule refuses, or a rule that declares no
            information level.
    """
    factory = MISS_RULES[name]
    information_level(factory, f"miss rule {name!r}")
    known = list(inspect.signature(factory).parameters)
    for option in options:
        if option not in known:
            hint = did_you_mean(option, known) if known else " It has none."
            raise InputError(f"miss rule {name!r}: unknown option {option!r}.{hint}")
    return factory(**options)
