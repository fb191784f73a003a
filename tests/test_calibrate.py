"""Calibration: the kernels are right, and a short run gives tables that say what they are worth."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from moesim.calibrate.bench import CONTEXTS, COPY_BYTES, GROUPS, TOKENS
from moesim.calibrate.kernels import (
    expert_ffn,
    make_attention,
    paced_copy,
    router_topk,
    spec_for_dtype,
    torch_device,
)
from moesim.calibrate.run import calibrate, with_residuals
from moesim.errors import InputError
from moesim.hardware.profile import CalibrationProfile, MeasuredTable, read_profile
from moesim.hardware.tables import TableFit
from moesim.model.spec import AttentionSpec, ModelSpec

torch = pytest.importorskip("torch")


def tiny_model() -> ModelSpec:
    """Sizes that take microseconds."""
    return ModelSpec("tiny", 2, (0, 1), 4, 2, 16, 24, AttentionSpec(4, 2, 8), 32)


# ---------------------------------------------------------------- kernels


def test_an_expert_is_three_linear_layers_and_a_gate() -> None:
    """Against torch.nn.Linear and torch.nn.SiLU with the same weights."""
    generator = torch.Generator().manual_seed(0)
    rows, blob = torch.randn(5, 16, generator=generator), torch.randn(3 * 16 * 24, generator=generator)
    gate, up, down = (torch.nn.Linear(*shape, bias=False) for shape in ((16, 24), (16, 24), (24, 16)))
    with torch.no_grad():
        for layer, part in zip((gate, up, down), blob.split(16 * 24), strict=True):
            layer.weight.copy_(part.view_as(layer.weight))
        expected = down(torch.nn.SiLU()(gate(rows)) * up(rows))
        torch.testing.assert_close(expert_ffn(rows, blob, 16, 24), expected)


@pytest.mark.parametrize("context", [1, 7, 32])
def test_attention_of_one_token_is_softmax_over_its_context(context: int) -> None:
    """Head by head, with plain matrix products; each key head serves two query heads; the new key counts."""
    layer = make_attention(tiny_model(), 32, "cpu", torch.float32, torch.Generator().manual_seed(0))
    row = torch.randn(1, 16, generator=torch.Generator().manual_seed(1))
    keys, values = layer.keys.clone(), layer.values.clone()
    keys[:, 0], values[:, 0] = (row @ layer.key.T).view(2, 8), (row @ layer.value.T).view(2, 8)
    query, mixed = (row @ layer.query.T).view(4, 8), []
    for head in range(4):
        scores = keys[head // 2, :context] @ query[head] / math.sqrt(8)
        weights = torch.exp(scores - scores.max())
        mixed.append(weights / weights.sum() @ values[head // 2, :context])
    expected = torch.cat(mixed)[None] @ layer.output.T
    torch.testing.assert_close(layer.forward(row, context), expected)


def test_attention_of_several_tokens_shares_the_context_evenly() -> None:
    """Rows that attend to the same cached tokens each give what they would give alone."""
    layer = make_attention(tiny_model(), 32, "cpu", torch.float32, torch.Generator().manual_seed(0))
    rows = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    together = layer.forward(rows, 3 * 9)
    keys, values = layer.keys.clone(), layer.values.clone()
    query = (rows @ layer.query.T).view(3, 4, 8)
    alone = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(0, 1), keys[:, :9].repeat_interleave(2, 0), values[:, :9].repeat_interleave(2, 0))
    torch.testing.assert_close(together, alone.transpose(0, 1).reshape(3, 32) @ layer.output.T)


def test_the_router_gives_the_largest_softmax_weights() -> None:
    """By sorting in numpy."""
    rows, weight = torch.randn(6, 16), torch.randn(4, 16)
    logits = (rows @ weight.T).numpy().astype(np.float64)
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(router_topk(rows, weight, 2).numpy(), -np.sort(-shares, axis=1)[:, :2], rtol=1e-4)


def test_a_paced_copy_copies_and_takes_its_time() -> None:
    """64 kB at 3.2 MB/s take at least 20 ms; unpaced it is just a copy."""
    import time

    source, target = torch.randint(0, 255, (65536,), dtype=torch.uint8), torch.zeros(65536, dtype=torch.uint8)
    start = time.perf_counter()
    paced_copy(target, source, 3_276_800.0)
    assert time.perf_counter() - start >= 0.02
    assert torch.equal(target, source)
    target.zero_()
    paced_copy(target, source, None)
    assert torch.equal(target, source)


# ---------------------------------------------------------------- a short run


@pytest.fixture(scope="module")
def profile() -> CalibrationProfile:
    """A calibration of about a second."""
    return calibrate(tiny_model(), device="cpu", seconds=1.0, seed=3)


def test_a_calibration_covers_every_operation_and_size(profile: CalibrationProfile) -> None:
    """Experts, attention, router, copies and reads, each at all its sizes, at least three times."""
    tables = {table.op: table for table in profile.tables}
    assert set(tables) == {"grouped_ffn", "attention", "router", "copy", "file_read"}
    assert {size[0] for size in tables["grouped_ffn"].sizes} == set(TOKENS)
    assert {size[1] for size in tables["grouped_ffn"].sizes} == set(GROUPS)
    assert {size[1] / size[0] for size in tables["attention"].sizes} == set(CONTEXTS)
    assert [size[0] for size in tables["copy"].sizes] == list(COPY_BYTES)
    for table in profile.tables:
        assert list(table.sizes) == sorted(set(table.sizes))
        assert min(table.seconds) > 0
        assert min(table.samples) >= 3
        assert len(table.spread) == len(table.seconds)
        assert table.residual is not None
        assert 0 <= table.residual <= table.residual_max


def test_forced_routing_is_possible_routing(profile: CalibrationProfile) -> None:
    """Every size is a way to put tokens into groups: no group empty, the largest no larger than it can be."""
    experts = next(table for table in profile.tables if table.op == "grouped_ffn")
    for tokens, groups, largest in experts.sizes:
        assert groups <= tokens <= groups * largest
        assert largest <= tokens - groups + 1


def test_a_profile_says_whose_it_is_and_round_trips(profile: CalibrationProfile, tmp_path: Path) -> None:
    """Machine, versions, threads, date and seed; a file gives back the same profile."""
    assert {"processor", "cores", "torch", "threads", "memory_bytes", "device"} <= set(profile.fingerprint)
    assert (profile.fingerprint["torch"], profile.seed) == (torch.__version__, 3)
    assert profile.date.startswith("20")
    assert read_profile(profile.write(tmp_path / "a.profile.json")) == profile


def test_a_measured_size_is_looked_up_as_measured(profile: CalibrationProfile) -> None:
    """At its own sizes a table answers `measured`, and its times where they never fall with size."""
    for table in profile.tables:
        fit = TableFit(table)
        assert {fit.lookup(size).source for size in table.sizes} == {"measured"}
    rising = MeasuredTable("copy", "x", "", "", ("bytes",), ((1.0,), (2.0,)), (3.0, 5.0))
    assert TableFit(rising).lookup((2.0,)).seconds == 5.0


def test_residuals_are_those_of_the_sizes_that_were_held_out() -> None:
    """On a line the held-out sizes are predicted exactly; a bump of 25 % at one of two is the largest error."""
    sizes = tuple((float(n),) for n in range(1, 6))
    line = with_residuals(MeasuredTable("copy", "x", "", "", ("bytes",), sizes, (1.0, 2.0, 3.0, 4.0, 5.0)))
    assert (line.residual, line.residual_max) == pytest.approx((0, 0))
    bump = with_residuals(MeasuredTable("copy", "x", "", "", ("bytes",), sizes, (1.0, 2.5, 3.0, 4.0, 5.0)))
    assert (bump.residual, bump.residual_max) == pytest.approx((0.1, 0.2))
    short = MeasuredTable("copy", "x", "", "", ("bytes",), sizes[:3], (1.0, 2.0, 3.0))
    assert with_residuals(short).residual is None


def test_threads_are_as_before_after_a_calibration(profile: CalibrationProfile) -> None:
    """A failed calibration too puts torch's thread count back."""
    threads = torch.get_num_threads()
    with pytest.raises(InputError, match="too few"):
        calibrate(tiny_model(), device="cpu", seconds=1e-6)
    assert torch.get_num_threads() == threads


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(("options", "message"), [
    ({"seconds": 0.0}, "calibrate: seconds must be positive, got 0.0"),
    ({"seconds": float("nan")}, "calibrate: seconds must be positive, got nan"),
    ({"seconds": 1e-3}, r"calibrate: 0.001 s are too few: one pass over \d+ cases"),
    ({"device": "tpu"}, "device must be auto, cpu or cuda, got 'tpu'"),
    ({"dtype": "int4"}, "dtype must be one of float32, bfloat16, float16, got 'int4'")])
