"""Measurements that others made: what is read, exactly, and what is refused with its reason."""

from __future__ import annotations

import gzip
import json
import math
import shutil
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import call, call_json
from hypothesis import given
from hypothesis import strategies as st
from measurement_files import (
    GPU,
    KINETO_EVENTS,
    LLAMA_TESTS,
    MOE_ROWS,
    NVBANDWIDTH_JSON,
    NVBANDWIDTH_TEXT,
    TABLES,
    event,
    kineto_document,
    moe_row,
    write_files,
    write_gpu,
)
from typer.testing import CliRunner

from moesim.calibrate.imports import SOURCES, import_profile
from moesim.calibrate.imports.aic_moe import balanced_counts, balanced_size
from moesim.calibrate.imports.base import work_dtype
from moesim.cli import app
from moesim.errors import InputError
from moesim.hardware.cost import CostModel
from moesim.hardware.load import load_hardware
from moesim.hardware.profile import CalibrationProfile, MeasuredTable, read_profile
from moesim.lowering.work import attention_work, compute_dtype, experts_work
from moesim.model.catalog import load_model
from moesim.model.spec import AttentionSpec, ModelSpec

HARDWARE = load_hardware("h100-sxm")
GPU0 = "node0.gpu0"


def tiny_model(**changes: Any) -> ModelSpec:
    """Return the model of the hand-written tables: top-2 of 8 experts of 64 x 96, four heads."""
    return ModelSpec("tiny", 2, (0, 1), 8, 2, 64, 96, AttentionSpec(4, 2, 16), 32).replace(**changes)


def table(profile: CalibrationProfile, op: str, device: str | None = None) -> MeasuredTable:
    """Return the one table of an operation (on a device)."""
    (found,) = [one for one in profile.tables if one.op == op and device in (None, one.device)]
    return found


def seconds(one: MeasuredTable) -> dict[tuple[float, ...], float]:
    """Return seconds by size."""
    return dict(zip(one.sizes, one.seconds, strict=True))


def approx(values: dict[tuple[float, ...], float]) -> Any:
    """Return seconds by size, to be compared up to rounding."""
    return pytest.approx(values, rel=1e-12)


# ---------------------------------------------------------------- aiconfigurator: who gets which token


@given(st.integers(1, 70), st.integers(1, 40), st.data())
def test_the_balanced_rule_token_by_token(tokens: int, num_experts: int, data: st.DataObject) -> None:
    """Counts equal a loop over tokens and choices in floating point, as the collector writes it."""
    top_k = data.draw(st.integers(1, num_experts))
    stride, counts, twice = math.ceil(num_experts / top_k), Counter[int](), False
    for token in range(tokens):
        start = token if tokens >= stride else token * stride / tokens
        chosen = [int((start + choice * stride) % num_experts) for choice in range(top_k)]
        twice |= len(set(chosen)) < top_k
        counts.update(chosen)
    found = balanced_counts(tokens, num_experts, top_k)
    if twice:
        assert found is None
    else:
        assert found is not None
        assert found.tolist() == [counts[expert] for expert in range(num_experts)]
        assert found.sum() == tokens * top_k


@pytest.mark.parametrize(("tokens", "ep", "expected"), [
    (1, 1, (2, 2, 1)),  # experts 0 and 4
    (2, 1, (4, 4, 1)),  # 0, 4 and 2, 6
    (8, 1, (16, 8, 2)),
    (8, 2, (8, 4, 2)),  # experts 0 ... 3 of them
    (1, 4, (1, 1, 1)),  # experts 0 and 1: expert 0 only
    (2, 3, None)])  # eight experts do not divide over three ranks
def test_balanced_sizes_golden(tokens: int, ep: int, expected: tuple[int, int, int] | None) -> None:
    """Rows, experts with any, and the most of one, of top-2 of 8 experts, worked out by hand."""
    assert balanced_size(tokens, 8, 2, ep) == expected


# ---------------------------------------------------------------- aiconfigurator: tables


@pytest.fixture
def gpu(tmp_path: Path) -> Path:
    """The folder of a GPU with hand-written tables."""
    return write_gpu(tmp_path)


def test_experts_golden(gpu: Path) -> None:
    """Milliseconds become seconds at (tokens, groups, largest group); draws that are not in the table are left out."""
    profile = import_profile("aiconfigurator", [gpu], model=tiny_model())
    experts = table(profile, "grouped_ffn")
    assert (experts.device, experts.shape, experts.dtype) == ("gpu", "h64.ff96.m3.w2", "bf16")
    assert seconds(experts) == approx({(2, 2, 1): 1e-5, (4, 4, 1): 2e-5, (16, 8, 2): 4e-5, (32, 8, 4): 5e-5, (8, 4, 2): 2.5e-5})
    assert profile.fingerprint["left_out"]["moe_perf, distribution power_law_1.2: tokens per expert are not in the table"] == 1
    assert profile.fingerprint["device"] == "Test GPU 80GB"
    assert (profile.name, profile.fingerprint["framework"]) == ("tiny testgpu eng 1.0", "eng 1.0")


