"""The errors a user can meet, and how they are worded: what is wrong, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MoesimError(Exception):
    """Base of every error that moesim raises on purpose; the command line prints it on one line."""


class InputError(MoesimError):
    """A file, key or value that the user gave is wrong. The message names it and what was expected."""


class CheckError(MoesimError):
    """A plan, graph or result broke a rule that must hold (a capacity, a conservation law)."""


class SolverError(MoesimError):
    """A solver ended without a usable answer (infeasible, or out of time with nothing found)."""


class MissingDependencyError(MoesimError):
    """An optional package is needed for this call and is not installed."""


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the closest option, else the list of options."""
    known = sorted(str(option) for option in options)
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.6)
    if close:
        return f" Did you mean {close[0]!r}?"
    return f" Known: {', '.join(known)}." if known else ""


def unknown(kind: str, name: str, options: Iterable[str]) -> InputError:
    """Return the error for a name that is not among `options`."""
    return InputError(f"unknown {kind} {name!r}.{did_you_mean(name, options)}")


def require(package: str, extra: str, purpose: str) -> None:
    """Raise MissingDependencyError unless `package` can be imported."""
    from importlib.util import find_spec

    if find_spec(package) is None:
        raise MissingDependencyError(
            f"{purpose} needs the package '{package}', which is not installed: pip install 'moesim[{extra}]'"
        )
