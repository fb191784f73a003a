"""Which rows belong together, and which break a rule: loops over the rows of a trace."""

from __future__ import annotations

import numba
import numpy as np

_GOLDEN = 2654435769  # 2^32 / golden ratio (Knuth, The Art of Computer Programming 3, section 6.4)
_WORD = 0xFFFFFFFF


@numba.njit(cache=True, nogil=True)
def first_wrong(ids: np.ndarray, num_experts: int, stamp: np.ndarray) -> int:
    """Return the first ``token * layers + layer`` with an id outside -1 ... E - 1 or one named twice; -1: none.

    `stamp` int64[expert] starts as zeros.
    """
    mark = 0
    for token in range(ids.shape[0]):
        for layer in range(ids.shape[1]):
            mark += 1
            for pick in range(ids.shape[2]):
                expert = ids[token, layer, pick]
                if expert == -1:
                    continue
                if expert < 0 or expert >= num_experts or stamp[expert] == mark:
                    return token * ids.shape[1] + layer
                stamp[expert] = mark
    return -1


@numba.njit(cache=True, nogil=True)
def find_or_add(keys: np.ndarray, places: np.ndarray, shift: int, values: np.ndarray, known: np.ndarray,
                num_known: int, out: np.ndarray) -> int:
    """Set `out` to the index of each value, new ones in order of appearance; return how many are known.

    Open addressing with linear probing; `places` int64[2^(32 - shift)] is -1 where free, `known` int64[index] has
    room for all.
    """
    mask = len(keys) - 1
    for row in range(len(values)):
        value = values[row]
        if row and value == values[row - 1]:
            out[row] = out[row - 1]
            continue
        at = ((value * _GOLDEN) & _WORD) >> shift
        while places[at] >= 0 and keys[at] != value:
            at = (at + 1) & mask
        if places[at] < 0:
            keys[at], places[at] = value, num_known
            known[num_known] = value
            num_known += 1
        out[row] = places[at]
    return num_known


@numba.njit(cache=True, nogil=True)
def tally(index: np.ndarray, rows: np.ndarray, positions: np.ndarray, count: np.ndarray, last_row: np.ndarray,
          last_position: np.ndarray, broken: np.ndarray) -> None:
    """Count the rows of each group, keep its last row and position, and note the first jump of a position.

    `broken` int64[4] = row, index, position before, position there; row -1: none so far.
    """
    for at in range(len(index)):
        group = index[at]
        if count[group] and positions[at] != last_position[group] + 1 and broken[0] < 0:
            broken[0], broken[1], broken[2], broken[3] = rows[at], group, last_position[group], positions[at]
        count[group] += 1
        last_row[group] = rows[at]
        last_position[group] = positions[at]


@numba.njit(cache=True, nogil=True)
def assign_slots(index: np.ndarray, rows: np.ndarray, last_row: np.ndarray, slot_of: np.ndarray, free: np.ndarray,
                 state: np.ndarray, out: np.ndarray) -> None:
    """Set `out` to the slot of each row's group; a group holds its slot from its first row to its last.

    `slot_of` int32[group] is -1 before the first row; `free` int64[slot] is a stack of slots handed back; `state` int64[2]
    = slots on the stack, slots ever used.
    """
    for at in range(len(index)):
        group = index[at]
        slot = slot_of[group]
        if slot < 0:
            if state[0]:
                state[0] -= 1
                slot = free[state[0]]
            else:
                slot = state[1]
                state[1] += 1
            slot_of[group] = slot
        out[at] = slot
        if rows[at] == last_row[group]:
            free[state[0]] = slot
            state[0] += 1
