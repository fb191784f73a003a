"""Capture: the routing of a real Hugging Face model, by hooks on its expert modules.

`capture_hooks` sees what the routers chose, `capture_generate` runs the model on batches of requests, and
`capture_scores` keeps the routers' scores where they are asked for; here they become a trace file that
grows while the model runs and that an interrupted run goes on with.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from moesim.artifacts import read_bytes
from moesim.errors import InputError, require
from moesim.model.gguf_spec import gguf_name
from moesim.traces.capture_generate import Generation, Request, RequestRun, Settings
from moesim.traces.capture_hooks import PassRouting, RouterRecorder
from moesim.traces.capture_llama import LlamaGeneration, check_context
from moesim.traces.capture_scores import ScoreRows, ScoresWriter, finish_scores
from moesim.traces.store import PART_FOLDER_SUFFIX, open_trace, read_trace
from moesim.traces.trace import DECODE, PREFILL, RoutingTrace
from moesim.traces.writer import TraceWriter

Requests = Sequence[Request]
Progress = Callable[[int, int], None]
PathLike = str | os.PathLike[str]


def capture_routing(model: Any, requests: Requests, out: TraceWriter | PathLike, *,
                    max_new_tokens: int, seed: int, temperature: float = 1.0, stop_at_eos: bool = True,
                    batch_size: int = 1, padding: str = "left", scores: PathLike | None = None,
                    with_token_ids: bool = False, resume: bool = False, model_name: str = "",
                    metadata: dict[str, Any] | None = None, progress: Progress | None = None) -> int:
    """Run `model` on each request and write its routing; return how many requests were run now.

    A request's prompt is one prefill pass, then each new token one decode pass with the KV cache. Of
    `max_new_tokens` tokens the last is not fed back, so a request has at most ``max_new_tokens - 1``
    decode rows. With `batch_size` 1 there is no padding, and the model's numbers are those it gives alone;
    a batch pads its prompts, and padding is never recorded (in low precision, sums of another shape may
    round otherwise and turn a near-tie). The model's outputs do not change; it runs in eval mode and gets
    its mode back.

    Args:
        requests: (request_id, token ids of the prompt).
        out: an open TraceWriter (which stays open), or a path to write.
        seed, temperature: each request samples with its own generator from (seed, request_id), so a
            resumed run equals an uninterrupted one; temperature 0 is greedy.
        stop_at_eos: end a request at the config's end-of-sequence token.
        batch_size: requests that run together, in the order given; each batch is written when it is done.
        padding: the side on which shorter prompts are padded: left or right.
        scores: also write what the routers scored to this file (see `capture_scores`).
        resume: with a path, go on after an interrupted run; written requests are skipped.
        progress: called as (requests done, requests in all).

    Raises:
        InputError: not an MoE model, a bad prompt, or a run that cannot be resumed with these settings.
    """
    require("torch", "torch", "capturing routing")
    import torch

    settings = Settings(max_new_tokens, seed, temperature, stop_at_eos, batch_size, padding)
    check_requests(requests, int(model.config.get_text_config().vocab_size))
    was_training = model.training
    recorder = RouterRecorder(model, with_scores=scores is not None)
    model.eval()
    try:
        with torch.inference_mode(), recorder.attached():
            run = CaptureRun(Generation(model, recorder, settings), requests, progress)
            if isinstance(out, TraceWriter):
                if scores is not None:
                    raise InputError("scores need a path to write the trace to, not an open writer")
                return run.write(out, None)
            return run.to_files(out, scores, with_token_ids, resume, model_name or type(model).__name__, metadata or {})
    finally:
        model.train(was_training)


class Source(Protocol):
    """What runs requests and records their routing: a Hugging Face model, or one in llama.cpp."""

    settings: Settings
    layer_ids: list[int]
    num_experts: int
    origin: str

    def sizes(self) -> dict[str, int]:
        """Return the model's sizes, for the trace's metadata."""

    def routing_of(self, tokens: Sequence[int]) -> PassRouting:
        """Return the routing of one pass over a few tokens."""

    def run(self, requests: Sequence[Request]) -> list[RequestRun]:
        """Run a batch of requests; return them with their routing."""


def _drop_empty(scores: ScoresWriter | None) -> None:
    if scores is not None and not scores.has_parts:
        scores.discard()  # nothing to resume from


def _close_scores(scores: ScoresWriter, trace: PathLike, facts: dict[str, Any]) -> None:
    with open_trace(trace) as (_, _, document):
        scores.close(trace_digest=document["digest"], model=document["model"], metadata=facts)


def check_requests(requests: Requests, vocabulary: int) -> None:
    """Raise InputError unless there are requests, each with an id of its own and tokens of the vocabulary."""
    if not requests:
        raise InputError("no requests to capture")
    seen: set[int] = set()
    for request_id, tokens in requests:
        if not 0 <= request_id <= np.iinfo(np.int32).max:
            raise InputError(f"request_id must lie in 0 ... {np.iinfo(np.int32).max}, got {request_id}")
        if request_id in seen:
            raise InputError(f"request {request_id} is there twice")
        seen.add(request_id)
        if not len(tokens):
            raise InputError(f"request {request_id} has no tokens")
        if min(tokens) < 0 or max(tokens) >= vocabulary:
            raise InputError(f"request {request_id} has token ids outside 0 ... {vocabulary - 1}")


def run_settings(requests: Requests, settings: Settings, with_scores: bool) -> dict[str, Any]:
    """Return what decides a run's result besides the model; the prompts only as a digest."""
    prompts = json.dumps([[int(request), *map(int, tokens)] for request, tokens in requests])
    return {**asdict(settings), "with_scores": with_scores, "num_requests": len(requests),
            "prompts_digest": f"sha256:{hashlib.sha256(prompts.encode()).hexdigest()}"}


