"""Run the scenarios that ship and compare what comes out with what is committed, integer by integer.

    python scenarios/check.py                       # all; exit status 1 and one line per difference if something differs
    python scenarios/check.py --only hybrimoe       # one of them (may be repeated)
    python scenarios/check.py --write               # renew scenarios/expected/ after an intended change

A summary keeps, of each row of each study, what names it and what came out: times in ns, bytes, and shares in parts per
million, rounded. Validation studies time this machine and are left out. Most placement solvers stop at a time limit, so that their plans and
bounds depend on the machine: of their rows the names are compared, the results are null.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moesim.artifacts import read_bytes, write_text
from moesim.errors import InputError, unknown
from moesim.scenario.load import load_scenario
from moesim.scenario.reporter import QuietReporter
from moesim.scenario.run import run_scenario
from moesim.scenario.schema import Scenario
from moesim.simulate.study import StudyResult
from moesim.units import ns_from_s

FOLDER = Path(__file__).resolve().parent
EXPECTED = FOLDER / "expected"
PPM = 1_000_000

# what names a row of a study of each kind, and what came out of it
NAMES = {
    "offload": ("system", "policy", "prefetch", "miss", "allocation", "precision", "slots_per_layer"),
    "expert_parallel": ("placement", "redundant_experts"),
    "diffusion": ("policy", "coreset", "knows", "tau", "factor", "slots_per_layer")}
VALUES = {
    "offload": ("tpot_s", "tpot_bound_s", "hit_rate", "htod_bytes_per_token", "stall_fraction", "prefetches",
                "useful_prefetch_fraction", "host_hit_rate", "debit_mean_bits"),
    "expert_parallel": ("step_time_s", "imbalance", "cross_rank_bytes_per_step"),
    "diffusion": ("step_time_s", "refreshes_per_block", "miss_rate", "unique_experts", "lost_weight_share")}

UNTIMED_SOLVERS = ("contiguous", "lpt", "eplb")  # no time limit, so the same plan on every machine

Summary = dict[str, dict[str, list[Any]]]


def scenario_names() -> list[str]:
    """Return the names of the scenarios that ship, sorted."""
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def repeatable(scenario: Scenario) -> Scenario:
    """Return a scenario without its validation studies."""
    return scenario.model_copy(update={"studies": tuple(s for s in scenario.studies if s.kind != "validation")})


def run(name: str) -> Summary:
    """Run a scenario into a folder that is removed again and return its summary."""
    with tempfile.TemporaryDirectory() as folder:
        outcome = run_scenario(repeatable(load_scenario(FOLDER / f"{name}.yaml")), Path(folder), QuietReporter(),
                               executor="compiled")
    return {study.name: summary_of(study) for study in outcome.studies}


def summary_of(study: StudyResult) -> dict[str, list[Any]]:
    """Return a study's columns and rows: names as they are, results as whole numbers."""
    rows = study.table.to_dict(orient="records")
    names, values = NAMES[study.kind], VALUES[study.kind]
    return {"columns": [*names, *map(whole_name, values)],
            "rows": [[*(plain(row.get(key)) for key in names),
                      *(whole(key, row.get(key)) if repeats(row) else None for key in values)] for row in rows]}


def repeats(row: dict[str, Any]) -> bool:
    """Return whether a row comes out the same on every machine: one of a placement solver with a time limit may not."""
    return row.get("placement", UNTIMED_SOLVERS[0]) in UNTIMED_SOLVERS


def whole_name(key: str) -> str:
    """Return the name of a column as a whole number: its unit is the last word."""
    if key.endswith("_s"):
        return f"{key.removesuffix('_s')}_ns"
    return key if "bytes" in key or key == "prefetches" else f"{key}_ppm"


def whole(key: str, value: Any) -> int | None:
    """Return a result as a whole number: ns, bytes, a count, or parts per million."""
    value = plain(value)
    if value is None:
        return None
    if key.endswith("_s"):
        return ns_from_s(value)
    return round(value) if "bytes" in key or key == "prefetches" else round(value * PPM)


def plain(value: Any) -> Any:
    """Return a cell as JSON holds it; nothing for a missing one, and a whole number without a fraction."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    value = value.item() if hasattr(value, "item") else value
    return int(value) if isinstance(value, float) and value.is_integer() else value


def expected(name: str) -> Summary:
    """Return the committed summary; raises InputError if there is none or it is not one."""
    path = EXPECTED / f"{name}.json"
    try:
        return dict(json.loads(read_bytes(path)))
    except ValueError as error:
        raise InputError(f"{path}: not a summary: {error}") from None


def write(name: str, summary: Summary) -> Path:
    """Write a summary, one row per line."""
    studies = []
    for study, table in summary.items():
        rows = ",\n".join(f"   {json.dumps(row)}" for row in table["rows"])
        studies.append(f' {json.dumps(study)}: {{\n  "columns": {json.dumps(table["columns"])},\n  "rows": [\n{rows}]}}')
    return write_text(EXPECTED / f"{name}.json", "{\n" + ",\n".join(studies) + "\n}\n")


def differences(want: Summary, got: Summary) -> Iterator[str]:
    """Yield one line per difference: study, row, column, expected, got."""
    for study in [*want, *(name for name in got if name not in want)]:
        if study not in got or study not in want:
            yield f"study {study!r}: {'expected, but not run' if study in want else 'not expected'}"
        elif want[study]["columns"] != got[study]["columns"]:
            yield f"study {study!r}: columns: expected {want[study]['columns']}, got {got[study]['columns']}"
        else:
            yield from _row_differences(study, want[study], got[study]["rows"])


def _row_differences(study: str, want: dict[str, list[Any]], got: list[list[Any]]) -> Iterator[str]:
    if len(want["rows"]) != len(got):
        yield f"study {study!r}: expected {len(want['rows'])} rows, got {len(got)}"
    for number, (old, new) in enumerate(zip(want["rows"], got, strict=False)):
        label = ", ".join(str(cell) for cell in new if isinstance(cell, str))
        for column, before, after in zip(want["columns"], old, new, strict=True):
            if before != after:
                yield f"study {study!r}, row {number} ({label}): {column}: expected {before!r}, got {after!r}"


def check(name: str) -> list[str]:
    """Run one scenario and return its differences from what is committed."""
    want = expected(name)
    return list(differences(want, run(name)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, or write, every scenario or those that are named; returns the exit status."""
    parser = argparse.ArgumentParser(description="Run the scenarios that ship and compare them with scenarios/expected/.")
    parser.add_argument("--write", action="store_true", help="renew the committed summaries instead")
    parser.add_argument("--only", action="append", metavar="NAME", help="only this scenario (may be repeated)")
    options = parser.parse_args(arguments)
    try:
        return _all(options.only or scenario_names(), options.write)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _all(names: Sequence[str], renew: bool) -> int:
    for name in names:
        if name not in scenario_names():
            raise unknown("scenario", name, scenario_names())
    failed = 0
    for name in names:
        start = time.perf_counter()
        found = [] if renew else check(name)
        done = f"written to {write(name, run(name)).name}" if renew else f"{len(found)} differences" if found else "as expected"
        print(f"{name}: {done} ({time.perf_counter() - start:.0f} s)", flush=True)
        for line in found:
            print(f"  {line}")
        failed += bool(found)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
