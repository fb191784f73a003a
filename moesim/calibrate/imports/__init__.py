"""Measurements that others made, as a CalibrationProfile; one reader per source.

A reader takes only what the source says. What it does not say (how tokens were spread, which copy a rate belongs
to) is never filled in: such rows are left out and counted with the reason, in the profile's fingerprint.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from typing import Any

from moesim.artifacts import digest_file
from moesim.calibrate.imports.aiconfigurator import AICONFIGURATOR
from moesim.calibrate.imports.base import Findings, Importer
from moesim.calibrate.imports.kineto import KINETO
from moesim.calibrate.imports.llama_bench import LLAMA_BENCH
from moesim.calibrate.imports.nvbandwidth import NVBANDWIDTH
from moesim.calibrate.run import with_residuals
from moesim.errors import InputError, did_you_mean
from moesim.hardware.profile import CalibrationProfile
from moesim.registry import Registry

__all__ = ["SOURCES", "Importer", "import_profile"]

SOURCES: Registry[Importer] = Registry("source of measurements", "moesim.profile_importers", {
    **AICONFIGURATOR, **KINETO, **LLAMA_BENCH, **NVBANDWIDTH})


def import_profile(source: str, names: Sequence[str | os.PathLike[str]], **options: Any) -> CalibrationProfile:
    """Read measurements of a source into a profile. Every time in it was measured; none is filled in.

    The fingerprint says where the numbers come from: ``source``, ``files`` (SHA-256 by path, from the folder that holds
    them all), what the source
    says of its machine and versions, ``notes`` on how it was read, and ``left_out`` (rows by reason).
    Held-out residuals are those of `with_residuals`. The same input gives the same profile.

    Args:
        source: a name in `SOURCES`.
        names: files; for ``aiconfigurator`` one GPU's name or folder.
        options: the reader's own.

    Raises:
        InputError: an unknown source or option, a file that is not of the format, or nothing that can be used.
    """
    importer = SOURCES[source]
    _check_options(source, importer, options)
    if not names:
        raise InputError(f"{source}: name at least one file")
    try:
        found = importer.read([os.fspath(name) for name in names], **options)
        tables = tuple(with_residuals(table) for table in found.tables())
    except InputError as error:
        raise InputError(" ".join(str(error).split())) from None
    except MemoryError:
        raise InputError(f"{names[0]}: too large for this machine's memory") from None
    if not tables:
        reasons = "; ".join(f"{count} x {reason}" for reason, count in found.left_out.items()) or "it holds no measurement"
        raise InputError(f"{names[0]}: nothing to import from {source}: {reasons}")
    return CalibrationProfile(found.name, tables, _fingerprint(source, found), found.date)


def _fingerprint(source: str, found: Findings) -> dict[str, Any]:
    paths = dict.fromkeys(path.absolute() for path in found.files)
    folder = os.path.commonpath([path.parent for path in paths])
    files = {path.relative_to(folder).as_posix(): digest_file(path) for path in paths}
    return {"source": source, "files": files, **found.facts, "notes": list(found.notes),
            "left_out": dict(found.left_out)}


def _check_options(source: str, importer: Importer, options: dict[str, Any]) -> None:
    known = list(inspect.signature(importer.read).parameters)[1:]
    for option in options:
        if option not in known:
            raise InputError(f"source {source!r} has no option {option!r}.{did_you_mean(option, known)}")