class CaptureRun:
    """The requests of one capture, batch by batch, into a trace."""

    def __init__(self, source: Source, requests: Requests, progress: Progress | None) -> None:
        self.source, self.requests, self.progress = source, requests, progress

    def to_files(self, out: PathLike, scores: PathLike | None, with_token_ids: bool, resume: bool, name: str,
                 metadata: dict[str, Any]) -> int:
        """Write the trace, and the scores where asked for; return how many requests were run now."""
        facts = {**metadata, **run_settings(self.requests, self.source.settings, scores is not None)}
        with ExitStack() as stack:
            writer = stack.enter_context(self._open(out, with_token_ids, resume, name, facts))
            kept = None if scores is None else ScoresWriter(
                scores, self.source.layer_ids, writer.requests_done(), resume=resume)
            stack.callback(_drop_empty, kept)
            count = self.write(writer, kept)
        if kept is not None:
            _close_scores(kept, out, facts)
        return count

    def _open(self, path: PathLike, with_token_ids: bool, resume: bool, name: str,
              metadata: dict[str, Any]) -> TraceWriter:
        """Return a writer for what the model routes, found by one pass over one token."""
        source = self.source
        probe = source.routing_of(list(self.requests[0][1])[:1])
        return TraceWriter(
            path, num_layers=len(source.layer_ids), top_k=probe.ids.shape[2], num_experts=source.num_experts,
            layer_ids=source.layer_ids, model=name, metadata={**metadata, "config": source.sizes()},
            source=f"captured from {name} by {source.origin}",
            with_weights=probe.weights is not None, with_token_ids=with_token_ids, resume=resume)

    def write(self, writer: TraceWriter, scores: ScoresWriter | None) -> int:
        """Run what is not written yet; scores of a batch are written before its routing, which marks it done."""
        done = writer.requests_done()
        count = 0
        for batch in _batches(self.requests, self.source.settings.batch_size):
            if all(request_id in done for request_id, _ in batch):
                continue
            runs = self.source.run(batch)
            trace = _trace_of(runs, writer)
            if scores is not None:
                scores.append(ScoreRows(trace.request_id, trace.position, np.concatenate(
                    [run.joined().scores for run in runs])))  # type: ignore[misc]
            writer.append(trace)
            done |= {run.request_id for run in runs}
            count += len(runs)
            if self.progress is not None:
                self.progress(len(done), len(self.requests))
        return count


def _batches(requests: Requests, size: int) -> Iterator[Requests]:
    for start in range(0, len(requests), size):
        yield requests[start:start + size]


def _trace_of(runs: list[RequestRun], writer: TraceWriter) -> RoutingTrace:
    """Return the trace of a batch, request after request; requests of a batch share its steps."""
    head = writer.header
    joined = [run.joined() for run in runs]
    position = np.concatenate([np.arange(len(run.fed)) for run in runs])
    prompt = np.repeat([run.prompt_tokens for run in runs], [len(run.fed) for run in runs])
    weights = [part.weights for part in joined if part.weights is not None]
    return RoutingTrace(
        expert_ids=np.concatenate([part.ids for part in joined]),
        gate_weights=np.concatenate(weights) if head.with_weights else None,
        request_id=np.repeat([run.request_id for run in runs], [len(run.fed) for run in runs]),
        position=position, phase=np.where(position < prompt, PREFILL, DECODE),
        step=writer.next_step + np.concatenate([run.steps() for run in runs]),
        num_experts=head.num_experts, layer_ids=np.array(head.layer_ids),
        token_id=np.concatenate([run.fed for run in runs]) if head.with_token_ids else None)