def test_rows_of_several_ranks_can_be_switched_off(gpu: Path) -> None:
    """`expert_parallel=off` keeps the rows of one rank, and says how many others there were."""
    profile = import_profile("aiconfigurator", [gpu], model=tiny_model(), expert_parallel="off")
    assert (8, 4, 2) not in seconds(table(profile, "grouped_ffn"))
    assert profile.fingerprint["left_out"]["moe_perf, moe_ep_size above 1: switched off"] == 1


def test_the_simulator_finds_what_was_imported(gpu: Path) -> None:
    """The cost of the model's own work is the table's time, and counts as measured."""
    model = tiny_model()
    cost = CostModel(HARDWARE, import_profile("aiconfigurator", [gpu], model=model))
    assert cost.grouped_ffn(GPU0, experts_work(model, 16, 8, 2)) == (pytest.approx(4e-5), "measured")
    assert cost.dense(GPU0, attention_work(model, 4, 4 * 64)).source == "measured"


@pytest.mark.parametrize("activation_bytes", [1.0, 2.0, 4.0, 0.5])
def test_tables_carry_the_dtype_that_the_simulator_asks_for(activation_bytes: float) -> None:
    """One rule in two places, kept equal."""
    model = tiny_model(activation_bytes=activation_bytes)
    assert work_dtype(model) == compute_dtype(model)


def test_attention_is_the_sum_of_its_three_parts(gpu: Path) -> None:
    """Two products at as many rows as the batch, and the kernel; a batch without a product is left out."""
    profile = import_profile("aiconfigurator", [gpu], model=tiny_model())
    attention = table(profile, "attention")
    assert attention.shape == "h64.heads4.kv2.d16.gqa"
    expected = {(batch, batch * context): 1e-3 * (0.002 + batch * context * 1e-5 + 2 * batch * 0.001 + (128 + 64) * 1e-5)
                for batch in (1, 4) for context in (2, 64)}
    assert seconds(attention) == approx(expected)
    assert profile.fingerprint["left_out"]["attention: no product of this batch"] == 2
    gemms = {one.shape: seconds(one) for one in profile.tables if one.op == "gemm"}
    assert gemms["n128.k64"] == approx({(m,): 1e-3 * (m * 0.001 + 0.00128) for m in (1, 2, 4)})


def test_exchanges_golden(gpu: Path) -> None:
    """NCCL's sizes are elements: two bytes of half, one of int8; DeepEP's and engines' times are microseconds."""
    profile = import_profile("aiconfigurator", [gpu], model=tiny_model())
    found = {(one.op, one.device, one.shape, one.dtype): seconds(one) for one in profile.tables}
    assert found["all_to_all", "nccl", "ranks8", "half"] == approx({(512,): 2.56e-3, (2048,): 1.024e-2})
    assert found["all_to_all", "nccl", "ranks8", "int8"] == approx({(256,): 2.56e-3, (1024,): 1.024e-2})
    assert found["dispatch", "deepep_ll", "h64.k2.e8.nodes1", ""] == approx({(1,): 1.1e-5, (8,): 1.8e-5})
    assert found["combine", "deepep_ll", "h64.k2.e8.nodes1", ""] == approx({(1,): 2.1e-5, (8,): 2.8e-5})
    assert found["dispatch", "eng_ll", "h64.k2.e8.ranks4.nodes1.sms0", "fp8"] == approx({(1,): 3.2e-5, (8,): 4.6e-5})


def test_times_that_no_memory_can_reach_are_refused(tmp_path: Path) -> None:
    """8 experts of 604 MB over 1 TB/s take 4.6 ms at least; a row of 3 ms did not read them, so none of the shape is used."""
    shape = {"hidden_size": 8192, "inter_size": 12288}
    model = tiny_model(hidden_size=8192, expert_intermediate_size=12288)
    honest = [moe_row(8, 5.0, **shape), moe_row(16, 5.5, **shape)]
    folder = write_gpu(tmp_path / "a", {"moe/eng/1.0/moe_perf": honest})
    assert len(table(import_profile("aiconfigurator", [folder], model=model), "grouped_ffn").sizes) == 2
    folder = write_gpu(tmp_path / "b", {"moe/eng/1.0/moe_perf": [moe_row(8, 3.0, **shape), honest[1]]})
    with pytest.raises(InputError, match=r"2 x moe_perf, balanced: 0.003 s to read 8 experts of 603979776 bytes, which take the "
                                         r"memory 0.00456 s at least: fewer were read than the table says"):
        import_profile("aiconfigurator", [folder], model=model)


def test_times_of_one_size_are_one_sample_each(tmp_path: Path) -> None:
    """Rows that come to the same size are its runs: their median, and a spread."""
    rows = [moe_row(1, latency, num_experts=2, topk=1) for latency in (0.010, 0.020, 0.040)]
    model = tiny_model(num_experts=2, top_k=1)
    experts = table(import_profile("aiconfigurator", [write_gpu(tmp_path, {"moe/eng/1.0/moe_perf": rows})], model=model),
                    "grouped_ffn")
    assert (experts.sizes, experts.samples) == (((1, 1, 1),), (3,))
    assert (experts.seconds[0], experts.spread[0]) == pytest.approx((2e-5, 0.75))


