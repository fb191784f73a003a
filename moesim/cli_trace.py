"""``moesim trace``: import, capture, synthesise, describe and measure routing traces."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesim.cli_common import (
    JsonFlag,
    OptionList,
    SeedOption,
    emit_json,
    parse_options,
    progress_bar,
    show_files,
    show_pairs,
)

if TYPE_CHECKING:
    from moesim.traces.stats import TraceStats
    from moesim.traces.trace import RoutingTrace

trace_app = typer.Typer(help="Routing traces: import, capture, synthesise, describe.", no_args_is_help=True)

TraceName = Annotated[str, typer.Argument(metavar="TRACE", help="A *.trace.parquet file or builtin:NAME.")]
OutFile = Annotated[Path, typer.Option("--out", help="The *.trace.parquet file to write.")]


@trace_app.command("info")
def info(trace: TraceName, json: JsonFlag = False) -> None:
    """Print a trace file's header, without reading its rows."""
    from moesim.traces.store import trace_info

    facts = trace_info(trace)
    if json:
        emit_json(facts)
    else:
        show_pairs(trace, [(key, _short(value)) for key, value in facts.items()])


def _short(value: object, width: int = 200) -> str:
    text = str(value)
    return text if len(text) <= width else text[:width] + " ..."


@trace_app.command("stats")
def stats(
    trace: TraceName,
    phase: Annotated[str, typer.Option(help="all, prefill, decode or denoise.")] = "all",
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to sample for recall, overlap, LRU.")] = 4096,
    seed: SeedOption = 0,
    json: JsonFlag = False,
) -> None:
    """Measure a trace: load, layer-to-layer structure, reuse from token to token."""
    from moesim.report.tables import format_value
    from moesim.traces.stats import trace_stats
    from moesim.traces.store import read_trace, resolve_trace

    found = trace_stats(read_trace(resolve_trace(trace)), seed=seed, phase=phase, max_tokens=max_tokens)
    if json:
        emit_json(found.as_dict())
        return
    facts = {"phase": found.phase, "num_tokens": found.num_tokens, "num_requests": found.num_requests}
    show_pairs(trace, [(key, format_value(key, value)) for key, value in (facts | found.summary()).items()])
    curve = [(f"{size} of {found.expert_load.shape[1]} experts per layer", f"{100 * real:.1f} % | {100 * mixed:.1f} %")
             for size, real, mixed in _curve_points(found)]
    show_pairs("LRU hit rate: in order | tokens shuffled", curve)


def _curve_points(found: TraceStats) -> list[tuple[int, float, float]]:
    """Return (size, hit rate, hit rate of shuffled tokens) at up to eight sizes of the LRU curve, its ends among them."""
    last = len(found.lru_sizes) - 1
    places = sorted({round(last * step / 7) for step in range(8)})
    return [(int(found.lru_sizes[p]), float(found.lru_hit_rate[p]), float(found.lru_hit_rate_shuffled[p])) for p in places]


@trace_app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(help="A .npz, .npy or .jsonl file of another tool.")],
    out: OutFile,
    source_format: Annotated[str | None, typer.Option("--format", help="Default: from the content.")] = None,
    num_experts: Annotated[int | None, typer.Option(min=1, help="Default: the largest id + 1.")] = None,
    phase: Annotated[str, typer.Option(help="The phase of every row: prefill or decode.")] = "decode",
    model: Annotated[str, typer.Option(help="Name of the model that was recorded.")] = "",
    skip_rows: Annotated[int, typer.Option(min=0, help="Leading rows to drop (warm-up).")] = 0,
    option: OptionList = [],  # noqa: B006
    json: JsonFlag = False,
) -> None:
    """Read routing that another tool recorded, and write it as a trace."""
    from moesim.traces.importers import import_trace

    trace = import_trace(source, source_format=source_format, num_experts=num_experts, phase=phase,
                         model=model, skip_rows=skip_rows, **_reader_options(parse_options(option)))
    _write(trace, out, json)


def _reader_options(options: dict[str, Any]) -> dict[str, Any]:
    """Refuse what has an option of its own."""
    from moesim.errors import InputError

    for key in ("source_format", "num_experts", "phase", "model", "skip_rows", "path"):
        if key in options:
            raise InputError(f"--option {key}: give it as --{key.replace('_', '-')}")
    return options


@trace_app.command("synth")
def synth(
    out: OutFile,
    num_tokens: Annotated[int, typer.Option(help="Rows in all.")] = 4096,
    num_layers: Annotated[int, typer.Option(help="MoE layers.")] = 16,
    num_experts: Annotated[int, typer.Option(help="Experts per layer.")] = 64,
    top_k: Annotated[int, typer.Option(help="Experts per token.")] = 8,
    num_requests: Annotated[int, typer.Option(help="Requests.")] = 32,
    zipf: Annotated[float, typer.Option(help="Skew of the load (0: even).")] = 1.0,
    affinity: Annotated[float, typer.Option(help="Pull from layer to layer, 0 ... 1.")] = 0.5,
    locality: Annotated[float, typer.Option(help="Pull from token to token, 0 ... 1.")] = 0.5,
    prompt_fraction: Annotated[float, typer.Option(help="Share of each request that is prefill.")] = 0.25,
    seed: SeedOption = 0,
    json: JsonFlag = False,
) -> None:
    """Make up a trace with known structure (it is marked as synthetic)."""
    from moesim.traces.synth import synthetic_trace

    trace = synthetic_trace(
        num_tokens, num_layers, num_experts, top_k, num_requests, zipf=zipf, affinity=affinity,
        locality=locality, prompt_fraction=prompt_fraction, seed=seed)
    _write(trace, out, json)


@trace_app.command("capture")
def capture(
    model_folder: Annotated[Path, typer.Argument(help="A local Hugging Face model folder.")],
    prompts: Annotated[Path, typer.Argument(help='JSON lines: {"request_id": 0, "token_ids": [...]}.')],
    out: OutFile,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate per request.")] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="0: greedy.")] = 1.0,
    resume: Annotated[bool, typer.Option(help="Go on with an interrupted capture.")] = False,
    with_token_ids: Annotated[bool, typer.Option(help="Also store the text's token ids.")] = False,
    seed: SeedOption = 0,
    json: JsonFlag = False,
) -> None:
    """Run a model on prompts and record which experts every token uses. Nothing is downloaded."""
    from moesim.traces.capture import capture_command

    with progress_bar(quiet=json) as bar:
        trace = capture_command(
            model_folder, prompts, out, max_new_tokens=max_new_tokens, seed=seed, temperature=temperature,
            resume=resume, with_token_ids=with_token_ids,
            progress=lambda done, total: bar("requests", done, total))
    _tell(trace, out, json)


def _write(trace: RoutingTrace, out: Path, json: bool) -> None:
    from moesim.traces.store import write_trace

    _tell(trace, write_trace(trace, out), json)


def _tell(trace: RoutingTrace, out: Path, json: bool) -> None:
    facts = {
        "num_tokens": trace.num_tokens, "num_requests": len(trace.requests()), "num_layers": trace.num_layers,
        "num_experts": trace.num_experts, "top_k": trace.top_k, "model": trace.model, "source": trace.source,
        "notes": trace.metadata.get("notes", [])}
    if json:
        emit_json({**facts, "file": out})
        return
    show_pairs("Trace", [(key, value) for key, value in facts.items() if value or value == 0])
    show_files([out])