def read_prompts(path: str | os.PathLike[str]) -> list[tuple[int, list[int]]]:
    """Read prompts: one JSON object per line, ``{"request_id": 0, "token_ids": [1, 2, 3]}``.

    A line may also carry a ``domain``, a label for the reader; it is not used.

    Raises:
        InputError: a line that is not such an object, with file and line number.
    """
    requests: list[tuple[int, list[int]]] = []
    for number, line in enumerate(read_bytes(path).decode("utf-8", errors="replace").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}:{number}: not valid JSON: {error.msg}") from None
        if not isinstance(entry, dict) or entry.keys() - {"domain"} != {"request_id", "token_ids"}:
            raise InputError(f'{path}:{number}: expected {{"request_id": ..., "token_ids": [...]}}')
        values: Any = entry["token_ids"] if isinstance(entry["token_ids"], list) else [None]
        if any(type(value) is not int for value in (entry["request_id"], *values)):
            raise InputError(f"{path}:{number}: request_id must be a whole number, token_ids a list of them")
        requests.append((entry["request_id"], values))
    if not requests:
        raise InputError(f"{path}: no prompts")
    return requests


def capture_gguf(path: PathLike, requests: Requests, out: PathLike, *, resume: bool = False,
                 with_token_ids: bool = False, scores: PathLike | None = None, model_name: str = "",
                 progress: Progress | None = None, **options: Any) -> int:
    """Run a GGUF model in llama.cpp on each request and write its routing; return how many requests were run now.

    As `capture_routing` for a Hugging Face model; `options` are those of `Settings`, with a batch size of 1.

    Raises:
        MissingDependencyError: llama-cpp-python is not installed.
        InputError: not a MoE model, llama.cpp cannot run it, or as `capture_routing`.
    """
    settings = Settings(**options)
    context, vocabulary = check_context(path, requests, settings.max_new_tokens)
    check_requests(requests, vocabulary)
    with LlamaGeneration(path, settings, context=context, with_scores=scores is not None) as source:
        run = CaptureRun(source, requests, progress)
        return run.to_files(out, scores, with_token_ids, resume, model_name or source.spec.name, {})


def capture_command(model_path: PathLike, prompts_jsonl: PathLike, out: PathLike, *, resume: bool = False,
                    with_token_ids: bool = False, scores: PathLike | None = None, device: str | None = None,
                    progress: Progress | None = None, **options: Any) -> RoutingTrace:
    """Load a model from a local folder or a GGUF file, capture its routing on the prompts, and return the trace.

    Of a folder only safetensors weights of model classes that transformers itself has: nothing is downloaded,
    unpickled or run from the folder. `options` are those of `Settings`.

    Raises:
        InputError: not a model, prompts that cannot be read, or as `capture_routing`.
        MissingDependencyError: torch, transformers or llama-cpp-python is not installed.
    """
    requests, path = read_prompts(prompts_jsonl), Path(model_path)
    name = gguf_name(path) if path.suffix == ".gguf" else path.resolve().name
    facts = run_settings(requests, Settings(**options), scores is not None)
    if not (resume and _is_complete(out, name, facts)):
        common: dict[str, Any] = {"resume": resume, "with_token_ids": with_token_ids, "scores": scores,
                                  "model_name": name, "progress": progress, **options}
        if path.suffix == ".gguf":
            capture_gguf(path, requests, out, **common)
        else:
            capture_routing(load_model(path, device), requests, out, **common)
    trace = read_trace(out)
    if scores is not None:  # a run may have been stopped between the end of the trace and that of the scores
        finish_scores(scores, trace.layer_ids.tolist(), set(trace.requests().tolist()),
                      trace_digest=trace.digest(), model=trace.model, metadata=facts)
    return trace


def load_model(folder: Path, device: str | None = None) -> Any:
    """Return the causal language model in a local folder, in eval mode.

    Raises:
        InputError: no such folder, no config.json, or weights that transformers cannot load safely.
    """
    require("torch", "torch", "capturing routing")
    require("transformers", "hf", "capturing routing")
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: expected a local model folder with a config.json")
    import torch
    from transformers import AutoModelForCausalLM

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype="auto")
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder}: transformers cannot load it: {str(error).splitlines()[0]}") from None
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("grouped_mm")  # the same experts, several times faster than the eager loop
    return model.to(device).eval()


def _is_complete(out: PathLike, name: str, settings: dict[str, Any]) -> bool:
    """Return whether `out` already is the finished result of this very run."""
    path = Path(out)
    if not path.is_file() or path.with_name(path.name + PART_FOLDER_SUFFIX).exists():
        return False
    with open_trace(path) as (_, header, _):
        return header.model == name and settings.items() <= header.metadata.items()
