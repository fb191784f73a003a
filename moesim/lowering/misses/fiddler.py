"""Fiddler: for each absent expert alone, the CPU or a load, whichever is estimated to take less time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moesim.lowering.misses.rule import (
    Assignment,
    LayerWork,
    absentees,
    by_expert,
    check_not_negative,
    cpu_times,
    split,
)


@dataclass(frozen=True)
class FiddlerRule:
    """The paper's rule (arXiv 2402.07033, sec. 3.3): an absent expert runs on the CPU if cpu < load + gpu.

    The copies of rows are neglected, as in the paper. A tie goes to the device, as in the released code.
    """

    information: ClassVar[str] = "I2"
    source: ClassVar[str] = "Fiddler, arXiv 2402.07033"

    def assign(self, work: LayerWork) -> Assignment:
        """Return the split; residents stay on the device."""
        cpu, gpu = cpu_times(work, "fiddler"), by_expert(work, work.gpu_ns)
        return split(work, {expert for expert in absentees(work) if cpu[expert] < work.load_ns + gpu[expert]})


@dataclass(frozen=True)
class FiddlerRepositoryRule:
    """The released code's rule (efeslab/fiddler, mixtral.py), with its placeholder constants.

    It costs a row on the CPU at `cpu_per_token`, a load with its computation at `load`, and a resident expert at nothing,
    and looks through all 2^E splits for the least **sum**, though its comment asks for the least maximum. The least sum
    is the least of each expert alone, which is what is computed here. So at 7 and 70 an absent expert of 10 rows or more
    is loaded. The numbers have no unit; only their ratio counts.
    """

    cpu_per_token: int = 7
    load: int = 70
    information: ClassVar[str] = "I2"
    source: ClassVar[str] = "efeslab/fiddler"

    def __post_init__(self) -> None:
        check_not_negative("fiddler-repository", cpu_per_token=self.cpu_per_token, load=self.load)

    def assign(self, work: LayerWork) -> Assignment:
        """Return the split; residents stay on the device."""
        cpu_times(work, "fiddler-repository")
        rows = by_expert(work, work.tokens)
        return split(work, {expert for expert in absentees(work) if self.cpu_per_token * rows[expert] < self.load})
