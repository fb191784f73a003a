"""Calibration: the kernels are right, and a short run gives tables that say what they are worth."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from command_line import call, call_json
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from moesim.calibrate import copies, files, measure, run
from moesim.calibrate.bench import Bench, Beside, Call, Case, Timer
from moesim.calibrate.contention import contentions
from moesim.calibrate.dense import dense_benches
from moesim.calibrate.experts import FEW_GROUPS, FEW_TOKENS, GROUPS, TOKENS, forced_counts, forced_sizes
from moesim.calibrate.forms import Int4Expert, Int8Expert, batched_ffn, grouped_ffn, int4_group, quantised_ffn
from moesim.calibrate.journal import Journal
from moesim.calibrate.kernels import (
    expert_ffn,
    make_attention,
    paced_copy,
    router_topk,
    spec_for_dtype,
    torch_device,
)
from moesim.calibrate.measure import Budget, Measurement, finished_tables, sizes_left_out
from moesim.calibrate.medians import table_of_runs
from moesim.calibrate.operands import Operands
from moesim.calibrate.run import calibrate, with_residuals
from moesim.cli import app
from moesim.errors import InputError
from moesim.hardware.cost import GROUPED_AXES
from moesim.hardware.profile import CalibrationProfile, MeasuredTable, TableKey, choose_form, read_profile
from moesim.hardware.tables import TableFit
from moesim.lowering import work
from moesim.model.spec import AttentionSpec, ModelSpec
from moesim.units import MIB

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
    source, target = torch.randint(0, 255, (65536,), dtype=torch.uint8), torch.zeros(65536, dtype=torch.uint8)
    start = time.perf_counter()
    paced_copy(target, source, 3_276_800.0)
    assert time.perf_counter() - start >= 0.02
    assert torch.equal(target, source)
    target.zero_()
    paced_copy(target, source, None)
    assert torch.equal(target, source)


# ---------------------------------------------------------------- other forms of the expert layer

COUNTS = (3, 1, 4)


def rows_and_blobs() -> tuple[object, object]:
    """Return [8, 16] rows and the weights of three experts of width 24."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(8, 16, generator=generator), torch.randn(3, 3 * 16 * 24, generator=generator) / 4


def loop_of(rows: object, blobs: object, hidden: int, width: int) -> object:
    """The eager loop over COUNTS rows per group: what every other form must equal."""
    parts = torch.split(rows, COUNTS)
    return torch.cat([expert_ffn(part, blob, hidden, width) for part, blob in zip(parts, blobs, strict=True)])


def test_a_grouped_gemm_is_the_loop() -> None:
    """Rows sorted by group, groups of unequal size."""
    rows, blobs = rows_and_blobs()
    ends = torch.tensor([3, 4, 8], dtype=torch.int32)
    torch.testing.assert_close(grouped_ffn(rows, blobs, ends, 16, 24), loop_of(rows, blobs, 16, 24))


def test_padded_batches_are_the_loop() -> None:
    """Each group's first rows are its own; the padding gives rows that nobody reads."""
    rows, blobs = rows_and_blobs()
    padded = torch.zeros(3, 4, 16)
    for place, part in enumerate(torch.split(rows, COUNTS)):
        padded[place, :len(part)] = part
    found = batched_ffn(padded, blobs, 16, 24)
    own = torch.cat([found[place, :count] for place, count in enumerate(COUNTS)])
    torch.testing.assert_close(own, loop_of(rows, blobs, 16, 24))


def swiglu(rows: object, gate: object, up: object, down: object) -> object:
    """SwiGLU by plain float32 products of [out, in] matrices."""
    return torch.nn.functional.silu(rows @ gate.T) * (rows @ up.T) @ down.T


