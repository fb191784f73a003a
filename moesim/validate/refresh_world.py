"""Refreshed expert sets for real: slots that a layer computes from, a slow tier that another thread computes from.

One thread stands for the GPU, one for the CPU; a refresh copies whole experts between the two places.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moesim.calibrate.kernels import expert_ffn, wait_until
from moesim.errors import InputError, unknown
from moesim.lowering.refresh import RefreshProblem

WEIGHTS = ("float32", "bfloat16", "int8")


@dataclass(frozen=True)
class RefreshSizes:
    """Layers, experts and their sizes; `weights` is the dtype of the experts (int8: one float32 scale per row of a matrix).

    Raises:
        InputError: a size below 1, or another dtype.
    """

    num_layers: int
    num_experts: int
    hidden_size: int
    expert_intermediate_size: int
    weights: str = "float32"

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_experts", "hidden_size", "expert_intermediate_size"):
            if getattr(self, name) < 1:
                raise InputError(f"refresh: {name} must be at least 1, got {getattr(self, name)}")
        if self.weights not in WEIGHTS:
            raise unknown("dtype of experts", self.weights, WEIGHTS)

    @property
    def expert_params(self) -> int:
        """Weights of one expert."""
        return 3 * self.hidden_size * self.expert_intermediate_size

    @property
    def num_scales(self) -> int:
        """Scales of one expert, one per row of its three matrices; 0 without."""
        return 2 * self.expert_intermediate_size + self.hidden_size if self.weights == "int8" else 0

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert as stored."""
        return self.expert_params * {"float32": 4, "bfloat16": 2, "int8": 1}[self.weights] + 4 * self.num_scales


class RefreshWorld:
    """The experts, the slots, and the two threads' kernels.

    `pool` is uint8[layer * expert, bytes], `slots` uint8[layer * budget, bytes]; every page is written before anything is
    timed. `bytes_per_s` paces copies (None: as fast as memory allows).
    """

    def __init__(self, sizes: RefreshSizes, budget: int, max_tokens: int, *, bytes_per_s: float | None = None,
                 seed: int = 0) -> None:
        import torch

        self.sizes, self.budget, self._rate = sizes, budget, bytes_per_s
        generator = torch.Generator().manual_seed(seed)
        self.pool = torch.empty((sizes.num_layers * sizes.num_experts, sizes.expert_bytes), dtype=torch.uint8)
        for blob in self.pool:
            self._write(blob, torch.randn(sizes.expert_params, generator=generator) / sizes.hidden_size**0.5)
        self.slots = torch.zeros((sizes.num_layers * budget, sizes.expert_bytes), dtype=torch.uint8)
        compute = torch.float32 if sizes.weights == "float32" else torch.bfloat16
        self.rows = torch.randn((max_tokens, sizes.hidden_size), generator=generator).to(compute)

    def _matrices(self, values: Any) -> list[Any]:
        """Return gate, up [width, hidden] and down [hidden, width] of float[params]."""
        hidden, width = self.sizes.hidden_size, self.sizes.expert_intermediate_size
        return [part.view(rows, -1) for part, rows in zip(values.split(hidden * width), (width, width, hidden), strict=True)]

    def _write(self, blob: Any, values: Any) -> None:
        import torch

        if self.sizes.weights != "int8":
            blob.view(getattr(torch, self.sizes.weights)).copy_(values)
            return
        matrices = self._matrices(values)
        scales = torch.cat([matrix.abs().amax(dim=1) / 127 for matrix in matrices])
        steps = torch.cat([(matrix / scale[:, None]).round().flatten() for matrix, scale in
                           zip(matrices, self._split_scales(scales), strict=True)])
        blob[: self.sizes.expert_params].view(torch.int8).copy_(steps.clamp(-127, 127))
        blob[self.sizes.expert_params :].view(torch.float32).copy_(scales)

    def _split_scales(self, scales: Any) -> Sequence[Any]:
        width = self.sizes.expert_intermediate_size
        return scales.split([width, width, self.sizes.hidden_size])

    def expert(self, tokens: int, blob: Any) -> Any:
        """Compute one expert on the first `tokens` rows; returns [tokens, hidden]."""
        import torch

        rows, sizes = self.rows[:tokens], self.sizes
        if sizes.weights != "int8":
            return expert_ffn(rows, blob.view(rows.dtype), sizes.hidden_size, sizes.expert_intermediate_size)
        gate, up, down = self._matrices(blob[: sizes.expert_params].view(torch.int8))
        scales = self._split_scales(blob[sizes.expert_params :].view(torch.float32).to(rows.dtype))
        product = torch._weight_int8pack_mm
        inner = torch.nn.functional.silu(product(rows, gate, scales[0])) * product(rows, up, scales[1])
        return product(inner, down, scales[2])

    def dequantized(self, blob: Any) -> list[Any]:
        """Return an expert's matrices in float32."""
        import torch

        if self.sizes.weights != "int8":
            return self._matrices(blob.view(getattr(torch, self.sizes.weights)).float())
        scales = self._split_scales(blob[self.sizes.expert_params :].view(torch.float32))
        matrices = self._matrices(blob[: self.sizes.expert_params].view(torch.int8).float())
        return [matrix * scale[:, None] for matrix, scale in zip(matrices, scales, strict=True)]

    def copy_in(self, key: int, slot: int) -> None:
        """Copy an expert into a slot."""
        self._copy(self.slots[slot], self.pool[key])

    def copy_out(self, key: int, slot: int) -> None:
        """Copy an expert back to the slow tier."""
        self._copy(self.pool[key], self.slots[slot])

    def _copy(self, target: Any, source: Any) -> None:
        start = time.perf_counter()
        target.copy_(source)
        if self._rate:
            wait_until(start + self.sizes.expert_bytes / self._rate)


