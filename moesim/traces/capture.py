"""Capture: the routing of a real Hugging Face model, by hooks on its expert modules.

In transformers 5 every MoE block calls ``experts(hidden [T, D], top_k_index [T, k], top_k_weights
[T, k])``, whatever its router does (group limits, score corrections, shared experts), so a pre-hook on
modules named ``*.experts`` sees what the router really chose. Nothing is recomputed from logits.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from moesim.artifacts import read_bytes
from moesim.errors import InputError, require
from moesim.traces.store import PART_FOLDER_SUFFIX, open_trace, read_trace
from moesim.traces.trace import DECODE, PREFILL, RoutingTrace
from moesim.traces.writer import TraceWriter

Requests = Sequence[tuple[int, Sequence[int]]]
Progress = Callable[[int, int], None]
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_SIZES = ("hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
          "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size", "num_experts_per_tok",
          *_EXPERT_COUNTS)


class RouterRecorder:
    """What the expert modules of one model were called with in the last forward pass.

    Attributes:
        layer_ids: the model's own index of each MoE layer, from the module names.
        num_experts: experts per layer.
    """

    def __init__(self, model: Any) -> None:
        modules = [(name, module) for name, module in model.named_modules() if name.endswith(".experts")]
        if not modules:
            raise InputError("the model has no module named '*.experts': it is not a Mixture-of-Experts "
                             "model that transformers 5 routes through one experts module per layer")
        self.modules = modules
        self.layer_ids = [_layer_id(name) for name, _ in modules]
        self.num_experts = _num_experts(model, modules[0][1])
        self._calls: dict[int, tuple[Any, Any]] = {}

    @contextmanager
    def attached(self) -> Iterator[RouterRecorder]:
        """Attach the hooks; always take them off again."""
        handles = []
        try:
            for layer, (name, module) in enumerate(self.modules):
                handles.append(module.register_forward_pre_hook(self._hook(layer, name), with_kwargs=True))
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, layer: int, name: str) -> Callable[..., None]:
        def record(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tensors = [value for value in (*args, *kwargs.values()) if hasattr(value, "is_floating_point")]
            ids = next((t for t in tensors if t.ndim == 2 and not t.is_floating_point()), None)
            if ids is None or layer in self._calls:
                raise InputError(f"module {name!r} is not called once per pass as experts(hidden, "
                                 f"top_k_index, top_k_weights); its routing cannot be captured")
            like = [t for t in tensors if t.shape == ids.shape and t.is_floating_point()]
            # clones: an implementation may reuse these buffers
            self._calls[layer] = (ids.detach().clone(), like[-1].detach().clone() if like else None)
        return record

    def take(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Return (int64[token, layer, k], float32[token, layer, k] or None) of the last pass; forget it."""
        import torch

        calls, self._calls = self._calls, {}
        for layer, (name, _) in enumerate(self.modules):
            if layer not in calls:
                raise InputError(f"module {name!r} was not called in the forward pass; "
                                 f"its routing cannot be captured")
        ids = torch.stack([calls[layer][0] for layer in range(len(calls))], dim=1).cpu().numpy()
        if any(weights is None for _, weights in calls.values()):
            return ids, None
        weights = torch.stack([calls[layer][1].float() for layer in range(len(calls))], dim=1)
        return ids, weights.cpu().numpy()


def _layer_id(name: str) -> int:
    """Return the last number in a module name: ``model.layers.3.mlp.experts`` -> 3."""
    numbers = [part for part in name.split(".") if part.isdigit()]
    if not numbers:
        raise InputError(f"module {name!r} has no layer number in its name")
    return int(numbers[-1])


def _num_experts(model: Any, experts: Any) -> int:
    owners = (experts, model.config.get_text_config())
    found = [getattr(owner, name) for owner in owners for name in _EXPERT_COUNTS if hasattr(owner, name)]
    if not found:
        raise InputError(f"neither the experts nor the config have one of {', '.join(_EXPERT_COUNTS)}")
    return int(found[0])


