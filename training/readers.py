"""Turn one file of an unpacked package into plain text."""

from __future__ import annotations

import gzip
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

ROFF_RULES: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r'^[.\']\s*\\".*$', re.M), ""),
    (re.compile(r"^\.(?:SH|SS|TP|IP|B|I|BR|RB|IR|RI|BI|IB|SM|TH)\b ?", re.M), ""),
    (re.compile(r"^[.\'].*$", re.M), ""),
    (re.compile(r"\\f(?:\[\w*\]|\(..|.)"), ""),
    (re.compile(r"\\s[-+]?\d"), ""),
    (re.compile(r"\\\(([a-z]{2})"), " "),
    (re.compile(r"\\([-.\s&|^e])"), r"\1"),
    (re.compile(r"\n{3,}"), "\n\n"),
)


def read_plain(path: Path) -> str:
    """Text of a plain or gzip-compressed file; undecodable bytes are replaced."""
    data = path.read_bytes()
    if path.suffix in (".gz", ".dz"):
        data = gzip.decompress(data)
    return data.decode("utf-8", errors="replace")


def read_roff(path: Path) -> str:
    """A manual page with its roff requests and font changes taken out."""
    text = read_plain(path)
    for pattern, replacement in ROFF_RULES:
        text = pattern.sub(replacement, text)
    return text.strip()


def read_sword(path: Path) -> str:
    """A SWORD zText module: zlib blocks listed in the ``.bzs`` file beside it."""
    data = path.read_bytes()
    index = path.with_suffix(".bzs").read_bytes()
    blocks = [zlib.decompress(data[start : start + size]) for start, size, _ in struct.iter_unpack("<III", index)]
    text = b"\n".join(blocks).decode("utf-8", errors="replace")
    return re.sub(r"\n\s*\n+", "\n", re.sub(r"<note.*?</note>|<[^>]*>", " ", text))


READERS: dict[str, Callable[[Path], str]] = {
    "plain": read_plain,
    "roff": read_roff,
    "sword": read_sword,
}
