"""Capture from llama.cpp: a GGUF model's routing, through the evaluation callback of llama-cpp-python.

llama.cpp names the tensors of a MoE layer in its graph: ``ffn_moe_topk-N`` int32[k, token] the experts that layer N
chose, ``ffn_moe_weights*-N`` float32[1, k, token] their weights as they are made (the last of that shape is
what is used), ``ffn_moe_logits-N`` float32[expert, token]. The callback is asked for each tensor
before it is computed, and shown it afterwards; nothing is recomputed. The last layer computes only
tokens whose logits are asked for, so they are asked for all.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from moesim.errors import InputError, require
from moesim.model.gguf import read_gguf
from moesim.model.gguf_spec import read_gguf_model
from moesim.traces.capture_generate import Request, RequestRun, Settings
from moesim.traces.capture_hooks import PassRouting

_TOP_K, _WEIGHTS, _SCORES = "ffn_moe_topk", "ffn_moe_weights", "ffn_moe_logits"
_CHUNK = 512  # tokens of a prompt per call
Tensors = dict[int, list[np.ndarray]]


class _TensorHead(ctypes.Structure):
    """The first fields of ``struct ggml_tensor`` (ggml.h), which hold what reading one needs."""

    _fields_ = [("type", ctypes.c_int), ("buffer", ctypes.c_void_p), ("ne", ctypes.c_int64 * 4),
                ("nb", ctypes.c_size_t * 4)]


class CallbackRecorder:
    """What the callback has seen of one pass: ids, weights and scores of each MoE layer.

    Args:
        layers: the layers that have experts. with_scores: also keep the router's logits.
        read: (tensor pointer) -> (name, read) where ``read(dtype)`` gives the tensor as an array, its
            slowest axis first.
    """

    def __init__(self, layers: Sequence[int], read: Callable[[int], tuple[str, Callable[[Any], np.ndarray]]], *,
                 with_scores: bool) -> None:
        self.layer_ids = list(layers)
        self._read, self._with_scores = read, with_scores
        self._seen: dict[str, Tensors] = {_TOP_K: {}, _WEIGHTS: {}, _SCORES: {}}
        self.failure: Exception | None = None

    def __call__(self, tensor: int, ask: bool, _: Any) -> bool:
        """Say whether a tensor is wanted (`ask`), or take it; False ends the pass (an error is kept)."""
        try:
            name, read = self._read(tensor)
            kind, _dash, layer = name.rpartition("-")
            wanted = self._wanted(kind) if layer.isdigit() else ""
            if ask or not wanted:
                return bool(wanted) if ask else True
            self._keep(wanted, int(layer), read(np.int32 if wanted == _TOP_K else np.float32))
        except Exception as error:  # an exception must not cross into C
            self.failure = error
            return False
        return True

    def _wanted(self, kind: str) -> str:
        if kind == _TOP_K or (kind == _SCORES and self._with_scores):
            return kind
        return _WEIGHTS if kind.startswith(_WEIGHTS) else ""

    def _keep(self, kind: str, layer: int, values: np.ndarray) -> None:
        """Keep [token, k or expert]; a later tensor of weights replaces an earlier one of the same pass."""
        ids = self._seen[_TOP_K].get(layer, [])
        if kind != _WEIGHTS:
            self._seen[kind].setdefault(layer, []).append(values.reshape(-1, values.shape[-1]))
        elif ids and values.size == ids[-1].size:  # not the sum over a token's experts
            parts = self._seen[kind].setdefault(layer, [])
            del parts[len(ids) - 1:]
            parts.append(values.reshape(ids[-1].shape))

    def take(self, num_tokens: int) -> PassRouting:
        """Return the routing of the pass of `num_tokens` tokens, and forget it.

        Raises:
            InputError: a MoE layer of which not every token was seen, or what went wrong in the callback.
        """
        seen, self._seen = self._seen, {name: {} for name in self._seen}
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise InputError(f"the routing could not be read: {failure}")
        ids = self._stacked(seen[_TOP_K], num_tokens, "ffn_moe_topk")
        weights = self._stacked(seen[_WEIGHTS], num_tokens, _WEIGHTS) if seen[_WEIGHTS] else None
        scores = self._stacked(seen[_SCORES], num_tokens, _SCORES) if self._with_scores else None
        return PassRouting(ids, weights, scores)

    def _stacked(self, parts: Tensors, num_tokens: int, name: str) -> np.ndarray:
        layers = []
        for layer in self.layer_ids:
            joined = np.concatenate(parts[layer]) if layer in parts else np.empty((0, 1))
            if len(joined) != num_tokens:
                raise InputError(f"llama.cpp computed {name}-{layer} for {len(joined)} of {num_tokens} tokens")
            layers.append(joined)
        return np.stack(layers, axis=1)


class LlamaGeneration:
    """A GGUF model that llama.cpp runs while its routing is recorded; a context manager that frees it.

    Args:
        path: the GGUF file (the first of a split one). context: tokens that the longest request needs.

    Raises:
        MissingDependencyError: llama-cpp-python is not installed.
        InputError: not a MoE model, or llama.cpp cannot load it.
    """

    origin = "llama.cpp's evaluation callback"

    def __init__(self, path: str | os.PathLike[str], settings: Settings, *, context: int,
                 with_scores: bool = False) -> None:
        require("llama_cpp", "llama", "capturing from a GGUF model")
        import llama_cpp

        if settings.batch_size != 1:
            raise InputError("batch_size: llama.cpp runs requests one at a time here; leave it at 1")
        self.settings, self.lib, self.path = settings, llama_cpp, os.fspath(path)
        stored = read_gguf_model(path)
        self.num_experts, self.spec = stored.spec.num_experts, stored.spec
        self.layer_ids = list(stored.spec.moe_layers)
        self.recorder = CallbackRecorder(self.layer_ids, _tensor_reader(llama_cpp), with_scores=with_scores)
        # ctypes objects must live as long as llama.cpp may call them
        self._log = llama_cpp.llama_log_callback(lambda level, text, data: None)
        self._callback = llama_cpp.ggml_backend_sched_eval_callback(self.recorder)
        self._model: Any = None
        self._context: Any = None
        try:
            self._load(context)
        except BaseException:
            self.close()
            raise

    def _load(self, context: int) -> None:
        lib = self.lib
        lib.llama_log_set(self._log, None)
        lib.llama_backend_init()
        self._model = lib.llama_model_load_from_file(self.path.encode(), lib.llama_model_default_params())
        if not self._model:
            raise InputError(f"{self.path}: llama.cpp cannot load it")
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = context, _CHUNK, _CHUNK
        params.cb_eval = self._callback
        self._context = lib.llama_init_from_model(self._model, params)
        if not self._context:
            raise InputError(f"{self.path}: llama.cpp cannot make a context of {context} tokens")
        self._vocabulary = lib.llama_model_get_vocab(self._model)
        self.num_tokens = int(lib.llama_vocab_n_tokens(self._vocabulary))

    def close(self) -> None:
        """Free the model."""
        if self._context:
            self.lib.llama_free(self._context)
        if self._model:
            self.lib.llama_model_free(self._model)
        self._model = self._context = None

    def __enter__(self) -> LlamaGeneration:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def sizes(self) -> dict[str, int]:
        """Return the model's sizes, for a trace's metadata."""
        return {"hidden_size": self.spec.hidden_size, "moe_intermediate_size": self.spec.expert_intermediate_size,
                "num_hidden_layers": self.spec.num_layers, "vocab_size": self.spec.vocab_size,
                "num_experts": self.num_experts, "num_experts_per_tok": self.spec.top_k}

    def routing_of(self, tokens: Sequence[int]) -> PassRouting:
        """Return the routing of one pass over a few tokens."""
        self._forget()
        self._decode(tokens, 0)
        return self.recorder.take(len(tokens))

    def run(self, requests: Sequence[Request]) -> list[RequestRun]:
        """Run the requests of a batch (one); return them with their routing."""
        return [self._run(request) for request in requests]

    def _run(self, request: Request) -> RequestRun:
        run = RequestRun(request, self.settings)
        generator = np.random.default_rng([self.settings.seed, run.request_id])
        self._forget()
        for start in range(0, run.prompt_tokens, _CHUNK):
            logits = self._feed(run, run.fed[start:start + _CHUNK], start)
        for _ in range(self.settings.max_new_tokens - 1):
            token = draw(logits, self.settings.temperature, generator)
            if self.settings.stop_at_eos and self.lib.llama_vocab_is_eog(self._vocabulary, token):
                break
            run.fed.append(token)
            logits = self._feed(run, [token], len(run.fed) - 1)
        return run

    def _feed(self, run: RequestRun, tokens: Sequence[int], start: int) -> np.ndarray:
        logits = self._decode(tokens, start)
        run.passes.append(self.recorder.take(len(tokens)))
        return logits

    def _forget(self) -> None:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self._context), True)

    def _decode(self, tokens: Sequence[int], start: int) -> np.ndarray:
        """Feed tokens from position `start`; return float32[vocabulary], the logits after the last."""
        lib, count = self.lib, len(tokens)
        batch = lib.llama_batch_init(count, 0, 1)
        try:
            batch.n_tokens = count
            for place, token in enumerate(tokens):
                batch.token[place], batch.pos[place] = int(token), start + place
                batch.n_seq_id[place], batch.seq_id[place][0], batch.logits[place] = 1, 0, 1
            status = lib.llama_decode(self._context, batch)
            if status != 0:
                self.recorder.take(count)  # says what went wrong in the callback
                raise InputError(f"{self.path}: llama.cpp ended a pass of {count} tokens with status {status}")
            row = lib.llama_get_logits_ith(self._context, count - 1)
            return np.ctypeslib.as_array(row, shape=(self.num_tokens,)).copy()
        finally:
            lib.llama_batch_free(batch)


def draw(logits: np.ndarray, temperature: float, generator: np.random.Generator) -> int:
    """Return a token of float[vocabulary] at a temperature; 0 is the largest."""
    if temperature == 0:
        return int(logits.argmax())
    scaled = (logits.astype(np.float64) - float(logits.max())) / temperature
    shares = np.cumsum(np.exp(scaled))
    return int(np.searchsorted(shares, generator.random() * shares[-1], side="right"))


def _tensor_reader(llama_cpp: Any) -> Callable[[int], tuple[str, Callable[[Any], np.ndarray]]]:
    """Return what reads a ``ggml_tensor *``, from wherever the backend keeps it (a view's rows have gaps)."""
    from pathlib import Path

    from llama_cpp._ctypes_extensions import load_shared_library

    base = load_shared_library("ggml-base", Path(llama_cpp.__file__).parent / "lib")
    base.ggml_get_name.argtypes, base.ggml_get_name.restype = [ctypes.c_void_p], ctypes.c_char_p
    base.ggml_backend_tensor_get.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
    base.ggml_backend_tensor_get.restype = None

    def read(tensor: int) -> tuple[str, Callable[[Any], np.ndarray]]:
        def values(dtype: Any) -> np.ndarray:
            head = _TensorHead.from_address(tensor)
            sizes, strides = list(head.ne), list(head.nb)
            data = np.empty(view_bytes(sizes, strides, np.dtype(dtype).itemsize), np.uint8)
            base.ggml_backend_tensor_get(tensor, data.ctypes.data, 0, len(data))
            return strided(data, sizes, strides, dtype)
        return base.ggml_get_name(tensor).decode("utf-8", errors="replace"), values

    return read


def view_bytes(sizes: Sequence[int], strides: Sequence[int], item: int) -> int:
    """Return the bytes from the first to the last element of a view."""
    return sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True)) + item


def strided(data: np.ndarray, sizes: Sequence[int], strides: Sequence[int], dtype: Any) -> np.ndarray:
    """Return a view's elements, the slowest axis first; axes of size 1 at the slow end are dropped."""
    shape, steps = tuple(reversed(sizes)), tuple(reversed(strides))
    whole = np.ndarray(shape, dtype, data.tobytes(), strides=steps)
    kept = next((axis for axis, size in enumerate(shape[:-2]) if size > 1), len(shape) - 2)
    return np.array(whole.reshape(whole.shape[kept:]))


def check_context(path: str | os.PathLike[str], requests: Sequence[Request], max_new_tokens: int) -> tuple[int, int]:
    """Return (tokens that the longest request needs, size of the vocabulary of the file)."""
    needed = max((len(tokens) for _, tokens in requests), default=1) + max_new_tokens
    table = read_gguf(path).tensors.get("token_embd.weight")
    if table is None or len(table.shape) != 2:
        raise InputError(f"{path}: tensor 'token_embd.weight' of [inputs, outputs] is missing")
    return needed, table.shape[1]
