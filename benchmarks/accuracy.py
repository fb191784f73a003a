"""How far predictions are from what really happens, family by family, beside how well this machine repeats itself.

Run ``python benchmarks/accuracy.py`` (about ten minutes on two cores; ``--quick``: three). Everything that is predicted is then run
for real, and nothing that is judged is calibrated on. The rounds of all families take turns, so that the same case is run
minutes apart: how far its own runs are from each other is the machine's wander, and no prediction can be nearer than that.

Finished rounds are kept beside the output (``.partial``); after an interruption the same command goes on.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from _accuracy import DEVICE, FULL, LEAST_TAU, PARTS, QUICK, Effort, Part, target_of

from moesim.artifacts import read_json, write_json
from moesim.calibrate.fingerprint import fingerprint
from moesim.errors import InputError, MoesimError
from moesim.validate.campaign_report import (
    CaseSummary,
    Line,
    Outcome,
    case_summaries,
    cases_markdown,
    families_markdown,
    family_summaries,
    from_rows,
    lines_markdown,
    order_line,
    order_of,
    target_lines,
    to_rows,
)

SCHEMA, PARTIAL = "moesim.accuracy/1", "moesim.accuracy-partial/1"
WORST = 5
INTERRUPTED = 130


@dataclass(frozen=True)
class Store:
    """The finished units of a run, in a file that is rewritten whole after each."""

    path: Path
    header: dict[str, Any]
    units: dict[str, dict[str, Any]]

    @classmethod
    def open(cls, path: Path, header: dict[str, Any]) -> Store:
        """Take up a file if there is one; raises InputError where it is of another run."""
        if not path.exists():
            return cls(path, header, {})
        body = read_json(path, PARTIAL)
        for key, value in header.items():
            if body.get("header", {}).get(key) != value:
                raise InputError(f"{path}: is of another run: {key} was {body.get('header', {}).get(key)!r} and is {value!r}; "
                                 "repeat its command to go on, or delete the file to start anew")
        return cls(path, header, dict(body["units"]))

    def keep(self, key: str, outcomes: Sequence[Outcome], seconds: float) -> None:
        """Note one unit and write the file."""
        self.units[key] = {"seconds": seconds, "load": os.getloadavg()[0], "outcomes": to_rows(outcomes)}
        write_json(self.path, PARTIAL, {"header": self.header, "units": self.units})


def run_parts(parts: Sequence[Part], effort: Effort, store: Store, quiet: bool) -> None:
    """Run what is not kept yet: round by round, in each the parts in turn."""
    for number in range(effort.rounds):
        for part in parts:
            if part.absent() or number >= (part.rounds or effort.rounds):
                continue
            for unit in part.units(effort, number):
                key = f"{unit.name}, round {number}"
                if key in store.units:
                    continue
                start = time.perf_counter()
                outcomes = unit.run()
                taken = time.perf_counter() - start
                store.keep(key, outcomes, taken)
                if not quiet:
                    print(f"{key}: {len(outcomes)} outcomes in {taken:.1f} s", file=sys.stderr, flush=True)


def code_version() -> str | None:
    """Return the commit that runs, marked if files differ from it; None if that is not known."""
    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + (" with changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


# ---------------------------------------------------------------- what is said


def ordered_groups(parts: Sequence[Part], outcomes: Sequence[Outcome]) -> Iterator[tuple[str, list[CaseSummary]]]:
    """Yield what is one choice, and its cases: all offloaded runs, all intervals, all plans on so many ranks."""
    cases = case_summaries(outcomes)
    for group in (name for part in parts for name in part.ordered):
        own = [case for case in cases if case.family.startswith(group)]
        if len(own) > 1:
            yield own[0].family if len({case.family for case in own}) == 1 else group, own


def all_lines(parts: Sequence[Part], outcomes: Sequence[Outcome]) -> list[Line]:
    """Return every target, and whether it was met."""
    lines = [line for summary in sorted(family_summaries(outcomes), key=lambda one: one.family)
             for line in target_lines(summary, target_of(summary.family))]
    return lines + [order_line(name, order_of(cases), LEAST_TAU) for name, cases in ordered_groups(parts, outcomes)]


def body_of(parts: Sequence[Part], outcomes: Sequence[Outcome], facts: dict[str, Any]) -> dict[str, Any]:
    """Return what the JSON file holds."""
    plain = [{key: None if value != value else value for key, value in asdict(one).items()} for one in family_summaries(outcomes)]
    return facts | {"families": plain, "targets": [asdict(line) for line in all_lines(parts, outcomes)], "outcomes": to_rows(outcomes)}


def page(parts: Sequence[Part], outcomes: Sequence[Outcome], facts: dict[str, Any]) -> str:
    """Return the tables as Markdown, as docs/accuracy.md holds them."""
    machine = facts["machine"]
    text = [f"{facts['date'][:10]}, {machine['processor']}, {machine['cores']} cores, torch {machine['torch']}, "
            f"commit {str(facts['code'])[:7]}; {facts['seconds']:.0f} s, load of the machine {facts['load'][0]:.1f} to {facts['load'][1]:.1f}.",
            "### Families", families_markdown(family_summaries(outcomes)), "### Targets", lines_markdown(all_lines(parts, outcomes)),
            "### Worst cases of each family"]
    cases = case_summaries(outcomes)
    for summary in family_summaries(outcomes):
        own = [case for case in cases if case.family == summary.family]
        text += [f"**{summary.family}**, {min(WORST, len(own))} of {len(own)} cases", cases_markdown(own[:WORST])]
    text += [f"Not run: {part.name}: {part.absent()}." for part in parts if part.absent()]
    return "\n\n".join(text)


# ---------------------------------------------------------------- the command


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer and shorter cases: three minutes")
    parser.add_argument("--only", action="append", choices=[part.name for part in PARTS], help="this family (may be repeated)")
    parser.add_argument("--check", action="store_true", help="exit 1 when a target is missed")
    parser.add_argument("--markdown", action="store_true", help="print the page's tables only, no progress")
    parser.add_argument("--show", type=Path, metavar="FILE", help="print the tables of a finished run, and run nothing")
    parser.add_argument("-o", "--out", type=Path, default=Path("accuracy.json"), help="the file to write (default accuracy.json)")
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace, parts: Sequence[Part]) -> tuple[list[Outcome], dict[str, Any]]:
    """Run what is missing; return all outcomes and what to say of the run."""
    header = {"quick": options.quick, "machine": fingerprint(DEVICE), "code": code_version()}
    store = Store.open(options.out.with_name(options.out.name + ".partial"), header)
    run_parts(parts, QUICK if options.quick else FULL, store, options.markdown)
    kept = list(store.units.values())
    outcomes = [outcome for unit in kept for outcome in from_rows(unit["outcomes"], str(store.path))]
    loads = [unit["load"] for unit in kept] or [0.0]
    facts = {**header, "date": datetime.now(UTC).isoformat(timespec="seconds"), "parts": [part.name for part in parts],
             "seconds": sum(unit["seconds"] for unit in kept), "load": [min(loads), max(loads)]}
    write_json(options.out, SCHEMA, body_of(parts, outcomes, facts))
    store.path.unlink(missing_ok=True)
    return outcomes, facts


def shown(path: Path) -> tuple[list[Outcome], dict[str, Any]]:
    """Return the outcomes and facts of a finished run."""
    body = read_json(path, SCHEMA)
    return from_rows(body["outcomes"], str(path)), body


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print the tables, write the file; 1 where `--check` finds a target missed, 2 for wrong input."""
    options = parse(arguments)
    parts = [part for part in PARTS if not options.only or part.name in options.only]
    try:
        outcomes, facts = shown(options.show) if options.show else measure(options, parts)
    except KeyboardInterrupt:
        print(f"interrupted; finished rounds are in {options.out}.partial, and the same command goes on from there", file=sys.stderr)
        return INTERRUPTED
    except MoesimError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    parts = [part for part in parts if part.name in facts["parts"]]
    print(page(parts, outcomes, facts))
    missed = [line.what for line in all_lines(parts, outcomes) if not line.met]
    if not options.markdown:
        print("\nEvery target met." if not missed else f"\nMissed: {'; '.join(missed)}.")
    return 1 if options.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
