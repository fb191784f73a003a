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
    from moesim.traces.arrivals import Arrivals
    from moesim.traces.counts import CountTrace
    from moesim.traces.stats import TraceStats
    from moesim.traces.trace import RoutingTrace

trace_app = typer.Typer(help="Routing traces: import, capture, synthesise, describe.", no_args_is_help=True)

TraceName = Annotated[str, typer.Argument(metavar="TRACE", help="A *.trace.parquet file or builtin:NAME.")]
OutFile = Annotated[Path, typer.Option("--out", help="The *.trace.parquet file to write.")]


@trace_app.command("info")
def info(trace: TraceName, json: JsonFlag = False) -> None:
    """Print the header of a trace, counts or arrivals file, without reading its rows."""
    facts = _header(trace)
    if json:
        emit_json(facts)
    else:
        show_pairs(trace, [(key, _short(value)) for key, value in facts.items()])


def _header(name: str) -> dict[str, Any]:
    """Return the header of whatever `moesim trace import` writes."""
    from moesim.traces.arrivals import arrivals_info, is_arrivals
    from moesim.traces.counts import counts_info, is_counts
    from moesim.traces.store import trace_info

    if is_counts(name):
        return counts_info(name)
    return arrivals_info(name) if is_arrivals(name) else trace_info(name)


def _short(value: object, width: int = 200) -> str:
    text = str(value)
    return text if len(text) <= width else text[:width] + " ..."


@trace_app.command("stats")
def stats(
    trace: TraceName,
    phase: Annotated[str, typer.Option(help="all, prefill, decode or denoise.")] = "all",
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to sample for recall, overlap, LRU.")] = 4096,
    srp: Annotated[list[int], typer.Option("--srp", metavar="M", min=1, help="Also routing of segments of M tokens (SRP).")] = [],  # noqa: B006
    sch: Annotated[list[int], typer.Option("--sch", metavar="M", min=1, help="Also hit rates of a cache that knows the next "
                                                                             "M tokens (SCH), at 1, 2, 3 times top-k slots.")] = [],  # noqa: B006
    seed: SeedOption = 0,
    json: JsonFlag = False,
) -> None:
    """Measure a trace: load, layer-to-layer structure, reuse from token to token (counts, arrivals: a short summary)."""
    if _short_summary(trace, json):
        return
    from moesim.report.tables import format_value
    from moesim.traces.stats import file_stats

    found = file_stats(trace, seed=seed, phase=phase, max_tokens=max_tokens)
    consistency = _consistency(trace, phase, srp, sch)
    if json:
        emit_json(found.as_dict() | consistency)
        return
    facts = {"phase": found.phase, "num_tokens": found.num_tokens, "num_requests": found.num_requests}
    show_pairs(trace, [(key, format_value(key, value)) for key, value in (facts | found.summary()).items()])
    curve = [(f"{size} of {found.expert_load.shape[1]} experts per layer", f"{100 * real:.1f} % | {100 * mixed:.1f} %")
             for size, real, mixed in _curve_points(found)]
    show_pairs("LRU hit rate: in order | tokens shuffled", curve)
    for title, key, words in (("Segment routing of the model", "srp", "SRP {srp:.4f}, threshold {threshold}, rho {relative_size:.2f}"),
                              ("Segment cache", "sch", "hit rate {hit_rate:.4f}")):
        if key in consistency:
            show_pairs(title, [(row["what"], words.format(**row)) for row in consistency[key]])


def _consistency(name: str, phase: str, srp: list[int], sch: list[int]) -> dict[str, list[dict[str, Any]]]:
    """Return a row per window of `--srp`, and per window and size of `--sch`; nothing that was not asked for."""
    if not srp and not sch:
        return {}
    from moesim.cache.segment_cache import segment_cache_hits
    from moesim.traces.consistency import segment_routings
    from moesim.traces.split import select_phase
    from moesim.traces.store import read_trace

    rows: dict[str, list[dict[str, Any]]] = {}
    trace = select_phase(read_trace(name), phase)
    if srp:
        rows["srp"] = [_srp_row(m, segment_routings(trace, m)) for m in srp]
    if sch:
        rows["sch"] = [{"what": f"{m} tokens, {rho} x top-k slots", "window_tokens": m, "rho": rho, "hit_rate": hits.hit_rate,
                        "layer_hit_rate": hits.layer_hit_rates.tolist()}
                       for m in sch for rho in (1, 2, 3) for hits in [segment_cache_hits(trace, m, rho)]]
    return rows


