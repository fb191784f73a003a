"""ExFlow's solution files: CSV ``Expert,Node`` as plans. `export.engines.exflow` writes them."""

from __future__ import annotations

import os

import numpy as np

from moesim.artifacts import read_bytes
from moesim.errors import InputError
from moesim.placement.plan import PlacementPlan

HEADER = "Expert,Node"


def read_exflow_csv(path: str | os.PathLike[str], *, num_experts: int | None = None, num_layers: int | None = None,
                    num_ranks: int | None = None) -> PlacementPlan:
    """Read a solution of ExFlow as a plan.

    Each line names an expert by ``layer * num_experts + e`` (MoE layers from 0) and the GPU that holds it, in any
    order, every expert once. The file does not say where one layer ends and the next begins: give the experts per
    layer or the layers.

    Args:
        path: the file.
        num_experts: experts per layer.
        num_layers: MoE layers.
        num_ranks: GPUs; None: the largest number in the file, plus one.

    Raises:
        InputError: no such file; a line that is not two whole numbers; an expert that is missing or comes twice; a
            number of experts that does not divide; a GPU out of range, or with more or fewer experts of a layer than
            the others. Messages name the line.
    """
    home = _homes(path, _rows(path))
    layers, experts = _sizes(path, len(home), num_experts, num_layers)
    ranks = int(home.max()) + 1 if num_ranks is None else num_ranks
    homes = home.reshape(layers, experts)
    _check_balance(path, homes, ranks)
    order = np.argsort(homes, axis=1, kind="stable")
    return PlacementPlan(order, ranks, experts, {"solver": "exflow", "source": os.path.basename(path)})


def _rows(path: str | os.PathLike[str]) -> list[tuple[int, int, int]]:
    """Return (line, expert, node) of every line."""
    lines = read_bytes(path).decode("utf-8", errors="replace").removeprefix("\ufeff").splitlines()
    if not lines or lines[0].replace(" ", "") != HEADER:
        found = repr(lines[0][:40]) if lines else "an empty file"
        raise InputError(f"{path}:1: expected the header {HEADER!r}, found {found}")
    rows = []
    for number, line in enumerate(lines[1:], 2):
        if not line.strip():
            continue
        try:
            expert, node = map(int, line.split(","))
        except ValueError:
            raise InputError(f"{path}:{number}: expected two whole numbers 'expert,node', found {line[:40]!r}") from None
        if expert < 0 or node < 0:
            raise InputError(f"{path}:{number}: expert and node must not be negative, found {line[:40]!r}")
        rows.append((number, expert, node))
    if not rows:
        raise InputError(f"{path}: expected a line per expert after the header, found none")
    return rows


def _homes(path: str | os.PathLike[str], rows: list[tuple[int, int, int]]) -> np.ndarray:
    """Return int64[layer * num_experts + expert], the GPU of each."""
    home: dict[int, int] = {}
    first: dict[int, int] = {}
    for number, expert, node in rows:
        if expert in home:
            raise InputError(f"{path}:{number}: expert {expert} came before, in line {first[expert]}; each must come once")
        if expert >= len(rows):
            raise InputError(f"{path}:{number}: expert {expert} in a file of {len(rows)} experts; they must be "
                             f"0 ... {len(rows) - 1}, each once")
        home[expert], first[expert] = node, number
    return np.array([home[expert] for expert in range(len(rows))], np.int64)


def _sizes(path: str | os.PathLike[str], total: int, num_experts: int | None, num_layers: int | None) -> tuple[int, int]:
    """Return (layers, experts per layer)."""
    given = num_experts or num_layers
    if given is None or given < 1:
        raise InputError(f"{path}: holds {total} experts of all layers; say how many there are per layer (num_experts) or "
                         "how many layers (num_layers)")
    if total % given:
        raise InputError(f"{path}: {total} experts do not divide by {given} {'experts per layer' if num_experts else 'layers'}")
    layers, experts = (total // given, given) if num_experts else (given, total // given)
    if num_layers is not None and layers != num_layers:
        raise InputError(f"{path}: {total} experts are {layers} layers of {experts}, expected {num_layers} layers")
    return layers, experts


def _check_balance(path: str | os.PathLike[str], homes: np.ndarray, num_ranks: int) -> None:
    experts = homes.shape[1]
    if homes.max() >= num_ranks:
        layer, expert = np.argwhere(homes >= num_ranks)[0]
        raise InputError(f"{path}: expert {layer * experts + expert} (expert {expert} of layer {layer}) is on node "
                         f"{homes[layer, expert]}, expected 0 ... {num_ranks - 1}")
    if experts % num_ranks:
        raise InputError(f"{path}: {experts} experts per layer do not divide over {num_ranks} nodes")
    for layer, row in enumerate(homes):
        counts = np.bincount(row, minlength=num_ranks)
        if np.any(counts != experts // num_ranks):
            node = int(np.argmax(counts != experts // num_ranks))
            raise InputError(f"{path}: node {node} holds {counts[node]} experts of layer {layer}, expected "
                             f"{experts // num_ranks} on each of {num_ranks} nodes")
