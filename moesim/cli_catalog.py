"""``moesim hardware`` and ``moesim model``: what the catalog holds."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesim.cli_common import (
    GpusPerNode,
    JsonFlag,
    NumNodes,
    add_row,
    console,
    emit_json,
    new_table,
    show_pairs,
)

if TYPE_CHECKING:
    from moesim.hardware.spec import HardwareSpec
    from moesim.model.gguf_spec import ExpertTensors, GgufModel
    from moesim.model.spec import ModelSpec

hardware_app = typer.Typer(help="Machines of the catalog.", no_args_is_help=True)
model_app = typer.Typer(help="Models of the catalog.", no_args_is_help=True)

MODEL_SIZES = (
    "num_layers", "num_moe_layers", "num_experts", "top_k", "hidden_size", "expert_intermediate_size",
    "shared_intermediate_size", "dense_intermediate_size", "vocab_size", "num_groups", "groups_per_token",
    "expert_params", "expert_bytes", "non_expert_bytes", "total_bytes", "total_params", "active_params",
    "kv_bytes_per_token_layer")
UNUSUAL_SIZES = ("encoder_layers", "expert_hidden_size", "mixer_params", "extra_params")  # shown where they are set


@hardware_app.command("list")
def list_hardware(json: JsonFlag = False) -> None:
    """List the machines of the catalog."""
    from moesim.hardware.load import hardware_names, load_hardware

    found = {name: load_hardware(name) for name in hardware_names()}
    if json:
        emit_json([{"name": name, "description": spec.description, "num_ranks": spec.num_ranks}
                   for name, spec in found.items()])
        return
    table = new_table("Hardware", "name", "ranks>", "description")
    for name, spec in found.items():
        add_row(table, name, spec.num_ranks, " ".join(spec.description.split()))
    console().print(table)


@hardware_app.command("show")
def show_hardware(
    name: Annotated[str, typer.Argument(help="A name of the catalog, or a YAML file.")],
    num_nodes: NumNodes = 1,
    gpus_per_node: GpusPerNode = None,
    json: JsonFlag = False,
) -> None:
    """Show a machine's devices, memories, links and fabrics, each number with its reference."""
    from moesim.hardware.load import load_hardware

    spec = load_hardware(name, num_nodes=num_nodes, gpus_per_node=gpus_per_node)
    if json:
        emit_json(dataclasses.asdict(spec))
        return
    _show_parts(spec)


def _show_parts(spec: HardwareSpec) -> None:
    from moesim.units import format_bytes, format_rate, format_seconds

    table = new_table(f"{spec.name}, ranks: {spec.num_ranks}, nodes: {spec.num_nodes}",
                      "part", "kind", "size or peak", "rate per direction, or power", "latency", "ref")
    for device in spec.devices.values():
        peak = ", ".join(f"{dtype} {rate:.3g} flop/s" for dtype, rate in device.flops_per_s.items())
        overhead = format_seconds(device.kernel_overhead_s)
        power = "" if device.idle_w is None else f"{device.idle_w:g} to {device.busy_w:g} W"
        add_row(table, device.name, device.kind, peak, power, overhead, device.reference)
    for memory in spec.memories.values():
        add_row(table, memory.name, memory.kind, format_bytes(memory.num_bytes),
                format_rate(memory.bytes_per_s), "", memory.reference)
    for link in spec.links.values():
        add_row(table, link.name, link.kind, f"{link.source} - {link.target}", format_rate(link.bytes_per_s),
                format_seconds(link.latency_s), link.reference)
    for fabric in spec.fabrics:
        add_row(table, fabric.name, fabric.kind, f"{fabric.scope}, {fabric.contention}",
                format_rate(fabric.bytes_per_s), format_seconds(fabric.latency_s), fabric.reference)
    out = console()
    out.print(table)
    show_pairs("References", spec.references.items())


@model_app.command("list")
def list_models(json: JsonFlag = False) -> None:
    """List the models of the catalog."""
    from moesim.model.catalog import load_model, model_names
    from moesim.units import format_bytes

    found = {name: load_model(name) for name in model_names()}
    if json:
        emit_json({name: _sizes(spec) for name, spec in found.items()})
        return
    table = new_table("Models", "name", "MoE layers>", "experts>", "top-k>", "one expert>", "all weights>")
    for name, spec in found.items():
        add_row(table, name, spec.num_moe_layers, spec.num_experts, spec.top_k,
                format_bytes(spec.expert_bytes), format_bytes(spec.total_bytes))
    console().print(table)


@model_app.command("show")
def show_model(
    name: Annotated[str, typer.Argument(help="A name of the catalog, a config.json or its folder, or a .gguf file.")],
    json: JsonFlag = False,
) -> None:
    """Show a model's sizes, and the bytes and parameters that follow from them; of a GGUF file also its types."""
    from moesim.model.catalog import load_model
    from moesim.model.gguf_spec import read_gguf_model
    from moesim.report.tables import format_value

    stored = read_gguf_model(name) if name.endswith(".gguf") else None
    spec = load_model(name) if stored is None else stored.spec
    sizes = _sizes(spec) if stored is None else _sizes(spec) | {"file_bytes": stored.file_bytes}
    if json:
        experts = {} if stored is None else {"experts": [dataclasses.asdict(layer) for layer in stored.experts]}
        emit_json({"name": spec.name, **sizes, **experts})
        return
    show_pairs(spec.name, [(key, format_value(key, value)) for key, value in sizes.items()])
    if stored is not None:
        _show_experts(stored)


def _sizes(spec: ModelSpec) -> dict[str, Any]:
    sizes = {key: getattr(spec, key) for key in MODEL_SIZES}
    unusual = {key: getattr(spec, key) for key in UNUSUAL_SIZES if getattr(spec, key)}
    words = {"attention": spec.attention.kind, "attentions_per_layer": spec.attention.per_layer,
             "weight_bytes": spec.weight_bytes, "source": spec.source}
    return sizes | unusual | words


def _show_experts(model: GgufModel) -> None:
    """Print how the file stores its experts, layers that store them alike in one row."""
    from moesim.units import format_bytes

    table = new_table("Experts as stored", "layers", "types", "one expert>", "bytes>")
    runs: list[tuple[int, int, ExpertTensors]] = []
    for layer in model.experts:
        if runs and (runs[-1][2].types, runs[-1][2].expert_bytes) == (layer.types, layer.expert_bytes):
            runs[-1] = (runs[-1][0], layer.layer, layer)
        else:
            runs.append((layer.layer, layer.layer, layer))
    for first, last, layer in runs:
        types = ", ".join(f"{projection} {kind}" for projection, kind in layer.types.items())
        add_row(table, f"{first} - {last}" if last > first else first, types, format_bytes(layer.expert_bytes),
                layer.expert_bytes)
    console().print(table)