def test_tensor_parallel_rows_are_those_of_a_narrower_expert(tmp_path: Path) -> None:
    """`moe_tp` 2 takes the rows of two ranks and names the shape by half the width."""
    folder = write_gpu(tmp_path, {"moe/eng/1.0/moe_perf": [*MOE_ROWS, moe_row(8, 0.03, moe_tp_size=2)]})
    profile = import_profile("aiconfigurator", [folder], model=tiny_model(), moe_tp=2)
    experts = table(profile, "grouped_ffn")
    assert (experts.shape, seconds(experts)) == ("h64.ff48.m3.w2", approx({(16, 8, 2): 3e-5}))


@pytest.mark.parametrize(("rows", "options", "message"), [
    ([*MOE_ROWS, moe_row(8, 1.0, moe_dtype="fp8")], {"moe_dtype": "fp9"}, "unknown moe_dtype of this shape 'fp9'. Did you mean 'fp8'"),
    ([moe_row(8, 1.0, moe_dtype="fp8")], {}, "2 bytes per weight fits none of the table's fp8: choose with moe_dtype"),
    ([*MOE_ROWS, moe_row(8, 1.0, kernel_source="other")], {}, r"2 kernels for this shape and dtype \(eng_moe, other\): choose"),
    ([moe_row(8, 1.0, kernel_source="eng_nongated")], {}, "0 kernels for this shape and dtype"),  # the model has gates
    (MOE_ROWS, {"expert_parallel": "all"}, "unknown expert_parallel 'all'"),
    (MOE_ROWS, {"moe_tp": 5}, "moe_tp 5 does not divide the experts' width 96"),
    (MOE_ROWS, {"engine": "emg"}, "engine 'emg' has no MoE table. Did you mean 'eng'"),
    (MOE_ROWS, {"version": "2.0"}, "unknown version of eng '2.0'"),
    (MOE_ROWS, {"kernal": "x"}, "source 'aiconfigurator' has no option 'kernal'. Did you mean 'kernel'"),
    ([moe_row(8, -1.0)], {}, "a time must be positive and finite, got -0.001 s"),
    ([moe_row(8, math.nan)], {}, "column 'latency' must hold numbers, without gaps"),
    ([moe_row(8, 1.0, topk="two")], {}, "column 'topk' must hold numbers"),
    ([{"framework": "x", "num_tokens": 1}], {}, "no column 'hidden_size'")])
def test_what_is_not_sure_must_be_chosen(tmp_path: Path, rows: list[dict[str, Any]], options: dict[str, Any],
                                         message: str) -> None:
    """Several kernels, dtypes or versions are never picked silently; damaged columns are named."""
    with pytest.raises(InputError, match=message):
        import_profile("aiconfigurator", [write_gpu(tmp_path, {"moe/eng/1.0/moe_perf": rows})], model=tiny_model(), **options)


def test_several_engines_and_versions_must_be_chosen(tmp_path: Path) -> None:
    """The message lists what is there."""
    folder = write_gpu(tmp_path, {**TABLES, "moe/eng/1.1/moe_perf": MOE_ROWS, "moe/other/3.0/moe_perf": MOE_ROWS})
    with pytest.raises(InputError, match="tables of eng, other: choose with engine="):
        import_profile("aiconfigurator", [folder], model=tiny_model())
    with pytest.raises(InputError, match=r"MoE tables of eng 1.0, 1.1: choose with version="):
        import_profile("aiconfigurator", [folder], model=tiny_model(), engine="eng")
    assert import_profile("aiconfigurator", [folder], model=tiny_model(), engine="eng", version="1.1")


def test_a_system_file_without_the_memory_s_rate_is_named(tmp_path: Path) -> None:
    """Without the rate nothing can be checked, so nothing is taken."""
    folder = write_gpu(tmp_path, system="gpu: {}\n")
    with pytest.raises(InputError, match=r"testgpu.yaml: expected gpu.mem_bw"):
        import_profile("aiconfigurator", [folder], model=tiny_model())
    (folder.parent.parent / f"{GPU}.yaml").write_text("gpu: [\n\t:")
    with pytest.raises(InputError, match=r"testgpu.yaml: not valid YAML"):
        import_profile("aiconfigurator", [folder], model=tiny_model())
    (folder.parent.parent / f"{GPU}.yaml").unlink()
    with pytest.raises(InputError, match=r"testgpu.yaml: no such file"):
        import_profile("aiconfigurator", [folder], model=tiny_model())


def test_an_installed_package_is_found_without_being_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's name stands for the package's folder; the package's own code does not run."""
    package = tmp_path / "aiconfigurator_core"
    write_gpu(package)
    (package / "__init__.py").write_text("raise RuntimeError('must not run')\n")
    if find_spec("aiconfigurator_core") is None:
        with pytest.raises(InputError, match="aiconfigurator-core is not installed here: pip install aiconfigurator-core"):
            import_profile("aiconfigurator", [GPU], model=tiny_model())
    monkeypatch.syspath_prepend(str(tmp_path))
    profile = import_profile("aiconfigurator", [GPU], model=tiny_model())
    assert table(profile, "grouped_ffn").sizes
    assert "aiconfigurator_core" not in sys.modules
    with pytest.raises(InputError, match=r"unknown GPU of aiconfigurator-core 'testgpv'. Did you mean 'testgpu'"):
        import_profile("aiconfigurator", ["testgpv"], model=tiny_model())