def test_what_cannot_be_calibrated_is_named(options: dict[str, object], message: str) -> None:
    """Time, device and dtype are checked."""
    with pytest.raises(InputError, match=message):
        calibrate(tiny_model(), **{"device": "cpu", **options})  # type: ignore[arg-type]


def test_a_model_without_gates_cannot_be_calibrated() -> None:
    """The kernel is SwiGLU; experts of two matrices are another one."""
    with pytest.raises(InputError, match=r"'tiny' has experts of 2 matrices"):
        calibrate(tiny_model().replace(gated=False), device="cpu", seconds=1.0)


def test_an_expert_too_large_to_rotate_is_refused() -> None:
    """The message says how large it is and what to give instead."""
    with pytest.raises(InputError, match=r"an expert of 'tiny' has \d+ bytes; calibrate a smaller model"):
        calibrate(tiny_model().replace(hidden_size=16384, expert_intermediate_size=16384), device="cpu", seconds=1.0)


def test_another_attention_is_refused_by_the_real_run() -> None:
    """Latent attention has no kernel here."""
    latent = tiny_model().replace(attention=AttentionSpec(4, 4, 8, "mla", 0, 8, 4, 4, 8))
    with pytest.raises(InputError, match="knows grouped-query attention only; 'tiny' has 'mla'"):
        make_attention(latent, 8, "cpu", torch.float32, torch.Generator())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_device_that_is_not_there_is_named() -> None:
    """`auto` falls back to the CPU; `cuda` does not."""
    assert torch_device("auto") == "cpu"
    with pytest.raises(InputError, match="device cuda: torch sees no CUDA device here"):
        torch_device("cuda")


def test_every_weight_takes_the_kernel_s_dtype() -> None:
    """A model in mxfp4 with biases is calibrated in the dtype that is asked for."""
    model = spec_for_dtype(tiny_model().replace(weight_bytes=0.53125, expert_bias=True), "float32")
    assert (model.weight_bytes, model.other_weight_bytes, model.activation_bytes, model.expert_bias) == (4, 4, 4, False)
    assert model.expert_bytes == 3 * 16 * 24 * 4