def capture_routing(model: Any, requests: Requests, out: TraceWriter | str | os.PathLike[str], *,
                    max_new_tokens: int, seed: int, temperature: float = 1.0, stop_at_eos: bool = True,
                    with_token_ids: bool = False, resume: bool = False, model_name: str = "",
                    metadata: dict[str, Any] | None = None, progress: Progress | None = None) -> int:
    """Run `model` on each request and write its routing; return how many requests were run now.

    A request's prompt is one prefill pass, then each new token one decode pass with the KV cache. Of
    `max_new_tokens` tokens the last is not fed back, so a request has at most ``max_new_tokens - 1``
    decode rows. Requests run one at a time: no padding, and the model's numbers are those it gives
    alone. The model's outputs do not change; it runs in eval mode and gets its mode back.

    Args:
        requests: (request_id, token ids of the prompt).
        out: an open TraceWriter (which stays open), or a path to write.
        seed, temperature: each request samples with its own generator from (seed, request_id), so a
            resumed run equals an uninterrupted one; temperature 0 is greedy.
        stop_at_eos: end a request at the config's end-of-sequence token.
        resume: with a path, go on after an interrupted run; written requests are skipped.
        progress: called as (requests done, requests in all).

    Raises:
        InputError: not an MoE model, a bad prompt, or a run that cannot be resumed with these settings.
    """
    require("torch", "torch", "capturing routing")
    import torch

    _check_settings(model, requests, max_new_tokens, temperature)
    settings = run_settings(requests, max_new_tokens, seed, temperature, stop_at_eos)
    was_training = model.training
    recorder = RouterRecorder(model)
    model.eval()
    try:
        with torch.inference_mode(), recorder.attached():
            sampler = _Generation(model, recorder, seed, temperature, max_new_tokens, stop_at_eos)
            if isinstance(out, TraceWriter):
                return _write_all(sampler, requests, out, progress)
            with _open(sampler, requests[0], out, with_token_ids, resume, model_name,
                       {**(metadata or {}), **settings, "config": _config_sizes(model)}) as writer:
                return _write_all(sampler, requests, writer, progress)
    finally:
        model.train(was_training)


def _check_settings(model: Any, requests: Requests, max_new_tokens: int, temperature: float) -> None:
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if not 0 <= temperature < float("inf"):
        raise InputError(f"temperature must be finite and not negative, got {temperature}")
    if not requests:
        raise InputError("no requests to capture")
    vocabulary = int(model.config.get_text_config().vocab_size)
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


def run_settings(requests: Requests, max_new_tokens: int, seed: int, temperature: float,
                 stop_at_eos: bool) -> dict[str, Any]:
    """Return what decides a run's result besides the model; the prompts only as a digest."""
    prompts = json.dumps([[int(request), *map(int, tokens)] for request, tokens in requests])
    return {"seed": seed, "temperature": temperature, "max_new_tokens": max_new_tokens,
            "stop_at_eos": stop_at_eos, "num_requests": len(requests),
            "prompts_digest": f"sha256:{hashlib.sha256(prompts.encode()).hexdigest()}"}


def _config_sizes(model: Any) -> dict[str, int]:
    config = model.config.get_text_config()
    return {name: value for name in _SIZES if isinstance(value := getattr(config, name, None), int)}


def _open(sampler: _Generation, probe: tuple[int, Sequence[int]], path: str | os.PathLike[str],
          with_token_ids: bool, resume: bool, model_name: str, metadata: dict[str, Any]) -> TraceWriter:
    """Return a writer for what the model routes, found by one pass over one token."""
    recorder = sampler.recorder
    ids, weights = sampler.routing_of(list(probe[1])[:1])
    name = model_name or type(sampler.model).__name__
    return TraceWriter(
        path, num_layers=len(recorder.layer_ids), top_k=ids.shape[2], num_experts=recorder.num_experts,
        layer_ids=recorder.layer_ids, model=name, metadata=metadata,
        source=f"captured from {name} by hooks on its expert modules",
        with_weights=weights is not None, with_token_ids=with_token_ids, resume=resume)


def _write_all(sampler: _Generation, requests: Requests, writer: TraceWriter,
               progress: Progress | None) -> int:
    done = writer.requests_done()
    todo = [request for request in requests if request[0] not in done]
    for number, (request_id, tokens) in enumerate(todo, start=1):
        writer.append(sampler.request_trace(request_id, tokens, writer))
        if progress is not None:
            progress(len(requests) - len(todo) + number, len(requests))
    return len(todo)