@pytest.mark.engines
@pytest.mark.skipif(find_spec("aiconfigurator_core") is None, reason="aiconfigurator-core is not installed")
def test_the_real_tables() -> None:
    """Of the installed package: Qwen3-30B on an H100 within 10 % where sizes are held out; DeepSeek-V3 by SGLang is refused."""
    profile = import_profile("aiconfigurator", ["h100_sxm"], model="qwen3-30b-a3b", engine="vllm", version="0.24.0")
    experts = table(profile, "grouped_ffn")
    assert len(experts.sizes) > 100
    assert experts.residual is not None
    assert experts.residual < 0.1
    refused = import_profile("aiconfigurator", ["h100_sxm"], model="deepseek-v3", engine="sglang", version="0.5.14")
    assert "grouped_ffn" not in {one.op for one in refused.tables}
    assert any("fewer were read than the table says" in reason for reason in refused.fingerprint["left_out"])


# ---------------------------------------------------------------- torch profiler


def kineto(path: Path, events: list[dict[str, Any]] | None = None, **options: Any) -> CalibrationProfile:
    """Write a trace and import it."""
    path.write_text(json.dumps(kineto_document(events)))
    return import_profile("torch-profiler", [path], **options)


def test_a_trace_golden(tmp_path: Path) -> None:
    """A range's time is how long the GPU was busy with what it launched; inner ranges keep their own kernels."""
    profile = kineto(tmp_path / "t.json")
    experts, router, copies = table(profile, "grouped_ffn"), table(profile, "router"), table(profile, "copy", "dram_to_hbm")
    # kernels 200-230 and 225-240 make 40 us; the one of another thread and the one outside do not count
    assert (experts.device, experts.shape, experts.dtype) == ("gpu", "h64.ff96.m3.w2", "bf16")
    assert seconds(experts) == approx({(16, 4, 7): 4e-5})
    assert (router.shape, seconds(router)) == ("h64.e8", approx({(16,): 1e-5}))
    assert (copies.shape, seconds(copies), copies.samples) == ("pinned", approx({(1e6,): 1.1e-5, (4e6,): 4e-5}), (2, 1))
    assert seconds(table(profile, "copy", "dram_to_hbm_pageable")) == approx({(1e6,): 9e-5, (4e6,): 3.5e-4})
    exchange = table(profile, "all_to_all")
    assert (exchange.device, exchange.shape, seconds(exchange)) == ("nccl", "ranks8", approx({(2048,): 8e-6}))


def test_what_matches_nothing_is_a_share(tmp_path: Path) -> None:
    """Shares of the GPU's time sum to one; copies of one size make no table, with the reason."""
    profile = kineto(tmp_path / "t.json")
    shares = profile.fingerprint["gpu_time_shares"]
    total = 30 + 15 + 10 + 20 + 5 + 8 + 10 + 12 + 40 + 90 + 350 + 10
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["unmatched"] == pytest.approx(20 / total)
    assert (shares["experts"], shares["copies"], shares["collectives"]) == pytest.approx((30 / total, 512 / total, 8 / total))
    assert (shares["attention"], shares["routing"]) == pytest.approx((5 / total, 10 / total))
    assert profile.fingerprint["left_out"] == {"copy hbm_to_dram of one size only: says nothing of other sizes": 1}
    assert profile.fingerprint["gpus"] == ["Test GPU 80GB"]


def test_patterns_of_one_s_own_come_first(tmp_path: Path) -> None:
    """A JSON file of patterns names what the built-in ones do not know; a broken expression is an error."""
    (tmp_path / "p.json").write_text(json.dumps({"mine": ["^my_own"], "moe": ["fused_moe"]}))
    shares = kineto(tmp_path / "t.json", patterns=str(tmp_path / "p.json")).fingerprint["gpu_time_shares"]
    assert "unmatched" not in shares
    assert shares["moe"] / shares["mine"] == pytest.approx(30 / 20)
    for text, message in (('{"a": ["("]}', r"'a': '\(' is not a regular expression"), ("[]", "expected an object"),
                          ('{"a": "b"}', "'a' must be a list of regular expressions")):
        (tmp_path / "p.json").write_text(text)
        with pytest.raises(InputError, match=message):
            kineto(tmp_path / "t.json", patterns=str(tmp_path / "p.json"))


def test_a_trace_may_be_gzip_or_a_bare_list(tmp_path: Path) -> None:
    """Both forms give the same tables; half a gzip is an error."""
    plain = kineto(tmp_path / "t.json")
    (tmp_path / "t.json.gz").write_bytes(gzip.compress((tmp_path / "t.json").read_bytes()))
    assert import_profile("torch-profiler", [tmp_path / "t.json.gz"]).tables == plain.tables
    (tmp_path / "list.json").write_text(json.dumps(KINETO_EVENTS))
    assert import_profile("torch-profiler", [tmp_path / "list.json"]).tables == plain.tables
    (tmp_path / "t.json.gz").write_bytes((tmp_path / "t.json.gz").read_bytes()[:200])
    with pytest.raises(InputError, match="damaged gzip"):
        import_profile("torch-profiler", [tmp_path / "t.json.gz"])


