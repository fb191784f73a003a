"""What the compiled replays and their callers share: codes, rows, and where a key stands; no compiler is needed.

The state of a replay is one array, int64[row, index]: one argument that compiled functions pass on at no cost, where
a tuple of arrays costs reference counts in every inner call. An expert stands at index ``layer * row_width + expert``;
`row_width` is the number of experts (one pool for all) or that number rounded up to whole blocks (a pool per layer), so
that each pool is a run of blocks of 64 indices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moesim.cache.policies.belady import BeladyBypassPolicy, BeladyPolicy
from moesim.cache.policies.lfu import LfuPolicy, LfuResidentPolicy
from moesim.cache.policies.lru import LruPolicy
from moesim.cache.policies.static import StaticPolicy
from moesim.cache.policy import AccessStream

# Codes of the policies that have a compiled form. A new ranked one: a code here, its branches in kernels/worth.py.
LRU, LFU, LFU_RESIDENT, BELADY, BELADY_BYPASS, STATIC = range(6)
CODES: dict[object, int] = {
    LruPolicy: LRU, LfuPolicy: LFU, LfuResidentPolicy: LFU_RESIDENT, BeladyPolicy: BELADY,
    BeladyBypassPolicy: BELADY_BYPASS, StaticPolicy: STATIC}
NEED_FUTURE = (BELADY, BELADY_BYPASS)

# Rows of the state. By index: RANK, SIZE (bytes, or 1), COUNT (uses), SEEN, ADMITTED (0 or 1). By block: LOW, at most the
# lowest rank of the block. By pool: FREE (bytes or slots). MISSED, CHOSEN, CHOSEN_RANK: scratch of one access.
RANK, SIZE, COUNT, SEEN, ADMITTED, LOW, FREE, MISSED, CHOSEN, CHOSEN_RANK = range(10)
NUM_STATE_ROWS = 10

# Rows of the counts, int64[row, layer].
MISSES, COLD, COLD_IN_FREE, EVICTIONS, BYPASSES = range(5)
NUM_TALLY_ROWS = 5

# A resident's rank is ``worth * 64 + index % 64``; those of absent experts, and of experts in use, lie above all.
BLOCK_BITS = 6
BLOCK = 1 << BLOCK_BITS
ABSENT = 1 << 62
IN_USE = ABSENT - 1
# A worth of LFU is a count above an access index; each has this many bits, so that ranks stay below IN_USE.
ACCESS_BITS = 28
MAX_ACCESSES, MAX_USES = (1 << ACCESS_BITS) - 1, (1 << 31) - 1
# Worth of an expert whose next use is at position p: SOON - p, above every access index.
SOON = 1 << 33


@dataclass(frozen=True)
class Layout:
    """Where the state of a replay keeps each key."""

    num_layers: int
    num_experts: int
    shared: bool

    @property
    def row_width(self) -> int:
        """Indices of one layer."""
        return self.num_experts if self.shared else _whole_blocks(self.num_experts)

    @property
    def num_indices(self) -> int:
        """Indices of all layers, in whole blocks."""
        return _whole_blocks(self.row_width * self.num_layers)

    @property
    def num_pools(self) -> int:
        """One, or one per layer."""
        return 1 if self.shared else self.num_layers

    @property
    def pool_blocks(self) -> int:
        """Blocks of 64 indices of one pool."""
        return self.num_indices // BLOCK // self.num_pools

    def indices(self, keys: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return int64[...], where these keys are kept."""
        layer, expert = np.divmod(np.asarray(keys, dtype=np.int64), self.num_experts)
        return layer * self.row_width + expert

    def empty_state(self) -> np.ndarray:
        """Return int64[row, index]: nobody resident, nothing free, all admitted, each of size 1."""
        state = np.zeros((NUM_STATE_ROWS, self.num_indices), np.int64)
        state[RANK], state[LOW], state[SIZE], state[ADMITTED] = ABSENT, ABSENT, 1, 1
        return state

    def rank(self, state: np.ndarray, indices: np.ndarray, worth: np.ndarray) -> None:
        """Make these residents, worth int64[...]."""
        state[RANK, indices] = (worth << BLOCK_BITS) | (indices % BLOCK)
        np.minimum.at(state[LOW], indices // BLOCK, state[RANK, indices])

    def next_uses(self, stream: AccessStream) -> tuple[np.ndarray, np.ndarray]:
        """Return int32[use], the position of the expert's next use (-1: none), and int64[index], that of its first."""
        from moesim.cache.kernels.next_use import next_uses

        upcoming, first = np.empty(len(stream.experts), np.int32), np.empty(self.num_indices, np.int64)
        next_uses(stream.layers, stream.offsets, stream.experts, self.row_width, first, upcoming)
        return upcoming, first


def _whole_blocks(number: int) -> int:
    return -(-number // BLOCK) * BLOCK