class _Generation:
    """A model that generates while its routing is recorded."""

    def __init__(self, model: Any, recorder: RouterRecorder, seed: int, temperature: float,
                 max_new_tokens: int, stop_at_eos: bool) -> None:
        self.model, self.recorder = model, recorder
        self.seed, self.temperature, self.max_new_tokens = seed, temperature, max_new_tokens
        eos = getattr(model.config.get_text_config(), "eos_token_id", None) if stop_at_eos else None
        self.eos = set(eos) if isinstance(eos, list | tuple) else {eos} - {None}
        # only the last position's logits are needed; a long prompt's would fill the memory
        last_only = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.options = {"logits_to_keep": 1} if last_only else {}

    def forward(self, tokens: Sequence[int], cache: Any) -> tuple[Any, Any]:
        """Return (logits of the last position, KV cache) after feeding `tokens`."""
        import torch

        ids = torch.tensor([list(tokens)], device=self.model.device)
        output = self.model(input_ids=ids, past_key_values=cache, use_cache=True, **self.options)
        return output.logits[0, -1], output.past_key_values

    def routing_of(self, tokens: Sequence[int]) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the routing of one pass without a cache."""
        self.forward(tokens, None)
        return self.recorder.take()

    def sample(self, logits: Any, generator: Any) -> int:
        """Return the next token, drawn on the CPU in float32 so that the device does not matter."""
        import torch

        logits = logits.float().cpu()
        if self.temperature == 0:
            return int(logits.argmax())
        shares = torch.softmax(logits / self.temperature, dim=-1)
        return int(torch.multinomial(shares, 1, generator=generator))

    def request_trace(self, request_id: int, tokens: Sequence[int], writer: TraceWriter) -> RoutingTrace:
        """Return the trace of one request: its prompt, then its new tokens."""
        import torch

        state = np.random.SeedSequence([self.seed, request_id]).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(state) >> 1)
        fed = [int(token) for token in tokens]
        logits, cache = self.forward(fed, None)
        passes = [self.recorder.take()]
        for _ in range(self.max_new_tokens - 1):
            token = self.sample(logits, generator)
            if token in self.eos:
                break
            fed.append(token)
            logits, cache = self.forward([token], cache)
            passes.append(self.recorder.take())
        return self._assemble(request_id, fed, len(tokens), passes, writer)

    def _assemble(self, request_id: int, fed: list[int], prompt: int,
                  passes: list[tuple[np.ndarray, np.ndarray | None]], writer: TraceWriter) -> RoutingTrace:
        head, position = writer.header, np.arange(len(fed))
        weights = [part for _, part in passes if part is not None]
        return RoutingTrace(
            expert_ids=np.concatenate([ids for ids, _ in passes]),
            gate_weights=np.concatenate(weights) if head.with_weights else None,
            request_id=np.full(len(fed), request_id), position=position,
            phase=np.where(position < prompt, PREFILL, DECODE),
            step=writer.next_step + np.maximum(position - prompt + 1, 0),
            num_experts=head.num_experts, layer_ids=np.array(head.layer_ids),
            token_id=np.array(fed) if head.with_token_ids else None)


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


def capture_command(model_path: str | os.PathLike[str], prompts_jsonl: str | os.PathLike[str],
                    out: str | os.PathLike[str], *, max_new_tokens: int, seed: int, temperature: float = 1.0,
                    resume: bool = False, with_token_ids: bool = False, device: str | None = None,
                    progress: Progress | None = None) -> RoutingTrace:
    """Load a model from a local folder, capture its routing on the prompts, and return the trace.

    Only safetensors weights of model classes that transformers itself has: nothing is downloaded,
    unpickled or run from the folder.

    Raises:
        InputError: not a model folder, prompts that cannot be read, or as `capture_routing`.
        MissingDependencyError: torch or transformers is not installed.
    """
    requests = read_prompts(prompts_jsonl)
    folder = Path(model_path)
    model = load_model(folder, device)
    name = folder.resolve().name
    if resume and _is_complete(out, name, run_settings(requests, max_new_tokens, seed, temperature, True)):
        return read_trace(out)
    capture_routing(model, requests, out, max_new_tokens=max_new_tokens, seed=seed, temperature=temperature,
                    with_token_ids=with_token_ids, resume=resume, model_name=name, progress=progress)
    return read_trace(out)


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


def _is_complete(out: str | os.PathLike[str], name: str, settings: dict[str, Any]) -> bool:
    """Return whether `out` already is the finished result of this very run."""
    path = Path(out)
    if not path.is_file() or path.with_name(path.name + PART_FOLDER_SUFFIX).exists():
        return False
    with open_trace(path) as (_, header, _):
        return header.model == name and settings.items() <= header.metadata.items()
