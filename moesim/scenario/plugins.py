"""The user's own policies, prefetchers, miss rules and solvers, from a Python file that the user names.

The file is run, as any program of the user's is: name only files that you trust. It sets one or more of these dicts, each from
names to what the registry of that family holds::

    POLICIES = {"mine": MyPolicy}            # moesim.cache.policy
    PREFETCHERS = {"mine": MyPrefetcher}     # moesim.cache.prefetch
    MISS_RULES = {"mine": MyRule}            # moesim.lowering.misses.registry
    SOLVERS = {"mine": my_solver}            # moesim.placement.solvers
"""

from __future__ import annotations

import importlib.util
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from moesim.cache.policy import POLICIES, information_level
from moesim.cache.prefetch import PREFETCHERS
from moesim.errors import InputError
from moesim.lowering.misses.registry import MISS_RULES
from moesim.placement.solvers import SOLVERS
from moesim.registry import Registry

FAMILIES: dict[str, Registry[Any]] = {
    "POLICIES": POLICIES, "PREFETCHERS": PREFETCHERS, "MISS_RULES": MISS_RULES, "SOLVERS": SOLVERS}
_DECLARE = ("POLICIES", "PREFETCHERS", "MISS_RULES")


def load_plugins(files: Iterable[Path]) -> list[str]:
    """Run the files and register what they define; returns the names.

    Raises:
        InputError: no such file, an error in it (with its line), nothing to register, a name that is taken, or a policy,
            prefetcher or rule that does not declare what it may know.
    """
    return [name for file in files for name in _register(file, _run(file))]


def _run(file: Path) -> ModuleType:
    if file.suffix != ".py" or not file.is_file():
        raise InputError(f"{file}: --plugin needs a Python file")
    name = f"moesim_plugin_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise InputError(f"{file}{_line_of(error, file)}: {type(error).__name__}: {error}") from error
    return module


def _line_of(error: Exception, file: Path) -> str:
    if isinstance(error, SyntaxError):
        return f":{error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == file]
    return f":{lines[-1]}" if lines else ""


def _register(file: Path, module: ModuleType) -> list[str]:
    names = []
    for family, registry in FAMILIES.items():
        entries = getattr(module, family, {})
        if not isinstance(entries, dict) or not all(isinstance(n, str) and callable(e) for n, e in entries.items()):
            raise InputError(f"{file}: {family} must be a dict from names to classes or functions")
        for name, entry in entries.items():
            if family in _DECLARE:
                information_level(entry, f"{file}: {registry.kind} {name!r}")
            try:
                registry.add(name, entry)
            except InputError as error:
                raise InputError(f"{file}: {error}") from None
            names.append(name)
    if not names:
        raise InputError(f"{file}: defines none of {', '.join(FAMILIES)}; see docs/policies.md")
    return names
