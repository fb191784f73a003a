"""What DeepSeek's EPLB takes (``weight``) and returns (``phy2log``, ``log2phy``, ``logcnt``), as arrays in a file."""

from __future__ import annotations

import io
import shlex
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from moesim.errors import CheckError
from moesim.export.check.arrays import check_weight, eplb_rows
from moesim.export.check.rows import check_same
from moesim.export.engines.safetensors import safetensors_bytes
from moesim.export.engines.target import Content, PlanTarget, Target, one_file
from moesim.model.spec import ModelSpec
from moesim.placement.plan import PlacementPlan
from moesim.traces.stats import load_counts
from moesim.traces.trace import RoutingTrace


class EplbPlan(PlanTarget):
    """What ``rebalance_experts`` returns, int64; layers are MoE layers from 0.

    ``phy2log[layer, slot]``, ``log2phy[layer, expert, replica]`` (-1 padded), ``logcnt[layer, expert]`` in a .npz or
    .safetensors; a .npy holds phy2log alone.
    """

    name, suffixes, needs_model = "eplb", (".npz", ".npy", ".safetensors"), False
    suffix_reason = "numpy and safetensors name their files so"
    what = "phy2log, log2phy, logcnt as rebalance_experts returns them"

    def encode(self, subject: PlacementPlan, model: ModelSpec | None, path: Path) -> Content:
        """Return the arrays in the format that the ending names."""
        arrays = {"phy2log": subject.physical_to_logical, "log2phy": subject.logical_to_physical,
                  "logcnt": subject.replica_count}
        return array_bytes({name: array.astype(np.int64) for name, array in arrays.items()}, path)

    def check(self, content: Content, subject: PlacementPlan, model: ModelSpec | None) -> None:
        """Read the arrays; they must agree with each other and with the plan."""
        rows = eplb_rows(one_file(content), num_experts=subject.num_experts)
        check_same(self.name, rows, subject.physical_to_logical.tolist())

    def command(self, subject: PlacementPlan, model: ModelSpec | None, path: Path) -> str:
        """Return Python that loads the file."""
        return load_command(path, "phy2log")

    def notes(self, subject: PlacementPlan, model: ModelSpec | None) -> tuple[str, ...]:
        """Return who can use the file."""
        return ("No engine loads this file by a flag: it is for code that calls rebalance_experts.",
                "vLLM has no option for an initial map: use --to vllm and its plug-in.")


class EplbWeight(Target[RoutingTrace]):
    """The ``weight[layer, expert]`` that ``rebalance_experts`` takes: tokens routed to each expert, int64."""

    name, suffixes, needs_model = "eplb-weight", (".safetensors", ".npy", ".npz"), False
    takes, takes_words = RoutingTrace, "a trace (*.trace.parquet)"
    suffix_reason = EplbPlan.suffix_reason
    what = "loads of a trace as the weight that rebalance_experts takes"

    def encode(self, subject: RoutingTrace, model: ModelSpec | None, path: Path) -> Content:
        """Return the counts in the format that the ending names."""
        return array_bytes({"weight": load_counts(subject)}, path)

    def check(self, content: Content, subject: RoutingTrace, model: ModelSpec | None) -> None:
        """Count some other way: all assignments in all, and one expert after the other in the last layer."""
        weight = check_weight(one_file(content), num_layers=subject.num_layers, num_experts=subject.num_experts,
                              assignments=int((subject.expert_ids >= 0).sum()))
        last = [int((subject.expert_ids[:, -1] == expert).sum()) for expert in range(subject.num_experts)]
        if weight[-1].tolist() != last:
            raise CheckError("eplb-weight: the last layer's counts are not the trace's")

    def command(self, subject: RoutingTrace, model: ModelSpec | None, path: Path) -> str:
        """Return Python that loads the file."""
        return load_command(path, "weight")

    def notes(self, subject: RoutingTrace, model: ModelSpec | None) -> tuple[str, ...]:
        """Return what the numbers count."""
        return ("Counts are over the whole trace, all phases; layers are MoE layers from 0.",)


def array_bytes(arrays: Mapping[str, np.ndarray], path: Path) -> bytes:
    """Return .npz, .npy (the first array alone) or .safetensors bytes, as the ending says."""
    if path.suffix == ".safetensors":
        return safetensors_bytes(arrays)
    file = io.BytesIO()
    if path.suffix == ".npy":
        np.save(file, next(iter(arrays.values())), allow_pickle=False)
    else:
        np.savez(file, allow_pickle=False, **arrays)
    return file.getvalue()


def load_command(path: Path, name: str) -> str:
    """Return a command line that loads a file of arrays and prints a shape."""
    load = f"import numpy; plan = numpy.load({str(path)!r}); print(plan[{name!r}].shape)"
    if path.suffix == ".npy":
        load = f"import numpy; print(numpy.load({str(path)!r}).shape)"
    elif path.suffix == ".safetensors":
        load = f"from safetensors.numpy import load_file; print(load_file({str(path)!r})[{name!r}].shape)"
    return f"python -c {shlex.quote(load)}"