class HostThread:
    """A thread that does what it is handed, one call after the other."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True, name="host experts")

    def __enter__(self) -> HostThread:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._work.put(None)
        self._thread.join()

    def start(self, call: Callable[[], None]) -> None:
        """Hand over a call."""
        self._work.put(call)

    def wait(self) -> None:
        """Wait for the oldest call that was not waited for; raises what went wrong in it."""
        error = self._done.get()
        if error is not None:
            raise error

    def _run(self) -> None:
        import torch

        torch.set_num_threads(1)
        while (call := self._work.get()) is not None:
            try:
                call()
                self._done.put(None)
            except BaseException as error:
                self._done.put(error)


@dataclass(frozen=True)
class LayerWork:
    """What a layer does in a pass: moves (expert key in, its slot, key out), then calls of (slot or key, tokens)."""

    moves: tuple[tuple[int, int, int], ...]
    on_gpu: tuple[tuple[int, int], ...]
    on_cpu: tuple[tuple[int, int], ...]


def initial_slots(problem: RefreshProblem) -> dict[int, int]:
    """Return key -> slot of the sets before the first pass, experts in rising order."""
    experts = problem.initial.shape[1]
    return {layer * experts + int(expert): layer * problem.budget + place
            for layer, own in enumerate(problem.initial) for place, expert in enumerate(np.flatnonzero(own))}


def planned_work(problem: RefreshProblem, refresh: np.ndarray) -> list[list[LayerWork]]:
    """Return the work of each pass and layer under a schedule bool[step, layer]; evicted experts make room in rising order."""
    slot_of, resident, passes = initial_slots(problem), problem.initial, []
    for step, counts in enumerate(problem.passes.counts):
        after = np.where(refresh[step][:, None], problem.targets[step], resident)
        passes.append([_layer_work(layer, counts[layer], resident[layer], after[layer], slot_of)
                       for layer in range(problem.num_layers)])
        resident = after
    return passes


def _layer_work(layer: int, counts: np.ndarray, before: np.ndarray, after: np.ndarray,
                slot_of: dict[int, int]) -> LayerWork:
    first = layer * len(counts)
    moves = []
    for new, old in zip(np.flatnonzero(after & ~before).tolist(), np.flatnonzero(before & ~after).tolist(), strict=True):
        slot_of[first + new] = slot_of.pop(first + old)
        moves.append((first + new, slot_of[first + new], first + old))
    used = np.flatnonzero(counts).tolist()
    return LayerWork(
        tuple(moves), tuple((slot_of[first + expert], int(counts[expert])) for expert in used if after[expert]),
        tuple((first + expert, int(counts[expert])) for expert in used if not after[expert]))


def run_layer(world: RefreshWorld, host: HostThread, work: LayerWork, *, write_back: bool, overlap: bool) -> None:
    """Refresh, then compute both sides: at once, or the CPU's after the GPU's."""
    for key, slot, old in work.moves:
        if write_back:
            world.copy_out(old, slot)
        world.copy_in(key, slot)
    if overlap and work.on_cpu:
        host.start(lambda: compute(world, work.on_cpu, world.pool))
    compute(world, work.on_gpu, world.slots)
    if not work.on_cpu:
        return
    if not overlap:
        host.start(lambda: compute(world, work.on_cpu, world.pool))
    host.wait()


def compute(world: RefreshWorld, calls: Sequence[tuple[int, int]], blobs: Any) -> None:
    """Make one side's calls."""
    import torch

    with torch.inference_mode():
        for place, tokens in calls:
            world.expert(tokens, blobs[place])