@pytest.mark.parametrize(("events", "message"), [
    ([event("moesim grouped_fnn s bf16 tokens=1", "user_annotation", 0, 1)], r"traceEvents\[0\]\) 'grouped_fnn'. Did you mean 'grouped_ffn'"),
    ([event("moesim router s bf16 groups=1", "user_annotation", 0, 1)], "router needs tokens, got groups"),
    ([event("moesim router", "user_annotation", 0, 1)], "range 'moesim router': expected e.g. 'moesim grouped_ffn"),
    ([event("k", "kernel", 0, -1)], "'dur' must not be negative"),
    ([{**event("k", "kernel", 0, 1), "ts": "soon"}], "'ts' must be a number, got 'soon'"),
    ([{**event("k", "kernel", 0, 1), "name": 7}], "'name' must be text, got 7"),
    ([event("cpu work", "cpu_op", 0, 1)], "no GPU work .* is it a trace of torch.profiler"),
    ([event("Memcpy HtoD (Pinned -> Device)", "gpu_memcpy", 0, 1, bytes="many")], "'bytes' must be a number"),
    ([event("k", "kernel", 0, 1)], "nothing to import from torch-profiler: it holds no measurement"),
    ([event("moesim router s bf16 tokens=1", "user_annotation", 0, 9), event("k", "kernel", 20, 1, correlation=1)],
     "1 x range that launched no GPU work")])
def test_traces_that_do_not_fit_are_named(tmp_path: Path, events: list[dict[str, Any]], message: str) -> None:
    """Each event in error by its place."""
    with pytest.raises(InputError, match=message):
        kineto(tmp_path / "t.json", events)


def test_a_real_profile_of_this_machine_s_cpu(tmp_path: Path) -> None:
    """torch.profiler's own file: a range takes at least what it slept, on the CPU where no GPU took part."""
    torch = pytest.importorskip("torch")
    import time

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for tokens in (4, 4, 8):
            with torch.profiler.record_function(f"moesim router h64.e8 fp32 tokens={tokens}"):
                time.sleep(0.01 * tokens / 4)
    profiler.export_chrome_trace(str(tmp_path / "real.json"))
    router = table(import_profile("torch-profiler", [tmp_path / "real.json"]), "router")
    assert (router.device, router.shape, router.sizes, router.samples) == ("cpu", "h64.e8", ((4,), (8,)), (2, 1))
    assert router.seconds[0] >= 0.01
    assert router.seconds[1] >= 0.02


# ---------------------------------------------------------------- llama-bench


@pytest.mark.parametrize("form", ["json", "jsonl"])
def test_llama_bench_golden(tmp_path: Path, form: str) -> None:
    """Seconds of a prompt and of a generation, as they were; no kernels; the mixed test is left out."""
    lines = "\n".join(map(json.dumps, LLAMA_TESTS))
    (tmp_path / "b").write_text(json.dumps(LLAMA_TESTS) if form == "json" else lines)
    profile = import_profile("llama-bench", [tmp_path / "b"])
    prompt, generation = table(profile, "prompt"), table(profile, "generation")
    assert {one.op for one in profile.tables} == {"prompt", "generation"}
    assert prompt.shape == "qwen3moe-30B.A3B-Q4_K---Medium.ngl99.ncmoe8.t16.b2048.ub512.kf16.vf16"
    assert (prompt.device, prompt.sizes, prompt.seconds, prompt.samples) == ("cuda", ((512, 0),), (0.4,), (3,))
    assert prompt.spread == pytest.approx((15 / 400,))
    assert (generation.sizes, generation.seconds, generation.spread) == (((128, 4096),), (2.56,), ())
    assert profile.fingerprint["left_out"] == {
        "test of a prompt and generation together (-pg): the two cannot be told apart": 1}
    assert (profile.date, profile.fingerprint["gpu_info"]) == ("2026-11-01T10:00:00Z", "Test GPU")


@pytest.mark.parametrize(("text", "message"), [
    ("[]", "no tests"), ("{}", r":1: expected a test of llama-bench"), ("[3]", r"\[0\]: expected a test of llama-bench"),
    ('[{"n_prompt": 1.5, "n_gen": 0}]', "'n_prompt' must be a whole number from 0, got 1.5"),
    ('[{"n_prompt": 1, "n_gen": 0}]', "'avg_ns' is missing"),
    ('[{"n_prompt": 1, "n_gen": 0, "samples_ns": []}]', "'samples_ns' must be a list of nanoseconds"),
    ('[{"n_prompt": 1, "n_gen": 0, "samples_ns": [0]}]', "a time must be positive and finite, got 0.0 s"),
    ('[{"n_prompt": 1, "n_gen": 0, "avg_ns": 1e999}]', "'avg_ns' must be finite"),
    ("| model | size |", ":1:1: not valid JSON")])