def _srp_row(window: int, found: dict[str, Any]) -> dict[str, Any]:
    """Return SRP of the model, and by layer."""
    model, layers = found["model"], found["layer"]
    return {"what": f"{window} tokens", "window_tokens": window, "srp": float(model.srp), "threshold": int(model.threshold),
            "relative_size": float(model.relative_size), "layer_srp": layers.srp.tolist(),
            "layer_relative_size": layers.relative_size.tolist()}


def _short_summary(name: str, json: bool) -> bool:
    """Print the summary of a counts or arrivals file; False if it is neither."""
    from moesim.report.tables import format_value
    from moesim.traces.arrivals import is_arrivals, read_arrivals
    from moesim.traces.counts import is_counts, read_counts

    if not is_counts(name) and not is_arrivals(name):
        return False
    facts = read_counts(name).summary() if is_counts(name) else read_arrivals(name).summary()
    if json:
        emit_json(facts)
    else:
        show_pairs(name, [(key, format_value(key, value)) for key, value in facts.items() if value is not None])
    return True


def _curve_points(found: TraceStats) -> list[tuple[int, float, float]]:
    """Return (size, hit rate, hit rate of shuffled tokens) at up to eight sizes of the LRU curve, its ends among them."""
    last = len(found.lru_sizes) - 1
    places = sorted({round(last * step / 7) for step in range(8)})
    return [(int(found.lru_sizes[p]), float(found.lru_hit_rate[p]), float(found.lru_hit_rate_shuffled[p])) for p in places]


@trace_app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(help="A file of another tool, or a folder of them.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The *.trace.parquet file to write (*.counts.parquet for "
                                                          "expert counts, *.arrivals.parquet for request arrivals).")],
    source_format: Annotated[str | None, typer.Option(
        "--from", "--format", metavar="NAME", help="Whose file it is, as in docs/traces.md. Default: from the "
                                                   "content.")] = None,
    axes: Annotated[str | None, typer.Option(help="Order of an array's axes, as layer,token,k.")] = None,
    num_experts: Annotated[int | None, typer.Option(min=1, help="Default: from the file or the model, else the "
                                                                "largest id + 1.")] = None,
    phase: Annotated[str | None, typer.Option(help="The phase of every row: prefill or decode. Default: what the "
                                                   "file says, else decode.")] = None,
    model: Annotated[str, typer.Option(help="Name of the model that was recorded.")] = "",
    model_config: Annotated[str | None, typer.Option(
        help="The recorded model (catalog name, config.json): names the MoE layers and is checked against.")] = None,
    physical_to_logical: Annotated[Path | None, typer.Option(
        metavar="FILE", help="The map of slots to experts that was loaded, for recordings of slots.")] = None,
    skip_rows: Annotated[int, typer.Option(min=0, help="Leading rows to drop (warm-up).")] = 0,
    option: OptionList = [],  # noqa: B006
    json: JsonFlag = False,
) -> None:
    """Read what another tool recorded (routing, expert counts or request arrivals), and write it for moesim."""
    from moesim.traces.importers import import_any

    options = _reader_options(parse_options(option)) | ({} if axes is None else {"axes": axes})
    found = import_any(
        source, source_format=source_format, num_experts=num_experts, phase=phase, model=model,
        model_config=model_config, physical_to_logical=physical_to_logical, skip_rows=skip_rows, **options)
    _write_found(found, out, json)


