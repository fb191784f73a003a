"""llama-bench (llama.cpp) -o json or jsonl: end-to-end times of a whole model; no kernels are in it.

What follows from it: the seconds of a prompt of so many tokens, and of generating so many tokens one after another,
each after a context of `n_depth`, with the settings of that test. What does not: times of experts, attention, router
or copies (a test runs whole layers), so none is made, and the simulator reads none of these tables. They are for
`moesim calibrate compare`, and to hold a simulated time against.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moesim.calibrate.imports.base import Findings, Importer, TableKey, brief, number, parse_json, read_text, slug
from moesim.errors import InputError
from moesim.units import NS_PER_S

KERNELS = "kernel times: llama-bench times whole models, so experts, attention and copies cannot be told apart"
_BOTH = "test of a prompt and generation together (-pg): the two cannot be told apart"
_NEITHER = "test of no tokens"
_SETTINGS = {"n_gpu_layers": "ngl", "n_cpu_moe": "ncmoe", "n_threads": "t", "n_batch": "b", "n_ubatch": "ub",
             "type_k": "k", "type_v": "v", "tensor_buft_overrides": "ot", "flash_attn": "fa"}
_FACTS = ("build_commit", "build_number", "cpu_info", "gpu_info", "backends", "model_filename", "model_type", "model_size",
          "model_n_params")


def read_llama_bench(names: Sequence[str]) -> Findings:
    """Read tests into tables ``prompt`` and ``generation`` over (tokens, context), one per model and settings.

    Raises:
        InputError: not llama-bench's JSON, or a test that lacks its times.
    """
    found = Findings("llama-bench")
    for name in names:
        path = Path(name)
        for where, test in _tests(path):
            _add(found, test, where)
        found.files.append(path)
    found.notes.append(f"not made: {KERNELS}")
    return found


def _tests(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, test) of a JSON array, or of one object per line."""
    text = read_text(path)
    if text.lstrip().startswith("["):
        entries = [(f"{path}[{place}]", entry) for place, entry in enumerate(parse_json(text, str(path)))]
    else:
        entries = [(f"{path}:{place}", parse_json(line, f"{path}:{place}"))
                   for place, line in enumerate(text.splitlines(), start=1) if line.strip()]
    for where, entry in entries:
        if not isinstance(entry, dict) or "n_prompt" not in entry or "n_gen" not in entry:
            raise InputError(f"{where}: expected a test of llama-bench -o json (with n_prompt, n_gen, samples_ns), "
                             f"got {brief(entry)}")
        yield where, entry
    if not entries:
        raise InputError(f"{path}: no tests; expected llama-bench -o json or -o jsonl")


def _add(found: Findings, test: dict[str, Any], where: str) -> None:
    prompt, generated = (_count(test, key, where) for key in ("n_prompt", "n_gen"))
    depth = _count(test, "n_depth", where, 0)
    if (prompt > 0) == (generated > 0):
        found.left_out[_BOTH if prompt else _NEITHER] += 1
        return
    op, tokens = ("prompt", prompt) if prompt else ("generation", generated)
    for fact in _FACTS:
        if isinstance(test.get(fact), (str, int)):
            found.facts.setdefault(fact, test[fact])
    found.date = found.date or str(test.get("test_time", ""))[:40]
    key = TableKey(op, slug(test.get("backends", "unknown")).lower(), _shape(test), "", ("tokens", "context"))
    for nanoseconds in _samples(test, where):
        found.add(key, (tokens, depth), nanoseconds / NS_PER_S, where)


def _count(test: dict[str, Any], key: str, where: str, default: float | None = None) -> int:
    value = number(test, key, where, default)
    if value < 0 or value != int(value):
        raise InputError(f"{where}: {key!r} must be a whole number from 0, got {brief(test[key])}")
    return int(value)


def _samples(test: dict[str, Any], where: str) -> list[float]:
    """Return the nanoseconds of every repetition; of their mean where the repetitions are not there."""
    samples = test.get("samples_ns")
    if samples is None:
        return [number(test, "avg_ns", where)]
    if not isinstance(samples, list) or not samples:
        raise InputError(f"{where}: 'samples_ns' must be a list of nanoseconds, got {brief(samples)}")
    return [number({"samples_ns": sample}, "samples_ns", where) for sample in samples]


def _shape(test: dict[str, Any]) -> str:
    """Return the model and the settings that change its time, as one name."""
    settings = [f"{short}{slug(test[key])}" for key, short in _SETTINGS.items() if test.get(key) not in (None, "", "none")]
    return ".".join([slug(test.get("model_type", "unknown")), *settings])


LLAMA_BENCH = {"llama-bench": Importer(read_llama_bench, "llama-bench -o json or jsonl: whole models, end to end")}