def test_other_files_are_no_llama_bench(tmp_path: Path, text: str, message: str) -> None:
    """Each error names the place and what was expected."""
    (tmp_path / "b.json").write_text(text)
    with pytest.raises(InputError, match=message):
        import_profile("llama-bench", [tmp_path / "b.json"])


# ---------------------------------------------------------------- nvbandwidth


def test_nvbandwidth_golden(tmp_path: Path) -> None:
    """Two buffer sizes make copy tables by direction; a matrix's cells are the samples; zero and N/A are no rates."""
    names, options = write_files(tmp_path)["nvbandwidth"]
    profile = import_profile("nvbandwidth", names, **options)
    down, mib = table(profile, "copy", "dram_to_hbm"), 1 << 20
    assert down.sizes == ((mib,), (512 * mib,))
    median = (1 / 50e9 + 1 / 40e9) / 2  # of two GPUs
    assert down.seconds == pytest.approx((mib * median, 512 * mib * median))
    assert down.samples == (2, 2)
    assert table(profile, "copy", "hbm_to_dram").seconds == pytest.approx((mib / 25e9, 512 * mib / 25e9))
    assert table(profile, "copy", "dram_to_hbm_both_ways").seconds == pytest.approx((mib / 20e9, 512 * mib / 20e9))
    assert table(profile, "copy", "hbm_to_hbm").samples == (2, 2)
    assert profile.fingerprint["left_out"] == {
        "nvbandwidth test all_to_host_memcpy_sm: not a copy over one link by a copy engine": 2,
        "nvbandwidth test without a matrix of GB/s (waived, failed, cut short, or a latency)": 1,
        "nvbandwidth test without a matrix (status 'Waived')": 1}
    assert profile.fingerprint["Driver Version"] == "570.1"
    assert CostModel(HARDWARE, profile).route_copy("node0.dram", "node0.gpu0.hbm", 512 * mib).source == "measured"


def test_text_and_json_say_the_same(tmp_path: Path) -> None:
    """The same measurement in both forms gives the same tables."""
    write_files(tmp_path)
    text, document = (import_profile("nvbandwidth", [tmp_path / name], buffer_mib=512) for name in ("bw.txt", "bw.json"))
    assert text.tables == document.tables


def test_one_size_makes_no_table_that_the_simulator_reads(tmp_path: Path) -> None:
    """A rate at 512 MiB is no time of 4 MiB: the table has another name, and the note says the rate."""
    (tmp_path / "bw.txt").write_text(NVBANDWIDTH_TEXT)
    profile = import_profile("nvbandwidth", [tmp_path / "bw.txt"], buffer_mib=512)
    assert {one.op for one in profile.tables} == {"copy_at_one_size"}
    assert any("state bytes_per_s: 2.5e+10 (25 GB/s)" in note for note in profile.fingerprint["notes"])
    assert CostModel(HARDWARE, profile).route_copy("node0.dram", "node0.gpu0.hbm", 1e6).source == "nameplate"


@pytest.mark.parametrize(("text", "options", "message"), [
    (NVBANDWIDTH_TEXT, {}, "prints no buffer size: give buffer_mib"),
    (NVBANDWIDTH_TEXT, {"buffer_mib": "1,2"}, "expected 1 positive number of MiB"),
    (NVBANDWIDTH_TEXT, {"buffer_mib": 0}, "expected 1 positive number of MiB"),
    (NVBANDWIDTH_TEXT.replace("50.00     40.00", "50.00"), {"buffer_mib": 512}, "a row of 1 rates under 2 columns: cut short"),
    (NVBANDWIDTH_TEXT.replace("50.00     40.00", "50.00     fast"), {"buffer_mib": 512}, "must be a number of GB/s or N/A, got 'fast'"),
    ("hello", {"buffer_mib": 512}, "expected the output of nvbandwidth"),
    ("{}", {"buffer_mib": 512}, "expected nvbandwidth --json"),
    (json.dumps(NVBANDWIDTH_JSON).replace("50.00", "-1"), {"buffer_mib": 512}, r"testcases\[0\]: a rate must be a number"),
    (json.dumps({"nvbandwidth": {"testcases": [3]}}), {"buffer_mib": 512}, r"testcases\[0\]: expected an object with a 'name'"),
    (json.dumps({"nvbandwidth": {"testcases": [{"name": "x", "bandwidth_matrix": 3}]}}), {"buffer_mib": 512},
     "'bandwidth_matrix' must be a list of rows")])
def test_nvbandwidth_errors_name_the_place(tmp_path: Path, text: str, options: dict[str, Any], message: str) -> None:
    """No size is guessed; damaged matrices are named."""
    (tmp_path / "bw").write_text(text)
    with pytest.raises(InputError, match=message):
        import_profile("nvbandwidth", [tmp_path / "bw"], **options)


# ---------------------------------------------------------------- all sources


