"""Clusters in one word: ``h200x8x8`` is 8 nodes of 8 GPUs of the one catalog machine that starts with ``h200``."""

from __future__ import annotations

import re
from pathlib import Path

from moesim.errors import InputError
from moesim.hardware.load import hardware_names

_CLUSTER = re.compile(r"(?P<name>.+?)x(?P<gpus>\d+)(?:x(?P<nodes>\d+))?$")


def parse_cluster(text: str) -> tuple[str, int | None, int | None]:
    """Return (machine, GPUs per node or None, nodes or None) of NAME, NAMExGPUS or NAMExGPUSxNODES.

    NAME is a catalog name, the unambiguous start of one, or the path of a YAML file.

    Raises:
        InputError: a size of 0, or a start that several machines share.
    """
    if Path(text).suffix or text in hardware_names():
        return text, None, None
    found = _CLUSTER.match(text)
    if not found:
        return _whole_name(text), None, None
    gpus, nodes = int(found["gpus"]), int(found["nodes"] or 1)
    if gpus < 1 or nodes < 1:
        raise InputError(f"hardware {text!r}: expected NAMExGPUSxNODES with at least 1 of each, e.g. h200x8x2")
    return _whole_name(found["name"]), gpus, nodes


def _whole_name(start: str) -> str:
    names = [name for name in hardware_names() if name.startswith(start)]
    if len(names) > 1 and start not in names:
        raise InputError(f"hardware {start!r} is short for several machines: {', '.join(names)}")
    return names[0] if len(names) == 1 else start
