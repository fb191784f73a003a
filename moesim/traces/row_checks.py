"""The rules of a trace, checked batch by batch: `RoutingTrace` checks the same ones on a trace in memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from moesim.errors import InputError, unknown
from moesim.traces.groups import Groups
from moesim.traces.trace import DENOISE, PAD, PHASES

_MAX_EXPERTS = 1 << 15  # ids are int16
SMALL_COLUMNS = ("request_id", "position", "phase", "step")


@dataclass(frozen=True)
class RowIndex:
    """What is known of the rows of a phase after one look at the small columns.

    Attributes:
        requests: their rows by request, in order of first appearance.
        steps: the same by step; empty unless asked for.
        num_rows: rows of the phase.
    """

    requests: Groups
    steps: Groups
    num_rows: int


def check_ids(expert_ids: np.ndarray, num_experts: int, first_row: int) -> None:
    """Raise InputError for an expert id out of range, or named twice by one token in one layer.

    Args:
        expert_ids: int16[token, layer, k], writable and contiguous.
        first_row: the file row of the first token, for the message.
    """
    from moesim.traces.kernels.rows import first_wrong

    place = first_wrong(expert_ids, num_experts, np.zeros(min(num_experts, _MAX_EXPERTS), np.int64))
    if place < 0:
        return
    token, layer = divmod(place, expert_ids.shape[1])
    found = expert_ids[token, layer]
    outside = found[(found < PAD) | (found >= num_experts)]
    if len(outside):
        raise InputError(f"trace: expert id {outside[0]} at token {first_row + token}, layer {layer} is outside "
                         f"0 ... {num_experts - 1}")
    raise InputError(f"trace: token {first_row + token}, layer {layer} names an expert twice: {found.tolist()}")


def check_phases(phase: np.ndarray, first_row: int) -> None:
    """Raise InputError for a phase that is not an index into `PHASES`."""
    wrong = np.flatnonzero((phase < 0) | (phase >= len(PHASES)))
    if len(wrong):
        raise InputError(f"trace: phase {phase[wrong[0]]} at row {first_row + wrong[0]}; "
                         f"phase must be 0 ... {len(PHASES) - 1} ({', '.join(PHASES)})")


class RowIndexer:
    """Takes the small columns of a trace batch by batch, checks them, and makes the index of one phase.

    Args:
        phase: "all" or one of `PHASES`.
        with_steps: whether steps are to be indexed too.

    Raises:
        InputError: an unknown phase.
    """

    def __init__(self, phase: str, with_steps: bool = False) -> None:
        if phase != "all" and phase not in PHASES:
            raise unknown("phase", phase, ("all", *PHASES))
        self.phase, self.with_steps = phase, with_steps
        self._rows_of_phase = np.zeros(len(PHASES), np.int64)
        self._whole, self._steps = Groups(), Groups()
        self._part = self._whole if phase == "all" else Groups()
        self._num_rows = 0

    def add(self, columns: dict[str, np.ndarray]) -> None:
        """Take the next rows: `SMALL_COLUMNS`, one entry per row; raises InputError for a phase out of range."""
        phase = columns["phase"]
        check_phases(phase, self._num_rows)
        rows = np.arange(self._num_rows, self._num_rows + len(phase))
        self._num_rows += len(phase)
        self._rows_of_phase += np.bincount(phase, minlength=len(PHASES))
        self._whole.add(columns["request_id"], rows, columns["position"])
        chosen = chosen_rows(phase, self.phase)
        if self._part is not self._whole:
            self._part.add(columns["request_id"][chosen], rows[chosen], columns["position"][chosen])
        if self.with_steps:
            self._steps.add(columns["step"][chosen], rows[chosen], rows[chosen])

    def check(self) -> None:
        """Raise InputError where a position does not follow the one before it in its request, in the whole trace.

        A denoising step visits the same positions again: a trace with one may hold positions in any order.
        """
        if not self._rows_of_phase[DENOISE]:
            _check_positions(self._whole)

    def result(self) -> RowIndex:
        """Return the index; raises InputError where the phase has no rows, or its positions do not rise by one."""
        if self.phase == "all":
            return RowIndex(self._whole, self._steps, self._num_rows)
        number = PHASES.index(self.phase)
        if not self._rows_of_phase[number]:
            present = ", ".join(PHASES[i] for i in np.flatnonzero(self._rows_of_phase))
            raise InputError(f"the trace has no {self.phase} rows (only {present})")
        if number != DENOISE:
            _check_positions(self._part)
        return RowIndex(self._part, self._steps, int(self._rows_of_phase[number]))


def chosen_rows(phase: np.ndarray, name: str) -> slice | np.ndarray:
    """Return the rows of a phase as an index: all of them for "all", else a mask."""
    return slice(None) if name == "all" else phase == PHASES.index(name)


def check_rows(batches: Iterable[dict[str, np.ndarray]]) -> None:
    """Raise InputError unless the small columns of a whole trace keep the rules."""
    indexer = RowIndexer("all")
    for columns in batches:
        indexer.add(columns)
    indexer.check()


def _check_positions(requests: Groups) -> None:
    row, group, before, there = requests.broken.tolist()
    if row >= 0:
        raise InputError(f"trace: request {requests.ids[group]} goes from position {before} to {there} at row {row}; "
                         f"positions of a request must rise by one")
