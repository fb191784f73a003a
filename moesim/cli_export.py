"""``moesim export``: hand a plan, a trace or a run to an engine, another simulator, or a timeline viewer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesim.cli_common import JsonFlag, emit_json, show_pairs
from moesim.errors import InputError

if TYPE_CHECKING:
    from moesim.export.residency import Residency
    from moesim.model.spec import ModelSpec

PERFETTO = "perfetto"
TRACE_SUFFIX, BUILTIN, LIST_SUFFIX = ".trace.parquet", "builtin:", ".csv"


def export(
    source: Annotated[str, typer.Argument(help="A *.plan.json; a trace, a list of experts (CSV layer,expert) or a model "
                                               "for offloading engines; a *.result for perfetto and chakra.")],
    to: Annotated[str, typer.Option(help="perfetto, sglang, tensorrt-llm, vllm, vllm-ascend, eplb, exflow, deepspeed, "
                                         "eplb-weight, vllm-routing, ktransformers, ktransformers-rules, llama.cpp or "
                                         "chakra.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file (chakra: the folder) to write.")],
    model: Annotated[str | None, typer.Option(help="The model (default: as the plan or trace says).")] = None,
    nearest: Annotated[bool, typer.Option(
        "--nearest", help="Write the nearest that the engine can express, where it cannot express this one.")] = False,
    gpu_experts: Annotated[int | None, typer.Option(
        min=0, help="Experts of each layer to keep on the GPU: the trace's most used.")] = None,
    gpu_bytes: Annotated[float | None, typer.Option(
        min=0, help="Bytes of the GPU for routed experts: as many of the trace's most used as fit (llama.cpp: whole "
                    "layers).")] = None,
    overlay: Annotated[Path | None, typer.Option(
        help="A second *.result, of a real run, to lay over the first (perfetto).")] = None,
    json: JsonFlag = False,
) -> None:
    """Write a plan, a trace or a run as files that an engine, a simulator or a timeline viewer loads."""
    if to == PERFETTO:
        _export_timeline(Path(source), out, overlay, json)
        return
    if overlay is not None:
        raise InputError(f"--overlay belongs to --to {PERFETTO}")
    from moesim.errors import unknown
    from moesim.export.engines import EXPORTERS
    from moesim.export.engines import export as write

    if to not in EXPORTERS.names():
        raise unknown("export target", to, [PERFETTO, *EXPORTERS.names()])
    subject, spec = _Source(source, model).subject(to, gpu_experts, gpu_bytes)
    written = write(subject, spec, to, out, nearest=nearest)
    facts = {"file": written.path, "start_command": written.start_command, "notes": written.notes}
    if json:
        emit_json(facts)
        return
    show_pairs(f"Exported for {to}", [("file", written.path), *[("note", note) for note in written.notes]])
    typer.echo(f"\n{written.start_command}")


def _export_timeline(source: Path, out: Path, overlay: Path | None, json: bool) -> None:
    from moesim.export.perfetto import write_timeline
    from moesim.simulate.result import read_result

    second = read_result(overlay) if overlay else None
    path = write_timeline(read_result(source), out, second)
    if json:
        emit_json({"file": path})
    else:
        show_pairs("Timeline", [("file", path), ("how to look at it", "open it at ui.perfetto.dev")])


class _Source:
    """The first argument: what it is depends on the target and on its name."""

    def __init__(self, name: str, model: str | None) -> None:
        self.name, self.model = name, model

    def subject(self, to: str, gpu_experts: int | None, gpu_bytes: float | None) -> tuple[Any, ModelSpec | None]:
        """Return what the target `to` takes, read from the source, and the model if one is known."""
        from moesim.export.engines import EXPORTERS
        from moesim.export.residency import Residency
        from moesim.placement.plan import PlacementPlan, read_plan
        from moesim.simulate.result import SimulationResult, read_result

        taken = EXPORTERS[to].takes
        if taken is Residency:
            return self._residency(to, gpu_experts, gpu_bytes)
        if gpu_experts is not None or gpu_bytes is not None:
            raise InputError(f"--gpu-experts and --gpu-bytes belong to offloading engines, not to {to}")
        if self._is_trace and taken is PlacementPlan:
            raise InputError(f"{to}: takes {EXPORTERS[to].takes_words}, and {self.name} is a trace")
        if taken is PlacementPlan:
            plan = read_plan(self.name)
            return plan, self._spec(plan.provenance.get("model"))
        if taken is SimulationResult:
            return read_result(self.name), self._spec(None)
        trace = self._trace()
        return trace, self._spec(None)

    @property
    def _is_trace(self) -> bool:
        return self.name.startswith(BUILTIN) or self.name.endswith(TRACE_SUFFIX)

    def _trace(self) -> Any:
        from moesim.traces.store import read_trace

        return read_trace(self.name)

    def _spec(self, default: str | None) -> ModelSpec | None:
        from moesim.model.catalog import load_model

        name = self.model or default
        return load_model(name) if name else None

    def _needed(self, default: str | None = None) -> ModelSpec:
        spec = self._spec(default)
        if spec is None:
            raise InputError("--model is needed, for the layers of the model and the bytes of an expert")
        return spec

    def _residency(self, to: str, gpu_experts: int | None, gpu_bytes: float | None) -> tuple[Residency, ModelSpec]:
        """A list of experts as it stands; of a trace or model, what fits."""
        from moesim.export.residency import most_used, read_residency

        if gpu_experts is not None and gpu_bytes is not None:
            raise InputError("give --gpu-experts or --gpu-bytes, not both")
        if self.name.endswith(LIST_SUFFIX):
            if gpu_experts is not None or gpu_bytes is not None:
                raise InputError(f"{self.name} lists the experts: --gpu-experts and --gpu-bytes have no place beside it")
            spec = self._needed()
            return read_residency(self.name, spec), spec
        if to == "llama.cpp" and gpu_bytes is not None:
            return self._whole_layers(gpu_bytes)
        if not self._is_trace:
            raise InputError(f"{to}: takes a trace (*{TRACE_SUFFIX}) or a list of experts (*{LIST_SUFFIX}), "
                             f"got {self.name}")
        spec, trace = self._needed(), self._trace()
        total = None if gpu_bytes is None else int(gpu_bytes // spec.expert_bytes)
        return most_used(trace, per_layer=gpu_experts, total=total), spec

    def _whole_layers(self, gpu_bytes: float) -> tuple[Residency, ModelSpec]:
        """Every layer uses its k experts for each token, so which layers stay is all the same: the last that fit."""
        from moesim.export.residency import last_layers

        spec = self._needed(None if self._is_trace else self.name)
        fit = int(gpu_bytes // (spec.expert_bytes * spec.num_experts))
        return last_layers(spec, min(fit, spec.num_moe_layers)), spec