def test_a_profile_says_where_it_comes_from(tmp_path: Path) -> None:
    """Source, digests of the files, what was left out; a file gives back the same; twice the same bytes."""
    for source, (names, options) in write_files(tmp_path).items():
        profile = import_profile(source, names, **options)
        assert profile.fingerprint["source"] == source
        assert set(profile.fingerprint["files"]) == {Path(name).name for name in names}
        assert all(digest.startswith("sha256:") for digest in profile.fingerprint["files"].values())
        written = profile.write(tmp_path / "x.profile.json")
        first = written.read_bytes()
        assert read_profile(written) == profile
        assert import_profile(source, names, **options).write(tmp_path / "x.profile.json").read_bytes() == first


@pytest.mark.parametrize("source", ["torch-profiler", "llama-bench", "nvbandwidth"])
def test_files_that_are_not_there_and_pickles_are_refused(tmp_path: Path, source: str) -> None:
    """Before anything of them is read."""
    options = {"buffer_mib": 1} if source == "nvbandwidth" else {}
    with pytest.raises(InputError, match="no such file"):
        import_profile(source, [tmp_path / "none"], **options)
    (tmp_path / "p").write_bytes(b"\x80\x04abc")
    with pytest.raises(InputError, match="pickle"):
        import_profile(source, [tmp_path / "p"], **options)
    with pytest.raises(InputError, match="name at least one file"):
        import_profile(source, [])


def test_an_unknown_source_is_named() -> None:
    """With a suggestion."""
    with pytest.raises(InputError, match=r"unknown source of measurements 'lama-bench'. Did you mean 'llama-bench'"):
        import_profile("lama-bench", ["x"])


def _damage(data: bytes, rng: np.random.Generator) -> bytes:
    """Cut, flip bytes, swap blocks, or put a number or bracket where none was."""
    kind, changed = rng.integers(4), bytearray(data)
    place = int(rng.integers(len(data)))
    if kind == 0:
        return data[:place]
    if kind == 1:
        for spot in rng.integers(len(data), size=4):
            changed[spot] ^= int(rng.integers(1, 256))
    elif kind == 2:
        other = int(rng.integers(len(data)))
        changed[place:place + 9], changed[other:other + 9] = changed[other:other + 9], changed[place:place + 9]
    else:
        words = [b"1e999", b"-7", b"null", b"{", b"]", b"NaN", b'"', b"9" * 400, b"true", b"[[[["]
        changed[place:place + int(rng.integers(6))] = words[int(rng.integers(len(words)))]
    return bytes(changed)


def _import_or_refuse(source: str, names: list[Path], options: dict[str, Any]) -> str:
    """Import; the only other outcome is an InputError of one line. Returns which."""
    try:
        profile = import_profile(source, names, **options)
    except InputError as error:
        text = str(error)
    else:
        text = ""
    if text:
        assert "\n" not in text
        return "refused"
    assert all(math.isfinite(value) and value > 0 for one in profile.tables for value in one.seconds)
    json.dumps(profile.fingerprint, allow_nan=False)
    return "read"


@pytest.mark.parametrize("sample", ["torch-profiler", "llama-bench", "nvbandwidth", "nvbandwidth json"])
def test_damaged_files_are_read_or_refused(tmp_path: Path, sample: str) -> None:
    """300 damages of each text file: a clear error or a sound profile, nothing else; both occur."""
    source = sample.split()[0]
    names, options = write_files(tmp_path)[source]
    victim, rng = names[-1] if sample.endswith("json") else names[0], np.random.default_rng(7)
    whole, outcomes = victim.read_bytes(), Counter[str]()
    for _ in range(300):
        victim.write_bytes(_damage(whole, rng))
        outcomes[_import_or_refuse(source, names, options)] += 1
    assert min(outcomes["read"], outcomes["refused"]) >= 20


@pytest.mark.parametrize("name", list(TABLES))
def test_damaged_tables_are_read_or_refused(tmp_path: Path, name: str) -> None:
    """60 damages of each Parquet file of a GPU."""
    folder, rng = write_gpu(tmp_path), np.random.default_rng(8)
    victim = folder / f"{name}.parquet"
    whole, outcomes = victim.read_bytes(), Counter[str]()
    for _ in range(60):
        victim.write_bytes(_damage(whole, rng))
        outcomes[_import_or_refuse("aiconfigurator", [folder], {"model": tiny_model()})] += 1
    assert outcomes["refused"] >= 20


@pytest.mark.parametrize("values", [[2**62, 1], [0, 0], [-4, 1], [1, 0], [3, 2]])
def test_hostile_sizes_do_no_harm(tmp_path: Path, values: list[int]) -> None:
    """Huge, zero, negative tokens and ranks neither allocate nor crash."""
    rows = [*MOE_ROWS, moe_row(values[0], 0.1, ep=values[1])]
    assert _import_or_refuse("aiconfigurator", [write_gpu(tmp_path, {"moe/eng/1.0/moe_perf": rows})],
                             {"model": tiny_model()}) in ("read", "refused")


# ---------------------------------------------------------------- the command line


