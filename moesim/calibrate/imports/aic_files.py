"""The tables of an aiconfigurator-core installation: where they lie, which one is meant, what is in it.

Layout (aiconfigurator-core 0.12): ``systems/<gpu>.yaml`` and ``systems/data/<gpu>/<family>/<framework>/<version>/
<table>.parquet``. The files are read where the user installed them; none is part of moesim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesim.artifacts import read_bytes
from moesim.errors import InputError, did_you_mean, unknown

if TYPE_CHECKING:
    import pandas as pd

PACKAGE, MODULE = "aiconfigurator-core", "aiconfigurator_core"
MAX_ROWS = 20_000_000


@dataclass(frozen=True)
class Gpu:
    """One GPU's folder of tables, the engine whose tables are wanted, and what ``<gpu>.yaml`` says.

    `engine_version` None stands for the only version there is.
    """

    folder: Path
    system: dict[str, Any]
    engine: str
    engine_version: str | None
    package_version: str | None

    def find(self, table: str, framework: str, wanted: str | None, option: str) -> Path | None:
        """Return ``*/<framework>/<version>/<table>.parquet``; None if there is none (of the wanted version).

        Raises:
            InputError: several versions and none is wanted: the message names `option`.
        """
        files = {file.parent.name: file for file in sorted(self.folder.glob(f"*/{framework}/*/{table}.parquet"))}
        if wanted is None and len(files) > 1:
            raise InputError(f"{self.folder}: {table} of {framework} in versions {', '.join(files)}: choose with "
                             f"{option}=...")
        return files.get(wanted) if wanted is not None else next(iter(files.values()), None)

    def engine_table(self, table: str) -> Path | None:
        """Return the engine's table of this name; None if there is none. Raises InputError as `find`."""
        return self.find(table, self.engine, self.engine_version, "version")

    def memory_bytes_per_s(self) -> float:
        """Return the nameplate rate of the GPU's memory, from ``<gpu>.yaml``.

        Raises:
            InputError: it does not say.
        """
        gpu = self.system.get("gpu")
        rate = gpu.get("mem_bw") if isinstance(gpu, dict) else None
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not rate > 0:
            raise InputError(f"{system_file(self.folder)}: expected gpu.mem_bw, the memory's bytes per second; without it "
                             f"times that no memory can reach are not found")
        return float(rate)


def open_gpu(name: str, engine: str | None, engine_version: str | None) -> Gpu:
    """Return the tables of a GPU by its name in the installed package, or by its folder.

    Raises:
        InputError: neither the package nor such a folder is there, an unknown GPU or engine.
    """
    folder, package_version = _folder(name)
    engines = sorted({path.parent.parent.name for path in folder.glob("*/*/*/moe_perf.parquet")})
    if engine is None and len(engines) == 1:
        engine = engines[0]
    if not engines or engine not in engines:
        if not engines:
            raise InputError(f"{folder}: no <family>/<framework>/<version>/moe_perf.parquet in it; this GPU has no MoE tables")
        raise InputError(f"{folder}: engine {engine!r} has no MoE table.{did_you_mean(str(engine), engines)}" if engine else
                         f"{folder}: tables of {', '.join(engines)}: choose with engine=...")
    known = sorted(path.parent.name for path in folder.glob(f"*/{engine}/*/moe_perf.parquet"))
    if engine_version is None and len(known) > 1:
        raise InputError(f"{folder}: MoE tables of {engine} {', '.join(known)}: choose with version=...")
    if engine_version is not None and engine_version not in known:
        raise unknown(f"version of {engine}", engine_version, known)
    return Gpu(folder, _system(folder), engine, engine_version or known[0], package_version)


def system_file(folder: Path) -> Path:
    """Return ``systems/<gpu>.yaml`` of ``systems/data/<gpu>``."""
    return folder.parent.parent / f"{folder.name}.yaml"


def read_table(path: Path, numbers: Sequence[str], words: Sequence[str]) -> pd.DataFrame:
    """Return these columns of a Parquet file.

    Raises:
        InputError: not Parquet, a column that is missing, of the wrong kind or with gaps, or too many rows.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
        for column in (*numbers, *words):
            if column not in names:
                raise InputError(f"{path}: no column {column!r}.{did_you_mean(column, names)}")
        if file.metadata.num_rows > MAX_ROWS:
            raise InputError(f"{path}: {file.metadata.num_rows} rows; at most {MAX_ROWS} are read")
        table = file.read(columns=[*numbers, *words]).to_pandas()
    except (pa.ArrowException, OSError, UnicodeDecodeError, ValueError) as error:
        raise InputError(f"{path}: not a Parquet table: {error}") from None
    for column in numbers:
        if table[column].dtype.kind not in "iuf" or table[column].isna().any():
            raise InputError(f"{path}: column {column!r} must hold numbers, without gaps")
    for column in words:
        table[column] = table[column].astype(str)
    return table


def _folder(name: str) -> tuple[Path, str | None]:
    """Return the GPU's folder and the package's version (None for a folder that was given)."""
    if Path(name).is_dir():
        return Path(name), None
    spec = find_spec(MODULE)
    if spec is None or spec.origin is None:
        raise InputError(f"{name}: no such folder, and {PACKAGE} is not installed here: pip install {PACKAGE} (82 MB), or "
                         f"give the folder .../{MODULE}/systems/data/<gpu>")
    data = Path(spec.origin).parent / "systems" / "data"
    known = sorted({path.parents[3].name for path in data.glob("*/*/*/*/moe_perf.parquet")})
    if name not in known:
        raise unknown(f"GPU of {PACKAGE}", name, known)
    try:
        return data / name, version(PACKAGE)
    except PackageNotFoundError:
        return data / name, None


def _system(folder: Path) -> dict[str, Any]:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    path = system_file(folder.absolute())
    try:
        body = YAML(typ="safe", pure=True).load(read_bytes(path).decode("utf-8", errors="replace"))
    except (YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid YAML: {error}") from None
    return body if isinstance(body, dict) else {}
