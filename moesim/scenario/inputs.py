"""What every study starts from: the scenario's model, trace and hardware, loaded and checked against each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moesim.errors import InputError
from moesim.hardware.cost import CostModel
from moesim.hardware.load import load_hardware
from moesim.hardware.profile import read_profile
from moesim.hardware.spec import HardwareSpec
from moesim.model.catalog import load_model
from moesim.model.spec import ModelSpec
from moesim.scenario.schema import GENERATED, HardwareChoice, Scenario, Workload
from moesim.traces.batching import batched_steps
from moesim.traces.steps import Step, closed_loop_steps
from moesim.traces.store import read_trace, resolve_trace
from moesim.traces.synth import synthetic_trace
from moesim.traces.trace import RoutingTrace


@dataclass(frozen=True)
class Inputs:
    """A scenario's model and trace (None: each study makes its own), with what to say about where they come from."""

    scenario: Scenario
    model: ModelSpec
    given_trace: RoutingTrace | None
    digest: str

    @property
    def trace(self) -> RoutingTrace:
        """The scenario's trace.

        Raises:
            InputError: ``trace: generated``.
        """
        if self.given_trace is None:
            raise InputError(f"scenario {self.scenario.name!r} has no trace of its own (trace: {GENERATED})")
        return self.given_trace

    @property
    def provenance(self) -> dict[str, Any]:
        """Names, seed and digest for artefacts."""
        return {
            "scenario": self.scenario.name,
            "model": self.model.name,
            "trace": self.scenario.trace,
            "trace_digest": self.digest,
            "seed": self.scenario.seed,
        }

    def notes(self) -> tuple[str, ...]:
        """Sentences on the routing."""
        if self.scenario.synthetic is not None:
            made = self.scenario.synthetic
            return (f"Routing is made up (zipf {made.zipf:g}, affinity {made.affinity:g}, locality {made.locality:g}): sizes and times "
                    "are the model's, hit rates are those of these numbers. Capture a trace before you decide by them.",)
        if not self.scenario.trace_stands_in:
            return ()
        return (
            f"Routing is that of {self.trace.model or 'another model'} and stands in for {self.model.name} (same layers, experts "
            "and top-k): sizes are the model's, loads and locality are the trace's.",
        )


def load_inputs(scenario: Scenario) -> Inputs:
    """Load the model and the trace.

    Raises:
        InputError: they do not match, or the trace is another model's and the scenario does not say so.
    """
    model = load_model(scenario.model)
    if model.encoder_layers:
        raise InputError(f"model {model.name!r} is an encoder-decoder, whose steps cannot be simulated")
    if scenario.trace == GENERATED:
        return _generated(scenario, model)
    trace = read_trace(resolve_trace(scenario.trace))
    trace.check_model(model)
    if trace.model and not scenario.trace_stands_in and not _same_model(trace.model, model.name):
        raise InputError(
            f"the trace is of {trace.model!r}, not of {model.name!r}; if its routing is meant to stand in for the model's, "
            "say so: trace_stands_in: true"
        )
    return Inputs(scenario, model, trace, trace.digest())


def _generated(scenario: Scenario, model: ModelSpec) -> Inputs:
    """Make the routing that a scenario describes, in the model's shape; None where its studies make their own."""
    if scenario.synthetic is None:
        return Inputs(scenario, model, None, "")
    settings = scenario.synthetic.model_dump()
    sizes = (settings.pop("num_tokens"), model.num_moe_layers, model.num_experts, model.top_k, settings.pop("num_requests"))
    trace = synthetic_trace(*sizes, seed=scenario.seed, **settings)
    return Inputs(scenario, model, trace, trace.digest())


def _same_model(one: str, other: str) -> bool:
    return one.split("/")[-1].casefold() == other.split("/")[-1].casefold()


def load_machine(choice: HardwareChoice, profile: str | None) -> tuple[HardwareSpec, CostModel]:
    """Load a study's hardware and its cost model."""
    hardware = load_hardware(choice.name, num_nodes=choice.num_nodes, gpus_per_node=choice.gpus_per_node)
    return hardware, CostModel(hardware, read_profile(profile) if profile else None)


def make_steps(trace: RoutingTrace, workload: Workload, seed: int) -> list[Step]:
    """Draw the steps of a workload from a trace."""
    options: dict[str, Any] = {
        "batch_size": workload.batch_size, "max_steps": workload.max_steps, "include_prefill": workload.include_prefill,
        "repeat": workload.max_steps is not None, "seed": seed}
    if workload.waiting:
        return batched_steps(trace, workload.batcher, waiting=workload.waiting, **options)
    return closed_loop_steps(trace, **options)


def source_note(sources: dict[str, int]) -> str:
    """Return a sentence on where the costs come from."""
    total = sum(sources.values())
    parts = [f"{100 * count / total:.0f} % {name}" for name, count in sources.items() if count]
    beyond = sources.get("extrapolated", 0)
    warning = f" {beyond} of {total} lie beyond the measured sizes: they are extrapolated." if beyond else ""
    return f"Costs of tasks: {', '.join(parts)}.{warning}" if parts else "No task had a cost."