def test_int8_weights_are_whole_numbers_times_a_scale_per_output() -> None:
    """Against the matrices written out in float32."""
    expert = Int8Expert.random(64, 96, torch.float32, "cpu", torch.Generator().manual_seed(0))
    rows = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    plain = [whole.float() * scale[:, None] for whole, scale in zip(expert.matrices, expert.scales, strict=True)]
    torch.testing.assert_close(quantised_ffn(rows, expert), swiglu(rows, *plain), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(quantised_ffn(rows, expert.clone()), quantised_ffn(rows, expert))


def test_int4_weights_are_distances_from_eight_times_a_scale_per_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the matrices written out in float32, from the whole numbers that were packed."""
    from moesim.calibrate import forms

    packed, whole = forms.pack_int4, []
    monkeypatch.setattr(forms, "pack_int4", lambda numbers, device: whole.append(numbers) or packed(numbers, device))
    expert = Int4Expert.random(64, 128, torch.float32, "cpu", torch.Generator().manual_seed(0))
    rows = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    assert expert.group == 64
    plain = []
    for numbers, scale in zip(whole, expert.scales, strict=True):
        outs, ins = numbers.shape
        groups = (numbers.float() - 8).view(outs, ins // 64, 64) * scale[..., 0].T[..., None] + scale[..., 1].T[..., None]
        plain.append(groups.view(outs, ins))
    torch.testing.assert_close(quantised_ffn(rows, expert), swiglu(rows, *plain), rtol=1e-3, atol=1e-4)


def test_widths_that_no_group_divides_have_no_int4_weights() -> None:
    """The benchmark leaves them out with this reason."""
    assert (int4_group(2048, 1024), int4_group(64, 96), int4_group(64, 128)) == (128, 32, 64)
    with pytest.raises(InputError, match="no group of 128, 64, 32 inputs divides both 16 and 24"):
        int4_group(16, 24)


@given(st.integers(1, 600), st.integers(1, 80), st.integers(1, 80))
@settings(deadline=None)
def test_forced_routing_is_possible_routing(tokens: int, groups: int, most: int) -> None:
    """Counts add up to the tokens, no group is empty, the largest is the one that is stated, from even to most uneven."""
    sizes = forced_sizes([tokens], [groups], most)
    assert bool(sizes) == (groups <= min(tokens, most))
    for size in sizes:
        counts = forced_counts(size)
        assert (sum(counts), len(counts), max(counts), min(counts) >= 1) == (tokens, groups, size[2], True)
    if sizes:
        assert {math.ceil(tokens / groups), tokens - groups + 1} <= {size[2] for size in sizes}


def test_parts_are_named_as_their_work_is() -> None:
    """Operation, shape, dtype and axes of every part are those by which a cost is looked up."""
    model = tiny_model().replace(shared_intermediate_size=40, dense_intermediate_size=48)
    ops = Operands(model, "cpu", "float32", 0)
    found = {bench.key.op: bench.key for bench in dense_benches(ops, "cpu", "fp32").benches}
    works = {"router": work.router_work, "shared_expert": work.shared_work, "dense": work.dense_work, "head": work.head_work}
    assert set(found) == {*works, "attention"}
    for op, make in works.items():
        asked = make(ops.model, 4)
        assert found[op] == TableKey(asked.op, "cpu", asked.shape, asked.dtype, ("tokens",))
    asked = work.attention_work(ops.model, 4, 64)
    assert found["attention"] == TableKey("attention", "cpu", asked.shape, asked.dtype, ("tokens", "context"))


def test_experts_rotate_and_never_reach_beyond_the_pool() -> None:
    """Blobs come in turn; a group that would not fit before the pool's end starts again at its beginning."""
    ops = Operands(tiny_model(), "cpu", "float32", 0)
    ops.count, ops.pool = 5, torch.arange(5.0)[:, None]
    assert [ops.next_blobs(count)[:, 0].tolist() for count in (2, 2, 2, 5, 1)] == [[0, 1], [2, 3], [0, 1], [0, 1, 2, 3, 4], [0]]


# ---------------------------------------------------------------- the loop, with times that are made up


class MadeUp(Timer):
    """Says how long a case took by a formula, and lets a clock of its own go on by that; the case itself does nothing."""

    def __init__(self, formula: Callable[[tuple[float, ...]], float]) -> None:
        super().__init__("cpu")
        self.formula, self.order, self.now_s = formula, [], 0.0

    def seconds(self, case: Case) -> float:
        """Return the formula's time."""
        self.order.append((case.bench.key.op, case.size))
        self.now_s += self.formula(case.size)
        return self.formula(case.size)


def nothing(op: str, sizes: tuple[tuple[float, ...], ...], axes: tuple[str, ...] = ("tokens",)) -> Bench:
    """A benchmark of nothing."""
    return Bench(TableKey(op, "cpu", "s", "fp32", axes), sizes, lambda size: Call(lambda: None))


def measured(formula: Callable[[tuple[float, ...]], float], *benches: Bench, seconds: float) -> tuple[Journal, MadeUp]:
    """Measure benchmarks by a clock that only their made-up times move."""
    timer, journal = MadeUp(formula), Journal(None, {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: timer.now_s))
        Measurement(timer, journal, Budget(seconds, seconds, seconds), 0, lambda *_: None).run(benches)
    return journal, timer


def test_every_size_is_measured_in_random_order() -> None:
    """Passes hold every case once; two of them have different orders; medians are the formula's."""
    benches = [nothing(op, tuple((float(n),) for n in range(1, 9))) for op in ("router", "head")]
    journal, timer = measured(lambda size: 0.001 + 0.001 * size[0], *benches, seconds=1.0)
    first = 16 + 2  # the warm-up, and the first run of each kernel
    passes = [timer.order[first + 16 * number: first + 16 * (number + 1)] for number in range(3)]
    assert all(len(set(one)) == 16 for one in passes)
    assert passes[0] != passes[1]
    tables = finished_tables(journal)
    assert [table.op for table in tables] == ["head", "router"]
    assert tables[0].seconds == pytest.approx([0.001 + 0.001 * n for n in range(1, 9)])
    assert min(tables[0].samples) >= 3
    assert sizes_left_out(journal, benches) == {}


def test_sizes_are_added_until_a_break_is_as_narrow_as_it_can_be() -> None:
    """A jump by 1.7 between 37 and 38 tokens, found from sizes 32 and 48 on, ends between neighbours; copies in whole pages."""
    tokens = nothing("router", tuple((float(n),) for n in TOKENS))
    journal, _ = measured(lambda size: (0.001 + 1e-5 * size[0]) * (1.7 if size[0] > 37 else 1.0), tokens, seconds=2.0)
    sizes = {size[0] for size in journal.runs[tokens.key]}
    assert {37, 38} <= sizes
    assert set(TOKENS) < sizes
    smooth, _ = measured(lambda size: 0.001 + 1e-5 * size[0], tokens, seconds=2.0)
    assert {size[0] for size in smooth.runs[tokens.key]} == set(TOKENS)
    copied = nothing("copy", copies.COPY_BYTES, ("bytes",))
    journal, _ = measured(lambda size: size[0] / 1e10 * (2.0 if size[0] > 5 * MIB else 1.0) + 1e-5, copied, seconds=2.0)
    added = {size[0] for size in journal.runs[copied.key]} - {size[0] for size in copies.COPY_BYTES}
    assert added
    assert all(size % 4096 == 0 for size in added)
    assert min(abs(math.log(size / (5 * MIB))) for size in added) < 0.1


def test_experts_are_refined_along_their_own_lines() -> None:
    """A jump at the sixth token of the largest of four groups: every added size is possible routing, and splits a gap."""
    grid = forced_sizes(TOKENS, (1, 4), 64)
    bench = nothing("grouped_ffn", grid, GROUPED_AXES)
    journal, _ = measured(lambda size: (0.01 * size[1] + 1e-5 * size[0]) * (1.7 if size[2] > 5 else 1.0), bench, seconds=100.0)
    added = set(journal.runs[bench.key]) - set(grid)
    assert {(5.0, 1.0, 5.0), (20.0, 4.0, 5.0)} & added
    for size in added:
        counts = forced_counts(size)
        assert (sum(counts), max(counts), min(counts) >= 1) == (size[0], size[2], True)


def test_what_there_is_no_time_for_is_the_costliest_and_is_counted() -> None:
    """A table whose third size would take more than a fifth of the time ends before it; the time is used, and kept to."""
    head, router = (nothing(op, ((1.0,), (2.0,), (3.0,), (4.0,))) for op in ("head", "router"))

    def formula(size: tuple[float, ...]) -> float:
        return 0.01 if size[0] < 3 else 0.3

    journal, timer = measured(formula, head, router, seconds=1.0)
    assert [table.sizes for table in finished_tables(journal)] == [((1.0,), (2.0,))] * 2
    assert list(sizes_left_out(journal, [head, router]).values()) == [2, 2]
    assert 1.0 <= timer.now_s <= 1.0 + 0.3
    with pytest.raises(InputError, match=r"calibrate: 0.05 s are too few: one pass over 8 cases had done 1 when a third"):
        measured(formula, head, router, seconds=0.05)


@given(st.lists(st.tuples(st.floats(1e-4, 1.0), st.floats(1.01, 4.0), st.integers(2, 8)), min_size=1, max_size=5), st.floats(1.0, 3.0))
@settings(deadline=None)
def test_the_time_is_kept_to_and_every_table_has_its_share(rows: list[tuple[float, float, int]], spare: float) -> None:
    """Costs that rise by a factor from size to size: the end is at most one case late, all that is kept has three runs."""
    benches = [nothing(f"op{place}", tuple((float(place), first * factor**step) for step in range(count)), ("table", "cost"))
               for place, (first, factor, count) in enumerate(rows)]
    least = sum(bench.sizes[0][1] + bench.sizes[1][1] for bench in benches)
    seconds = 12 * spare * least
    journal, timer = measured(lambda size: size[1], *benches, seconds=seconds)
    kept = {size for _, size in timer.order}
    assert timer.now_s <= seconds + max(size[1] for size in kept)
    tables = finished_tables(journal)
    assert {table.op for table in tables} == {bench.key.op for bench in benches}
    assert all(table.sizes[:2] == bench.sizes[:2] for table, bench in zip(tables, benches, strict=True))
    assert sum(len(table.sizes) for table in tables) == sum(map(len, journal.runs.values()))


def test_a_busy_core_is_noticed() -> None:
    """A kernel that sleeps half of its time had half of its core; only kernels count, and a note tells of it."""
    def half() -> None:
        until = time.thread_time() + 0.02
        while time.thread_time() < until:
            pass
        time.sleep(0.02)

    timer, rig = Timer("cpu"), run.Rig()
    assert timer.core_share == 1.0
    kernel, copied = (Bench(TableKey("op", "cpu", "s", dtype, ("tokens",)), ((1.0,),), lambda size: Call(half)) for dtype in ("fp32", ""))
    timer.seconds(Case(copied, (1.0,), Call(half)))
    run._note_busy(timer, rig)
    assert (timer.core_share, rig.notes) == (1.0, [])
    timer.seconds(Case(kernel, (1.0,), Call(half)))
    run._note_busy(timer, rig)
    assert 0.0 < timer.core_share <= 0.6
    assert rig.notes[0].startswith("this machine was busy: kernels had ")


def test_the_other_side_runs_beside_and_its_error_is_not_lost() -> None:
    """It has run once before the block begins, and no more after it; what it raises comes out."""
    ran = []
    with Beside(lambda: ran.append(0)):
        assert ran
    count = len(ran)
    assert len(ran) == count
    with pytest.raises(ZeroDivisionError), Beside(lambda: 1 / 0):
        pass


# ---------------------------------------------------------------- a short run


@pytest.fixture(scope="module")
def small() -> Iterator[None]:
    """Buffers and files of a few MiB, for machines with little memory and slow disks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copies, "BUFFER_BYTES", 64 * MIB)
        patch.setattr(files, "FILE_BYTES", 32 * MIB)
        yield


ALONE = ("kernels", "copies", "files")
EXPERT_FORMS = {"grouped_ffn", "grouped_ffn.grouped_mm", "grouped_ffn.bmm"}


@pytest.fixture(scope="module")
def profile(small: None) -> CalibrationProfile:
    """A calibration of a few seconds, in every dtype."""
    model = tiny_model().replace(hidden_size=64, expert_intermediate_size=32)
    return calibrate(model, device="cpu", seconds=10.0, seed=3, full=True, parts=ALONE)


def test_a_calibration_covers_every_operation_and_dtype(profile: CalibrationProfile) -> None:
    """Forms and parts by dtype, weights of 8 and 4 bits, copies, contention and reads; at least three runs of each size."""
    found = {(table.op, table.dtype) for table in profile.tables}
    parts = {*EXPERT_FORMS, "attention", "router", "head"}
    assert {(op, dtype) for op in parts for dtype in ("fp32", "bf16", "fp16")} <= found
    assert {table.shape[-5:] for table in profile.tables if table.op == "grouped_ffn" and table.dtype == "bf16"} == {
        "m3.w2", "m3.w1", "0.625"}
    assert {op for op, dtype in found if not dtype} == {"copy", "file_read", "launch", "hand_over"}
    for table in profile.tables:
        assert list(table.sizes) == sorted(set(table.sizes))
        assert min(table.seconds) > 0
        assert min(table.samples) >= 3
        assert len(table.spread) == len(table.seconds)
        assert table.residual is None or 0 <= table.residual <= table.residual_max


def test_every_size_of_the_grid_is_measured_or_counted_as_left_out(profile: CalibrationProfile) -> None:
    """Of the experts in the main dtype and in another one; groups are at most the model's experts."""
    counts = {reason.partition(":")[0]: count for reason, count in profile.fingerprint["left_out"].items()}
    for dtype, grid in (("fp32", forced_sizes(TOKENS, GROUPS, 4)), ("fp16", forced_sizes(FEW_TOKENS, FEW_GROUPS, 4))):
        table = next(one for one in profile.tables if (one.op, one.dtype) == ("grouped_ffn", dtype))
        missing = len(set(grid) - set(table.sizes))
        assert missing == counts.get(f"grouped_ffn cpu {table.shape} {dtype}", 0)
        assert {size[1] for size in table.sizes} <= {1, 2, 4}


def test_contention_is_the_ratio_to_the_same_size_alone(profile: CalibrationProfile) -> None:
    """Both sides, by size; where the size was measured alone the ratio is that of the two medians."""
    rows = list(contentions(profile))
    assert {row.axes for row in rows} == {("bytes",), GROUPED_AXES}
    alone = next(table for table in profile.tables if (table.op, table.device) == ("copy", "dram_to_dram"))
    for row in rows:
        if row.axes == ("bytes",) and row.source == "measured":
            assert row.alone_s == alone.seconds[alone.sizes.index(row.size)]
            assert row.ratio == pytest.approx(row.beside_s / row.alone_s)


def test_what_no_cost_is_taken_from_says_so(profile: CalibrationProfile) -> None:
    """Reads of files, contention, launches, the forms that are not in use, copies both ways."""
    report_only = {table.op for table in profile.tables if table.report_only}
    assert {"file_read", "contention", "launch", "grouped_ffn.bmm"} <= report_only
    assert report_only.isdisjoint({"grouped_ffn", "attention", "router", "head"})
    assert {table.device: table.report_only for table in profile.tables if table.op == "copy"} == {
        "dram_to_dram": False, "dram_to_dram_both_ways": True}


def test_another_form_can_be_chosen(profile: CalibrationProfile) -> None:
    """It takes the name that costs are looked up by; choosing the loop again gives the first profile back."""
    chosen = choose_form(profile, "bmm")
    shape = next(table.shape for table in profile.tables if table.dtype == "fp32" and table.op == "grouped_ffn.bmm")
    before = profile.find("grouped_ffn.bmm", "cpu", shape, "fp32")
    assert before is not None
    assert chosen.find("grouped_ffn", "cpu", shape, "fp32") == dataclasses.replace(before, op="grouped_ffn")
    assert chosen.find("grouped_ffn.loop", "cpu", shape, "fp32") is not None
    assert chosen.fingerprint["expert_form"] == "bmm"
    assert list(contentions(chosen)) == list(contentions(profile))
    assert choose_form(chosen, "loop") == profile
    with pytest.raises(InputError, match=r"unknown expert form of profile 'tiny float32 cpu' 'bnm'. Did you mean 'bmm'"):
        choose_form(profile, "bnm")


def test_a_profile_says_whose_it_is_and_round_trips(profile: CalibrationProfile, tmp_path: Path) -> None:
    """Machine, versions, threads, form, date and seed; a file gives back the same profile."""
    assert {"processor", "cores", "torch", "threads", "memory_bytes", "device", "expert_form"} <= set(profile.fingerprint)
    assert (profile.fingerprint["torch"], profile.seed) == (torch.__version__, 3)
    assert profile.date.startswith("20")
    assert read_profile(profile.write(tmp_path / "a.profile.json")) == profile


def test_float16_stands_in_for_bfloat16_where_it_is_the_main_dtype(small: None) -> None:
    """Its tables are called bf16, as the simulator asks for two-byte kernels, and a note says so; bfloat16 is left out."""
    found = calibrate(tiny_model(), device="cpu", seconds=3.0, dtype="float16", parts=("kernels",))
    assert {table.dtype for table in found.tables} == {"bf16", ""}
    assert found.fingerprint["notes"][:1] == ["float16 times are called bf16, as the simulator asks for two-byte kernels"]
    assert run.Plan(tiny_model(), "cpu", "float16", True, ("kernels",), 0, None).dtypes == ("float16", "float32")
    assert run.Plan(tiny_model(), "cpu", "bfloat16", True, ("kernels",), 0, None).dtypes == ("bfloat16", "float32", "float16")


def test_a_form_that_torch_lacks_is_left_out_with_its_reason(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others are measured all the same; copies beside compute need the kernels."""
    monkeypatch.setattr("moesim.calibrate.experts.grouped_ffn", lambda *_: 1 + torch.ones(2) @ torch.ones(3))
    found = calibrate(tiny_model(), device="cpu", seconds=3.0, parts=("kernels",))
    assert {"grouped_ffn", "grouped_ffn.bmm"} == {table.op for table in found.tables} & EXPERT_FORMS
    assert found.fingerprint["notes"][0].startswith("grouped_ffn.grouped_mm fp32 is left out: torch cannot run it here: ")
    copied = calibrate(tiny_model(), device="cpu", seconds=2.0, parts=("copies",))
    assert {table.op for table in copied.tables} == {"copy"}
    assert copied.fingerprint["notes"][:1] == ["copies beside compute are left out: they need the part 'kernels'"]


# ---------------------------------------------------------------- going on


def test_an_interrupted_calibration_goes_on(small: None, tmp_path: Path) -> None:
    """Runs of before the interruption are in the profile; nothing that was measured is lost."""
    partial = tmp_path / "a.partial"

    def stop(description: str, done: float, total: float) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    options = {"device": "cpu", "parts": ("kernels",), "partial": partial}
    with pytest.raises(KeyboardInterrupt):
        calibrate(tiny_model(), seconds=4.0, progress=stop, **options)  # type: ignore[arg-type]
    header = run.Plan(tiny_model(), "cpu", "float32", False, ("kernels",), 0, None).header()
    with Journal(partial, header) as before:
        runs, spent_s = {key: {size: list(values) for size, values in sizes.items()} for key, sizes in before.runs.items()}, before.spent_s
    assert 2.0 <= spent_s <= 4.0
    found = calibrate(tiny_model(), seconds=4.0, **options)  # type: ignore[arg-type]
    with Journal(partial, header) as after:
        for key, sizes in runs.items():
            for size, values in sizes.items():
                assert after.runs[key][size][:len(values)] == values
        assert found.tables == finished_tables(after)
    assert runs


def test_another_machine_or_model_is_refused(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names what differs and what to do."""
    partial = tmp_path / "a.partial"
    options = {"device": "cpu", "parts": ("kernels",), "partial": partial, "seconds": 3.0}
    calibrate(tiny_model(), **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"a.partial: .* of another run: shapes.experts was 'h16.ff24.m3.w4' and is 'h16.ff32.m3.w4'; repeat"):
        calibrate(tiny_model().replace(expert_intermediate_size=32), **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="seed was 0 and is 1; repeat its command to go on, or delete the file"):
        calibrate(tiny_model(), seed=1, **options)  # type: ignore[arg-type]
    own = run.fingerprint("cpu")
    monkeypatch.setattr(run, "fingerprint", lambda device: own | {"processor": "another"})
    with pytest.raises(InputError, match=r"machine.processor was .* and is 'another'"):
        calibrate(tiny_model(), **options)  # type: ignore[arg-type]


VERB = ("calibrate", "--hidden", "128", "--expert-intermediate", "32", "--device", "cpu", "--seconds", "4", "--parts", "kernels")


def test_the_verb_keeps_what_it_has_when_it_is_interrupted(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Status 130, a line on how to go on, a partial file; the same command ends with a profile and without that file."""
    out = tmp_path / "made" / "a.profile.json"
    refine = Measurement._refine
    monkeypatch.setattr(Measurement, "_refine", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    done = CliRunner().invoke(app, [*VERB, "--out", str(out)])
    assert done.exit_code == 130
    assert f"what was measured is in {out}.partial, and the same command goes on from there" in done.stderr
    assert not out.exists()
    monkeypatch.setattr(Measurement, "_refine", refine)
    facts = call_json(*VERB, "--out", str(out))
    assert {"breaks", "contention", "tables", "fingerprint"} <= set(facts)
    assert read_profile(out).find("router", "cpu", "h128.e64", "fp32") is not None
    assert not out.with_name("a.profile.json.partial").exists()
    text = call("calibrate", "form", str(out), "grouped_mm", "-o", str(tmp_path / "b.profile.json"))
    assert "grouped_ffn.loop" in text.replace("\n", "") or "report only" in text
    assert read_profile(tmp_path / "b.profile.json").fingerprint["expert_form"] == "grouped_mm"


@pytest.mark.parametrize(("arguments", "message"), [
    (("--seconds", "301"), "--seconds must be at most 300, got 301"),
    (("--parts", "kernel"), "unknown part of a calibration 'kernel'. Did you mean 'kernels'?"),
    (("--out", "."), "--out .: is a folder, not a file"),
    (("--disk", "/nowhere/at/all", "--parts", "files"), "no file can be written for reads in /nowhere/at/all: No such file"),
])
def test_bad_options_are_one_line(arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Status 2, before anything is measured."""
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["calibrate", *arguments])
    assert (done.exit_code, message in done.stderr) == (2, True), done.stderr


# ---------------------------------------------------------------- tables


def test_runs_become_medians_with_their_spread() -> None:
    """Of 1, 2, 3, 4, 5: the median 3, quartiles 2 and 4; one run has no spread."""
    key = TableKey("copy", "x", "", "", ("bytes",))
    table = table_of_runs(key, {(2.0,): [5.0, 1.0, 3.0, 2.0, 4.0], (1.0,): [1.0, 1.0]})
    assert (table.sizes, table.seconds, table.samples) == (((1.0,), (2.0,)), (1.0, 3.0), (2, 5))
    assert table.spread == pytest.approx((0.0, 2 / 3))
    assert table.key == key
    assert table_of_runs(key, {(1.0,): [1.0]}).spread == ()


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
        calibrate(tiny_model(), device="cpu", seconds=1e-6, parts=("kernels",))
    assert torch.get_num_threads() == threads


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(("options", "message"), [
    ({"seconds": 0.0}, "calibrate: seconds must be positive, got 0.0"),
    ({"seconds": float("nan")}, "calibrate: seconds must be positive, got nan"),
    ({"seconds": 1e-3, "parts": ("kernels",)}, r"calibrate: 0.001 s are too few: one pass over \d+ cases"),
    ({"seconds": 300.5}, "calibrate: at most 300 s, got 300.5"),
    ({"parts": ()}, "calibrate: no part to measure; parts: kernels, copies, files, collectives"),
    ({"parts": ("kernel",)}, "unknown part of a calibration 'kernel'. Did you mean 'kernels'"),
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
