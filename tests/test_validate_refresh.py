"""Refreshed expert sets for real: the right experts from the right place, prices of the simulator, low-bit experts."""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from moesim.errors import CheckError, InputError  # noqa: E402
from moesim.lowering.refresh import run_schedule  # noqa: E402
from moesim.lowering.refresh_policies import FixedInterval  # noqa: E402
from moesim.traces.denoise import DenoiseSettings, denoise_trace  # noqa: E402
from moesim.traces.denoise_passes import DenoisePasses, denoise_passes  # noqa: E402
from moesim.validate.refresh_run import RefreshTimes, _Session, validate_refresh  # noqa: E402
from moesim.validate.refresh_world import (  # noqa: E402
    WEIGHTS,
    HostThread,
    RefreshSizes,
    RefreshWorld,
    initial_slots,
    planned_work,
    run_layer,
)

LAYERS, EXPERTS, BUDGET = 2, 12, 5
SETTINGS = DenoiseSettings(1, LAYERS, num_experts=EXPERTS, top_k=3, blocks_per_request=2, block_size=6, prompt_tokens=4)


def some_passes(seed: int = 0) -> DenoisePasses:
    """Two blocks of six tokens."""
    return denoise_passes(denoise_trace(SETTINGS, seed=seed))


def session_of(weights: str = "float32", *, overlap: bool = True, write_back: bool = False, seed: int = 0) -> _Session:
    """A world of small experts and the passes that run in it."""
    passes = some_passes(seed)
    world = RefreshWorld(RefreshSizes(LAYERS, EXPERTS, 32, 16, weights), BUDGET, int(passes.counts.max()))
    return _Session(world, passes, BUDGET, overlap, write_back)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), tau=st.integers(1, 6))
def test_the_real_run_does_what_the_simulator_counts(seed: int, tau: int) -> None:
    """Moves, calls and their tokens on either side are those of `run_schedule`, pass by pass and layer by layer."""
    session = session_of(seed=seed)
    problem = session.problem(session._free())
    refresh = FixedInterval(tau).schedule(problem)
    counted = run_schedule(problem, refresh)
    for step, layers in enumerate(planned_work(problem, refresh)):
        for layer, work in enumerate(layers):
            assert len(work.moves) == counted.promotions[step, layer] == counted.demotions[step, layer]
            assert len(work.on_cpu) == counted.misses[step, layer]
            assert sum(tokens for _, tokens in work.on_cpu) == counted.miss_tokens[step, layer]
            calls = Counter(tokens for _, tokens in (*work.on_gpu, *work.on_cpu))
            assert calls == Counter(session.passes.counts[step, layer][session.passes.counts[step, layer] > 0].tolist())


class Watched(RefreshWorld):
    """A world that notes which expert each call reads, by its bytes, and on which thread."""

    def __init__(self, world: RefreshWorld) -> None:
        self.__dict__ |= world.__dict__
        self._keys = {bytes(blob.numpy().tobytes()): key for key, blob in enumerate(world.pool)}
        self.calls: dict[str, list[tuple[int, int]]] = defaultdict(list)
        self.copies: Counter[str] = Counter()

    def expert(self, tokens: int, blob: Any) -> Any:
        """Note the expert, then compute it."""
        self.calls[threading.current_thread().name].append((self._keys[blob.numpy().tobytes()], tokens))
        return super().expert(tokens, blob)

    def copy_in(self, key: int, slot: int) -> None:
        """Count."""
        self.copies["in"] += 1
        super().copy_in(key, slot)

    def copy_out(self, key: int, slot: int) -> None:
        """Count."""
        self.copies["out"] += 1
        super().copy_out(key, slot)