def test_the_import_verb_writes_a_profile(tmp_path: Path) -> None:
    """Tables, notes and what was left out for people; facts for programs."""
    names, _ = write_files(tmp_path)["nvbandwidth"]
    arguments = ["calibrate", "import", "nvbandwidth", "--from", str(names[0]), "--from", str(names[1]),
                 "--option", "buffer_mib=512,1", "-o", str(tmp_path / "x.profile.json")]
    text = call(*arguments)
    assert "dram_to_hbm" in text
    assert "not a copy over one link by a copy engine" in text
    assert "x.profile.json" in text
    facts = call_json(*arguments)
    assert {"copy"} == {row["op"] for row in facts["tables"]}
    assert read_profile(tmp_path / "x.profile.json").fingerprint == facts["fingerprint"]


def _at_the_nameplate(tmp_path: Path, moe_dtype: str) -> Path:
    """Write tables for OLMoE and a twin that is twice as wide: times exactly at the nameplate, weights in a dtype."""
    cost, weight_bytes = CostModel(HARDWARE), {"bfloat16": 2.0, "fp8": 1.0}[moe_dtype]
    olmoe = load_model("olmoe-1b-7b").replace(weight_bytes=weight_bytes)
    rows = []
    for width in (1024, 2048):
        spec = olmoe.replace(expert_intermediate_size=width)
        for tokens in (1, 8, 64, 512):
            size = balanced_size(tokens, 64, 8, 1)
            assert size is not None
            rows.append(moe_row(tokens, 1e3 * cost.grouped_ffn(GPU0, experts_work(spec, *size)).seconds, hidden_size=2048,
                                inter_size=width, topk=8, num_experts=64, moe_dtype=moe_dtype))
    return write_gpu(tmp_path, {"moe/eng/1.0/moe_perf": rows}, "gpu: {mem_bw: 3350000000000}\n")


@pytest.mark.parametrize("moe_dtype", ["bfloat16", "fp8"])
def test_the_held_out_check_is_exact_where_times_are_the_nameplate_s(tmp_path: Path, moe_dtype: str) -> None:
    """Times made by the nameplate are predicted from another shape's without error, in the table's dtype, not the model's."""
    folder = _at_the_nameplate(tmp_path, moe_dtype)
    config = tmp_path / "wide" / "config.json"
    config.parent.mkdir()
    config.write_text(json.dumps({
        "model_type": "olmoe", "architectures": ["OlmoeForCausalLM"], "hidden_size": 2048, "intermediate_size": 2048,
        "num_hidden_layers": 16, "num_experts": 64, "num_experts_per_tok": 8, "num_attention_heads": 16,
        "num_key_value_heads": 16, "vocab_size": 50304, "torch_dtype": "bfloat16"}))
    arguments = ["calibrate", "import", "aiconfigurator", "--from", str(folder), "--model", "olmoe-1b-7b", "--option",
                 f"moe_dtype={moe_dtype}", "--held-out", str(config), "--hardware", "h100-sxm", "-o", str(tmp_path / "x.profile.json")]
    held_out = call_json(*arguments)["held_out"]
    assert (held_out["num_sizes"], held_out["num_inside"]) == (4, 4)
    assert (held_out["median"], held_out["largest"], held_out["nameplate_median"]) == pytest.approx((0, 0, 0), abs=1e-9)
    assert "median error 0.0 %" in call(*arguments)


@pytest.mark.parametrize(("arguments", "message"), [
    ("import nvbandwith --from x -o y", "unknown source of measurements 'nvbandwith'. Did you mean 'nvbandwidth'"),
    ("import llama-bench --from none.json -o y", "none.json: no such file"),
    ("import llama-bench --from none.json -o y --model olmoe-1b-7b", "source 'llama-bench' has no option 'model'"),
    ("import llama-bench --from none.json -o y --held-out a", "--held-out needs --model and --hardware"),
    ("--seconds 3 import llama-bench --from none.json -o y", "--seconds belongs to a measurement"),
    ("import aiconfigurator --from h100_sxm --from b -o y", "name one GPU or one folder, got 2"),
    ("import aiconfigurator --from h100_sxm -o y", "name the model whose kernels are wanted"),
    ("improt", "No such command 'improt'. Did you mean 'import'")])
def test_the_import_verb_fails_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, message: str) -> None:
    """Exit status 2 and nothing written."""
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["calibrate", *arguments.split()])
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split())
    assert not list(tmp_path.iterdir())


def test_a_version_such_as_0_10_stays_a_name(tmp_path: Path) -> None:
    """It is not the number 0.1."""
    folder = write_gpu(tmp_path)
    shutil.move(folder / "moe" / "eng" / "1.0", folder / "moe" / "eng" / "0.10")
    shutil.copytree(folder / "moe" / "eng" / "0.10", folder / "moe" / "eng" / "0.9")
    config = tmp_path / "config.json"
    config.write_text(json.dumps({
        "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 2, "num_local_experts": 8, "num_experts_per_tok": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 32, "torch_dtype": "bfloat16"}))
    facts = call_json("calibrate", "import", "aiconfigurator", "--from", str(folder), "--model", str(config),
                      "--option", "version=0.10", "-o", str(tmp_path / "x.profile.json"))
    assert facts["fingerprint"]["framework"] == "eng 0.10"


def test_sources_are_described() -> None:
    """Every source has a line on what it is."""
    assert all(SOURCES[name].description for name in SOURCES.names())

