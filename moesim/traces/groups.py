"""Rows grouped by a number that they carry (request or step), met batch by batch."""

from __future__ import annotations

import numpy as np

_FIRST_BITS = 6
_WORD_BITS = 32


def grown(array: np.ndarray, size: int, fill: int = 0) -> np.ndarray:
    """Return `array` with at least `size` entries on its first axis, doubled when it grows; new ones hold `fill`."""
    if len(array) >= size:
        return array
    wider = np.full((max(size, 2 * len(array)), *array.shape[1:]), fill, array.dtype)
    wider[:len(array)] = array
    return wider


class Groups:
    """Numbers in order of first appearance, and what is known of the rows of each.

    Attributes:
        size: distinct numbers met.
        broken: int64[4], the first row (file row, group, position before, position there) whose position does not
            follow that of the row before it in its group; the row is -1 where there is none.
    """

    def __init__(self) -> None:
        self.size = 0
        self.broken = np.full(4, -1, np.int64)
        self._ids = np.zeros(0, np.int64)
        self._count = np.zeros(0, np.int64)
        self._last_row = np.zeros(0, np.int64)
        self._last_position = np.zeros(0, np.int64)
        self._make_table(_FIRST_BITS)

    @property
    def ids(self) -> np.ndarray:
        """int32[group], the number of each group."""
        return self._ids[:self.size].astype(np.int32)

    @property
    def count(self) -> np.ndarray:
        """int64[group], rows."""
        return self._count[:self.size]

    @property
    def last_row(self) -> np.ndarray:
        """int64[group], file row of the last row."""
        return self._last_row[:self.size]

    def index(self, values: np.ndarray) -> np.ndarray:
        """Return int64[row], the group of each value; a new value makes a new group."""
        from moesim.traces.kernels.rows import find_or_add

        self._make_room(self.size + len(values))
        out = np.empty(len(values), np.int64)
        self.size = find_or_add(self._keys, self._places, self._shift, np.array(values, np.int64), self._ids,
                                self.size, out)
        return out

    def add(self, values: np.ndarray, rows: np.ndarray, positions: np.ndarray) -> None:
        """Count rows: the number, file row and position of each (any constant where positions do not matter)."""
        from moesim.traces.kernels.rows import tally

        index = self.index(values)
        tally(index, np.array(rows, np.int64), np.array(positions, np.int64), self._count, self._last_row,
              self._last_position, self.broken)

    def _make_room(self, size: int) -> None:
        for name in ("_ids", "_count", "_last_row", "_last_position"):
            setattr(self, name, grown(getattr(self, name), size))
        if 2 * size > len(self._keys):
            self._make_table((2 * size - 1).bit_length())

    def _make_table(self, bits: int) -> None:
        """Make a hash table of 2^bits places and put the known numbers into it."""
        from moesim.traces.kernels.rows import find_or_add

        self._shift = _WORD_BITS - bits
        self._keys, self._places = np.zeros(1 << bits, np.int64), np.full(1 << bits, -1, np.int64)
        known = self._ids[:self.size].copy()
        find_or_add(self._keys, self._places, self._shift, known, self._ids, 0, np.empty(len(known), np.int64))


class Slots:
    """A slot of state for each open group: from its first row to its last, then free for another.

    Attributes:
        used: slots ever held at once, so the largest number of open groups.
    """

    def __init__(self, last_row: np.ndarray) -> None:
        self._last_row = np.array(last_row, np.int64)
        self._slot_of = np.full(len(last_row), -1, np.int32)
        self._free = np.zeros(0, np.int64)
        self._state = np.zeros(2, np.int64)

    @property
    def used(self) -> int:
        """Slots ever held at once."""
        return int(self._state[1])

    def assign(self, index: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return int64[row], the slot of each row's group; `rows` are file rows, rising."""
        from moesim.traces.kernels.rows import assign_slots

        self._free = grown(self._free, self.used + len(index))
        out = np.empty(len(index), np.int64)
        assign_slots(index, rows, self._last_row, self._slot_of, self._free, self._state, out)
        return out
