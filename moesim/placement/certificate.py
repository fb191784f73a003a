"""Certificate: the multipliers that prove a bound, saved beside the plan so that anyone can re-check it."""

from __future__ import annotations

import io
import json
import os
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moesim.artifacts import atomic_path, read_bytes
from moesim.errors import InputError

SCHEMA = "moesim.bound/1"
_HEADER = "certificate"


@dataclass(frozen=True)
class Certificate:
    """A proven bound with everything that its proof needs besides the problem.

    Attributes:
        objective: a name of `moesim.placement.objectives.OBJECTIVES`.
        method: how it was proven, a name of `moesim.placement.verify.CHECKERS`.
        bound: the proven bound, in the objective's unit and sense (minimised: no plan is lower; maximised: none
            is higher).
        parameters: plain numbers and texts of the proof (a node weight, the number of iterations).
        arrays: multipliers, by the names that the method's checker documents.
    """

    objective: str
    method: str
    bound: float
    parameters: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write ``*.bound.npz``, whole or not at all."""
        header = {"schema": SCHEMA, "objective": self.objective, "method": self.method, "bound": self.bound,
                  "parameters": self.parameters}
        text = np.frombuffer(json.dumps(header, allow_nan=False).encode(), np.uint8)
        arrays: dict[str, Any] = {_HEADER: text, **self.arrays}
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, **arrays)
        return Path(path)


def read_certificate(path: str | os.PathLike[str]) -> Certificate:
    """Read a certificate; raises InputError for a file that is none (nothing in it is unpickled)."""
    try:
        with np.load(io.BytesIO(read_bytes(path)), allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        header = json.loads(arrays.pop(_HEADER).tobytes())
        if header["schema"] != SCHEMA:
            raise InputError(f"{path}: expected a {SCHEMA!r} file, found schema {header['schema']!r}")
        return Certificate(str(header["objective"]), str(header["method"]), float(header["bound"]),
                           dict(header["parameters"]), arrays)
    except (KeyError, ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: not a bound certificate: {error}") from None
