"""What a cost is asked for: work in flops, bytes and tokens. No experts here: an expert layer is `groups`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

SOURCES = ("measured", "interpolated", "extrapolated", "nameplate", "stated")


class Cost(NamedTuple):
    """Seconds, and where they come from (one of `SOURCES`)."""

    seconds: float
    source: str


@dataclass(frozen=True)
class DenseWork:
    """One dense operation over `tokens` rows.

    `op` and `shape` name the row of a calibration table (``attention``, ``h512.heads8``); without one,
    `flops` and `num_bytes` (weights and cache read, activations) go through the roofline. `context` is
    the summed number of cached tokens that the rows attend to (0: not an attention).
    """

    op: str
    shape: str
    tokens: int
    flops: float
    num_bytes: float
    dtype: str
    context: int = 0


@dataclass(frozen=True)
class GroupedWork:
    """A feed-forward over `tokens` rows in `groups` groups, each with weights of its own.

    `largest_group` is the row count of the fullest group. `bytes_per_group` are the weights of a group,
    `flops_per_token` those of one row, `bytes_per_token` the activations read and written for one row.
    """

    shape: str
    tokens: int
    groups: int
    largest_group: int
    bytes_per_group: float
    flops_per_token: float
    bytes_per_token: float
    dtype: str
