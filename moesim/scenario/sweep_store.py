"""A sweep on disk: a folder that fills up part by part, so that an interrupted sweep goes on where it stopped.

``sweep.json`` says what is swept (and a digest of it); each ``part-NNNNNN.parquet`` appears whole. The sweep is done
when every part is there.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from moesim.artifacts import atomic_path, read_json, write_json
from moesim.errors import InputError

SCHEMA = "moesim.sweep/1"
HEAD = "sweep.json"


@dataclass(frozen=True)
class SweepFolder:
    """A folder of `num_parts` parts, of which some are there."""

    path: Path
    num_parts: int

    def part(self, index: int) -> Path:
        """Return the path of a part."""
        return self.path / f"part-{index:06d}.parquet"

    def missing(self) -> list[int]:
        """Return the parts still to be made."""
        return [index for index in range(self.num_parts) if not self.part(index).is_file()]

    def write(self, index: int, rows: pd.DataFrame) -> None:
        """Write one part, whole or not at all."""
        with atomic_path(self.part(index)) as temporary:
            rows.to_parquet(temporary, index=False)

    def parts(self) -> Iterator[pd.DataFrame]:
        """Yield the parts in order.

        Raises:
            InputError: parts are missing, or one cannot be read.
        """
        if missing := self.missing():
            raise InputError(f"{self.path}: {len(missing)} of {self.num_parts} parts are missing; run the sweep again, it goes on")
        for index in range(self.num_parts):
            try:
                yield pd.read_parquet(self.part(index))
            except (OSError, ValueError) as error:
                raise InputError(f"{self.part(index)}: not a Parquet table: {error}") from None


def open_sweep(path: str | os.PathLike[str], what: dict[str, Any], num_parts: int) -> SweepFolder:
    """Return the folder of a sweep: a new one, or the one that an interrupted run of the same sweep left.

    Raises:
        InputError: the path holds something else, or another sweep.
    """
    folder, digest = Path(path), hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
    if (folder / HEAD).is_file():
        if read_json(folder / HEAD, SCHEMA).get("digest") != digest:
            raise InputError(f"{path}: holds another sweep (other axes, scenario or trace); choose another name or remove it")
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{path}: exists and is no sweep; it is left as it is")
    else:
        write_json(folder / HEAD, SCHEMA, {"digest": digest, "num_parts": num_parts, **what})
    return SweepFolder(folder, num_parts)


def read_sweep(path: str | os.PathLike[str]) -> pd.DataFrame:
    """Return all rows of a finished sweep; raises InputError for one that is not finished, or none."""
    head = read_json(Path(path) / HEAD, SCHEMA)
    if not isinstance(head.get("num_parts"), int):
        raise InputError(f"{path}: {HEAD} has no num_parts")
    return pd.concat(SweepFolder(Path(path), head["num_parts"]).parts(), ignore_index=True)