@pytest.mark.parametrize(("overlap", "write_back"), [(True, False), (False, True)])
@pytest.mark.parametrize("tau", [1, 3, 50])
def test_every_call_reads_its_own_expert_on_its_own_thread(overlap: bool, write_back: bool, tau: int) -> None:
    """By the bytes that are read: all used experts, each once per pass; those outside the set on the host's thread."""
    session = session_of(overlap=overlap, write_back=write_back)
    problem = session.problem(session._free())
    refresh = FixedInterval(tau).schedule(problem)
    world = Watched(session.world)
    for key, slot in initial_slots(problem).items():
        world.slots[slot].copy_(world.pool[key])
    resident = problem.initial
    with HostThread() as host:
        for step, layers in enumerate(planned_work(problem, refresh)):
            resident = np.where(refresh[step][:, None], problem.targets[step], resident)
            world.calls.clear()
            for work in layers:
                run_layer(world, host, work, write_back=write_back, overlap=overlap)
            for name, side in (("host experts", ~resident), (threading.current_thread().name, resident)):
                wanted = np.where(side, session.passes.counts[step], 0).ravel()
                assert sorted(world.calls[name]) == [(key, int(wanted[key])) for key in np.flatnonzero(wanted).tolist()]
    moved = int(run_schedule(problem, refresh).promotions.sum())
    assert world.copies == Counter({"in": moved, **({"out": moved} if write_back else {})})


@pytest.mark.parametrize("weights", WEIGHTS)
def test_an_expert_of_each_dtype_is_a_swiglu_of_its_matrices(weights: str) -> None:
    """Against float32 products of the stored matrices: exact to float32, or to what bfloat16 rows can hold."""
    world = session_of(weights).world
    rows = world.rows[:4].float()
    gate, up, down = world.dequantized(world.pool[7])
    exact = (torch.nn.functional.silu(rows @ gate.T) * (rows @ up.T)) @ down.T
    error = (world.expert(4, world.pool[7]).float() - exact).abs().max() / exact.abs().max()
    assert error < (1e-5 if weights == "float32" else 0.02)
    assert not torch.equal(world.pool[7], world.pool[8])


def test_low_bit_experts_are_the_same_experts_rounded() -> None:
    """int8 keeps each weight within half a step of its row's scale; the bytes are those of the sizes."""
    plain, low = session_of("float32").world, session_of("int8").world
    for whole, rounded in zip(plain.dequantized(plain.pool[3]), low.dequantized(low.pool[3]), strict=True):
        step = whole.abs().amax(dim=1, keepdim=True) / 127
        assert ((whole - rounded).abs() <= step * 0.5001).all()
        assert (whole != rounded).any()
    assert low.sizes.expert_bytes == 3 * 32 * 16 + 4 * (2 * 16 + 32)
    assert low.pool.shape == (LAYERS * EXPERTS, low.sizes.expert_bytes)


@pytest.mark.parametrize(("overlap", "write_back"), [(True, False), (False, False), (False, True)])
def test_a_prediction_is_the_simulators_price_of_the_measured_calls(overlap: bool, write_back: bool) -> None:
    """With made-up times, added up by hand from the calls and moves of each pass: max or sum of the sides, plus handing over."""
    session = session_of(overlap=overlap, write_back=write_back)
    times = RefreshTimes()
    for tokens in session.token_sizes:
        for table in (times.alone, times.beside):
            table["gpu", tokens], table["cpu", tokens] = [tokens * 1e-6], [1e-5 + tokens * 3e-6]
    times.alone["in", 0], times.alone["out", 0], times.alone["hand", 0] = [5e-5], [2e-5], [4e-6]
    problem = session.problem(session._free())
    by_hand = []
    for layers in planned_work(problem, FixedInterval(2).schedule(problem)):
        total = 0
        for work in layers:
            gpu = sum(1000 * tokens for _, tokens in work.on_gpu)
            cpu = sum(10_000 + 3000 * tokens for _, tokens in work.on_cpu)
            total += max(gpu, cpu) if overlap else gpu + cpu
            total += len(work.moves) * (50_000 + 20_000 * write_back) + 4000 * bool(work.on_cpu)
        by_hand.append(total)
    assert session.predict(2, times) * 1e9 == pytest.approx(by_hand)


