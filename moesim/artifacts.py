"""Artefacts on disk: whole or absent, with schema, version, seed and digests of their inputs."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moesim.errors import InputError

_PICKLE_STARTS = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` on success, remove it on error."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; swap it in whole on success, remove it on error."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        old = target.with_name(f".{target.name}.{os.getpid()}.old")
        if target.exists():
            os.replace(target, old)
        os.replace(temporary, target)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write `text` to `path` whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def write_json(path: str | os.PathLike[str], schema: str, body: dict[str, Any]) -> Path:
    """Write one JSON artefact: `schema`, `moesim_version`, then `body`; keys keep their order."""
    from moesim import __version__

    document = {"schema": schema, "moesim_version": __version__, **body}
    return write_text(path, json.dumps(document, indent=1, allow_nan=False) + "\n")


def read_json(path: str | os.PathLike[str], schema: str) -> dict[str, Any]:
    """Read one JSON artefact and check its `schema`.

    Raises:
        InputError: no such file, not JSON, or another schema.
    """
    text = read_bytes(path).decode("utf-8", errors="replace")
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}:{error.colno}: not valid JSON: {error.msg}") from None
    found = document.get("schema") if isinstance(document, dict) else None
    if found != schema:
        raise InputError(f"{path}: expected a {schema!r} file, found schema {found!r}")
    return document


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """Read a file, refusing pickles and naming a path that does not exist.

    Raises:
        InputError: no such file, a folder, or a pickle (which could run code when loaded).
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"{path}: {'is a folder, not a file' if file.is_dir() else 'no such file'}")
    data = file.read_bytes()
    if data.startswith(_PICKLE_STARTS):
        raise InputError(
            f"{path}: this is a Python pickle, which can run code when loaded; moesim never opens one"
        )
    return data


def digest_file(path: str | os.PathLike[str]) -> str:
    """Return ``sha256:<hex>`` of a file's bytes."""
    hasher = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            hasher.update(block)
    return f"sha256:{hasher.hexdigest()}"


def catalog_folder(kind: str) -> Path:
    """Return the folder of the package data `kind` (models, hardware, profiles, traces)."""
    return Path(__file__).parent / "catalog" / kind