def _reader_options(options: dict[str, Any]) -> dict[str, Any]:
    """Refuse what has an option of its own."""
    from moesim.errors import InputError

    for key in ("source_format", "num_experts", "phase", "model", "model_config", "physical_to_logical", "skip_rows",
                "axes", "path"):
        if key in options:
            own = "from" if key == "source_format" else key.replace("_", "-")
            raise InputError(f"--option {key}: give it as --{own}")
    return options


def _write_found(found: RoutingTrace | CountTrace | Arrivals, out: Path, json: bool) -> None:
    """Write what an importer found under an ending that does not say something else."""
    from moesim.errors import InputError
    from moesim.traces import arrivals, counts, store
    from moesim.traces.trace import RoutingTrace

    words, suffix = "routing", store.SUFFIX
    if isinstance(found, counts.CountTrace):
        words, suffix = "expert counts without tokens", counts.SUFFIX
    elif isinstance(found, arrivals.Arrivals):
        words, suffix = "request arrivals without routing", arrivals.SUFFIX
    for other in (store.SUFFIX, counts.SUFFIX, arrivals.SUFFIX):
        if other != suffix and out.name.endswith(other):
            raise InputError(f"--out {out}: the source holds {words}; name it {out.name.removesuffix(other)}{suffix}")
    if isinstance(found, RoutingTrace):
        _write(found, out, json)
        return
    facts = found.summary() | {"source": found.source, "notes": found.metadata.get("notes", [])}
    if isinstance(found, counts.CountTrace):
        counts.write_counts(found, out)
    else:
        arrivals.write_arrivals(found, out)
    if json:
        emit_json({**facts, "file": out})
        return
    show_pairs("Counts" if suffix == counts.SUFFIX else "Arrivals", [(key, value) for key, value in facts.items()])
    show_files([out])


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
    model: Annotated[Path, typer.Argument(help="A local Hugging Face model folder, or a .gguf file (llama.cpp).")],
    prompts: Annotated[Path, typer.Argument(help='JSON lines: {"request_id": 0, "token_ids": [...]}.')],
    out: OutFile,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate per request.")] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="0: greedy.")] = 1.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Requests that run together, padded.")] = 1,
    padding: Annotated[str, typer.Option(help="Side on which a batch is padded: left or right.")] = "left",
    scores: Annotated[Path | None, typer.Option(help="Also write what the routers scored to this file.")] = None,
    stop_at_eos: Annotated[bool, typer.Option(help="End a request at the end-of-sequence token.")] = True,
    resume: Annotated[bool, typer.Option(help="Go on with an interrupted capture.")] = False,
    with_token_ids: Annotated[bool, typer.Option(help="Also store the text's token ids.")] = False,
    seed: SeedOption = 0,
    json: JsonFlag = False,
) -> None:
    """Run a model on prompts and record which experts every token uses. Nothing is downloaded."""
    from moesim.traces.capture import capture_command

    with progress_bar(quiet=json) as bar:
        trace = capture_command(
            model, prompts, out, max_new_tokens=max_new_tokens, seed=seed, temperature=temperature,
            batch_size=batch_size, padding=padding, scores=scores, stop_at_eos=stop_at_eos, resume=resume,
            with_token_ids=with_token_ids, progress=lambda done, total: bar("requests", done, total))
    _tell(trace, out, json, *([scores] if scores is not None else []))


def _write(trace: RoutingTrace, out: Path, json: bool) -> None:
    from moesim.traces.store import write_trace

    _tell(trace, write_trace(trace, out), json)


def _tell(trace: RoutingTrace, out: Path, json: bool, *others: Path) -> None:
    facts = {
        "num_tokens": trace.num_tokens, "num_requests": len(trace.requests()), "num_layers": trace.num_layers,
        "num_experts": trace.num_experts, "top_k": trace.top_k, "model": trace.model, "source": trace.source,
        "notes": trace.metadata.get("notes", [])}
    if json:
        emit_json({**facts, "file": out, **({"scores": others[0]} if others else {})})
        return
    show_pairs("Trace", [(key, value) for key, value in facts.items() if value or value == 0])
    show_files([out, *others])
