"""Importers: what other tools recorded, as a RoutingTrace, a CountTrace or Arrivals; one reader per format."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

from moesim.artifacts import read_bytes
from moesim.errors import InputError, did_you_mean, unknown
from moesim.registry import Registry
from moesim.traces.arrivals import Arrivals
from moesim.traces.counts import COUNTS_ONLY, CountTrace
from moesim.traces.importers.arrays import ARRAYS
from moesim.traces.importers.base import INT16_MAX, Found, Importer, RawCounts, RawRouting
from moesim.traces.importers.community import COMMUNITY
from moesim.traces.importers.count_tables import COUNT_TABLES
from moesim.traces.importers.finish import Wishes, count_trace, routing_trace, warmup_notes
from moesim.traces.importers.imatrix import IMATRIX
from moesim.traces.importers.passes import PASSES
from moesim.traces.importers.physical import read_physical_to_logical
from moesim.traces.importers.policylang import POLICYLANG
from moesim.traces.importers.replies import REPLIES
from moesim.traces.importers.request_arrivals import ARRIVALS
from moesim.traces.importers.route_lines import ROUTE_LINES
from moesim.traces.importers.rtrace import RTRACE
from moesim.traces.importers.sglang_recorder import SGLANG_RECORDER
from moesim.traces.importers.tensorrt_llm import TENSORRT_LLM
from moesim.traces.trace import PHASES, RoutingTrace

__all__ = ["IMPORTERS", "Importer", "RawCounts", "RawRouting", "detect_format", "import_any", "import_trace",
           "warmup_notes"]

IMPORTERS: Registry[Importer] = Registry("source format", "moesim.importers", {
    **ARRAYS, **ROUTE_LINES, **SGLANG_RECORDER, **REPLIES, **TENSORRT_LLM, **IMATRIX, **PASSES, **RTRACE,
    **POLICYLANG, **COMMUNITY, **COUNT_TABLES, **ARRIVALS,
})
_PICKLE_STARTS = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def import_trace(path: str | os.PathLike[str], **options: Any) -> RoutingTrace:
    """Read routing of tokens that another tool recorded; options as in `import_any`.

    Raises:
        InputError: as `import_any`, or a file that holds counts or arrivals only.
    """
    found = import_any(path, **options)
    if isinstance(found, CountTrace):
        raise InputError(f"{path}: {COUNTS_ONLY}")
    if isinstance(found, Arrivals):
        raise InputError(f"{path}: it holds request arrivals, not routing")
    return found


def import_any(path: str | os.PathLike[str], *, source_format: str | None = None,
               num_experts: int | None = None, phase: str | None = None, id_base: int = 0, skip_rows: int = 0,
               model: str = "", source: str = "", model_config: str | os.PathLike[str] | None = None,
               physical_to_logical: str | os.PathLike[str] | None = None,
               **options: Any) -> RoutingTrace | CountTrace | Arrivals:
    """Read what another tool recorded: routing of tokens, expert counts, or request arrivals.

    Doubtful findings (sizes inferred, rows that look like warm-up, layers left out) are listed in
    ``metadata["notes"]``.

    Args:
        path: a file, or for some formats a folder.
        source_format: a name in `IMPORTERS`; by default found from the content.
        num_experts: experts per layer; by default what the file or the model says, else the largest id + 1.
        phase: the phase of every row; by default what the file says, else decode.
        id_base: the id that the file gives to the first expert.
        skip_rows: leading rows (of counts: windows) to drop, as warm-up.
        model: the name to write into the trace.
        model_config: a catalog name, config.json or GGUF file: names the MoE layers, and is checked against.
        physical_to_logical: a file with the map [layer, slot] -> expert, for recordings of slots.
        options: the reader's own; see `IMPORTERS`.

    Raises:
        InputError: no such file, a pickle, a format that is unknown or ambiguous, an unknown option, or
            content that breaks a rule of the type it is read as.
    """
    file = Path(path)
    name = _format(file, source_format, phase)
    importer = IMPORTERS[name]
    _check_options(name, importer, options)
    if not 0 <= id_base <= INT16_MAX:
        raise InputError(f"id_base must lie in 0 ... {INT16_MAX}, got {id_base}")
    wishes = _wishes(num_experts, phase, id_base, skip_rows, model, model_config, physical_to_logical,
                     source or f"imported from {file.name} ({name})")
    if wishes.spec is not None and "spec" in inspect.signature(importer.read).parameters:
        options["spec"] = wishes.spec
    try:
        return _finished(importer.read(file, **options), wishes)
    except InputError as error:
        text = " ".join(str(error).splitlines())
        raise InputError(text if text.startswith(str(path)) else f"{path}: {text}") from None
    except MemoryError:
        raise InputError(f"{path}: too large for this machine's memory") from None


def _wishes(num_experts: int | None, phase: str | None, id_base: int, skip_rows: int, model: str,
            model_config: str | os.PathLike[str] | None, physical_to_logical: str | os.PathLike[str] | None,
            source: str) -> Wishes:
    spec = None
    if model_config is not None:
        from moesim.model.catalog import load_model

        spec = load_model(model_config)
    table = None if physical_to_logical is None else read_physical_to_logical(physical_to_logical)
    return Wishes(num_experts, phase, id_base, skip_rows, model, spec, table, source)


def _finished(found: Found, wishes: Wishes) -> RoutingTrace | CountTrace | Arrivals:
    if isinstance(found, RawRouting):
        return routing_trace(found, wishes)
    if isinstance(found, RawCounts):
        return count_trace(found, wishes)
    for name in ("num_experts", "phase", "spec", "physical_to_logical"):
        if getattr(wishes, name) is not None:
            raise InputError(f"{'model_config' if name == 'spec' else name} does not apply: the file holds request "
                             f"arrivals")
    if wishes.skip_rows or wishes.id_base or wishes.model:
        raise InputError("skip_rows, id_base and model do not apply: the file holds request arrivals")
    return found


def _format(file: Path, source_format: str | None, phase: str | None) -> str:
    """Return the name of the format, after the first checks."""
    if not file.exists():
        raise InputError(f"{file}: no such file")
    if phase is not None and phase not in PHASES:
        raise unknown("phase", phase, PHASES)
    name = source_format or detect_format(file)
    if file.is_dir() and not IMPORTERS[name].folders:
        raise InputError(f"{file}: is a folder, not a file of format {name!r}")
    return name


def detect_format(path: Path) -> str:
    """Return the one format whose `detect` accepts the file's content.

    Raises:
        InputError: none or several do; the message lists what is known.
    """
    folder = path.is_dir()
    found = [name for name in IMPORTERS.names() if (IMPORTERS[name].folders or not folder)
             and IMPORTERS[name].detect(path)]
    if len(found) == 1:
        return found[0]
    if found:
        words = "; ".join(f"{name}: {IMPORTERS[name].description}" for name in found)
        raise InputError(f"{path}: could be {' or '.join(found)}: name the source format. {words}")
    if folder:
        raise InputError(f"{path}: is a folder, and not one of a known format "
                         f"({', '.join(name for name in IMPORTERS.names() if IMPORTERS[name].folders)})")
    _refuse_known_others(path)
    known = "; ".join(f"{name}: {IMPORTERS[name].description}" for name in IMPORTERS.names())
    raise InputError(f"{path}: unknown routing format. Known: {known}")


def _refuse_known_others(path: Path) -> None:
    """Say what a file is that no importer takes, where its first bytes tell."""
    with open(path, "rb") as file:
        head = file.read(4)
    if head == b"PAR1":
        raise InputError(f"{path}: this is a Parquet file; a moesim trace needs no import")
    if head[:2] in _PICKLE_STARTS:
        read_bytes(path)  # says why a pickle is refused
    if head == b"PK\x03\x04":
        raise InputError(f"{path}: a zip archive, but neither of numpy arrays nor a recorder's .pt file")


def _check_options(name: str, importer: Importer, options: dict[str, Any]) -> None:
    known = [option for option in list(inspect.signature(importer.read).parameters)[1:] if option != "spec"]
    for option in options:
        if option not in known:
            raise InputError(f"importer {name!r} has no option {option!r}.{did_you_mean(option, known)}")