def test_calls_beside_the_other_thread_cost_their_share() -> None:
    """With the other thread busy all the time a call has the price that it has beside it, on the other side half of each."""
    session = session_of()
    times = RefreshTimes()
    for tokens in session.token_sizes:
        times.alone["gpu", tokens], times.beside["gpu", tokens] = [1e-6], [2e-6]
        times.alone["cpu", tokens], times.beside["cpu", tokens] = [1e-3], [3e-3]
    times.alone["in", 0], times.alone["out", 0] = [1e-6], [1e-6]
    costs = session._costs(times, {"gpu": 1.0, "cpu": 0.5})
    assert set(costs.gpu_ns[1:].tolist()) == {2000}
    assert set(costs.cpu_ns[1:].tolist()) == {2_000_000}


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_validation_compares_every_interval(weights: str) -> None:
    """Rows in the order given, finite errors, counts of the schedule, and a rank correlation."""
    sizes = RefreshSizes(LAYERS, EXPERTS, 32, 16, weights)
    found = validate_refresh(some_passes(), sizes, BUDGET, intervals=(1, 2, 4, 9), repeats=1, rounds=2)
    assert found.rows["tau"].tolist() == [1, 2, 4, 9]
    assert np.isfinite(found.rows.to_numpy(dtype=float)).all()
    assert (found.rows[["predicted_s", "measured_s"]] > 0).all(axis=None)
    assert found.rows["refreshes"].is_monotonic_decreasing
    assert -1 <= found.kendall_tau <= 1
    assert not any(thread.name == "host experts" for thread in threading.enumerate())


def test_writing_back_leaves_the_slow_tier_as_it_was() -> None:
    """An evicted expert comes back as it went; the check behind it sees one that does not."""
    session = session_of(write_back=True)
    with HostThread() as host:
        session.run(host, 1)
        session.world.copy_out = lambda key, slot: session.world.pool[key].add_(1)  # type: ignore[method-assign]
        with pytest.raises(CheckError, match=r"does not hold expert|writing back changed an expert"):
            session.run(host, 1)


def test_a_copy_that_goes_wrong_is_seen() -> None:
    """A slot with one other byte ends the run."""
    session = session_of()
    copy_in = session.world.copy_in

    def wrong(key: int, slot: int) -> None:
        copy_in(key, slot)
        session.world.slots[slot, 3] += 1

    session.world.copy_in = wrong  # type: ignore[method-assign]
    with HostThread() as host, pytest.raises(CheckError, match=r"after the run slot \d+ does not hold expert \(\d+, \d+\)"):
        session.run(host, 1)


def test_an_error_on_the_other_thread_is_raised() -> None:
    """And the thread goes on to serve the next call."""
    def fail() -> None:
        raise ValueError("no")

    with HostThread() as host:
        host.start(fail)
        with pytest.raises(ValueError, match="no"):
            host.wait()
        host.start(lambda: None)
        host.wait()


@pytest.mark.parametrize(("change", "message"), [
    ({"sizes": RefreshSizes(3, EXPERTS, 8, 8)}, "passes have 2 layers of 12 experts, the sizes 3 of 12"),
    ({"budget": 13}, "budget must be 1 ... 12 experts per layer, got 13"),
    ({"intervals": (2,)}, "two or more different intervals"),
    ({"intervals": (2, 2)}, "two or more different intervals"),
    ({"intervals": (0, 2)}, "two or more different intervals"),
    ({"repeats": 0}, "repeats must be at least 1"),
])
def test_what_is_refused(change: dict[str, Any], message: str) -> None:
    """The message says what was expected."""
    given_values = {"sizes": RefreshSizes(LAYERS, EXPERTS, 8, 8), "budget": BUDGET, **change}
    with pytest.raises(InputError, match=message):
        validate_refresh(some_passes(), **given_values)


def test_sizes_are_checked() -> None:
    """A dtype that is none, with a suggestion; a size of zero."""
    with pytest.raises(InputError, match=r"dtype of experts.*'int9'\. Did you mean 'int8'"):
        RefreshSizes(1, 1, 1, 1, "int9")
    with pytest.raises(InputError, match="hidden_size must be at least 1, got 0"):
        RefreshSizes(1, 1, 0, 1)
