"""What is known right after a router, what a rule answers, and the check of an answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from moesim.errors import CheckError, InputError


@dataclass(frozen=True)
class LayerWork:
    """One layer's experts at the instant when its router ends (information level I2); times in integer ns.

    Attributes:
        layer, num_layers: which MoE layer of how many. now: the access number of the run.
        experts: distinct ids, rising. tokens: rows of each.
        resident: whether each is in a slot of the device, or on its way to one.
        gpu_ns: each expert's rows on the device. cpu_ns: on the CPU, without the copies of rows; empty where no CPU
            sees the experts. copy_ns: the rows to the CPU and the results back, together.
        load_ns: one expert's copy over the slowest link of the route.
        shared_ns: the shared expert on the device, which runs first.

    Raises:
        InputError: no experts, experts that do not rise, columns of other lengths, tokens below 1, times below 0, or a
            layer outside the model.
    """

    layer: int
    now: int
    experts: tuple[int, ...]
    tokens: tuple[int, ...]
    resident: tuple[bool, ...]
    gpu_ns: tuple[int, ...]
    cpu_ns: tuple[int, ...]
    copy_ns: tuple[int, ...]
    load_ns: int
    num_layers: int
    shared_ns: int = 0

    def __post_init__(self) -> None:
        if not self.experts or self.experts[0] < 0 or any(a >= b for a, b in zip(self.experts, self.experts[1:], strict=False)):
            raise InputError(f"layer work: experts must be distinct ids that rise, got {list(self.experts)}")
        if not 0 <= self.layer < self.num_layers:
            raise InputError(f"layer work: layer {self.layer} is not one of {self.num_layers}")
        for name in ("tokens", "resident", "gpu_ns", "cpu_ns", "copy_ns"):
            found = len(getattr(self, name))
            if found != len(self.experts) and not (name == "cpu_ns" and found == 0):
                raise InputError(f"layer work: {name} has {found} entries for {len(self.experts)} experts")
        if min(self.tokens) < 1:
            raise InputError(f"layer work: every expert has at least one row, got {list(self.tokens)}")
        if min((*self.gpu_ns, *self.cpu_ns, *self.copy_ns, self.load_ns, self.shared_ns)) < 0:
            raise InputError("layer work: no time may be negative")


@dataclass(frozen=True)
class Assignment:
    """Where each expert of a layer runs, and in which order.

    Attributes:
        gpu: experts on the device, in the order in which it computes them; the absent ones are loaded in this order.
        cpu: experts on the CPU, in order.
        defer: those on the CPU whose result may come one layer later.
        drop: those that are loaded for this use only and not kept.
    """

    gpu: tuple[int, ...]
    cpu: tuple[int, ...]
    defer: frozenset[int] = frozenset()
    drop: frozenset[int] = frozenset()


class MissRule(Protocol):
    """Decides where the experts of a layer run. It keeps no state that a second run could notice."""

    information: ClassVar[str]
    source: ClassVar[str]

    def assign(self, work: LayerWork) -> Assignment:
        """Return an assignment of every expert of `work`; the lists of its columns are not changed."""


def check_assignment(work: LayerWork, assignment: Assignment) -> None:
    """Raise CheckError unless every expert runs exactly once, on a machine part that can run it.

    Also: `defer` names experts of the CPU only, `drop` absent experts of the device only, and without `cpu_ns` nothing
    runs on the CPU.
    """
    placed = [*assignment.gpu, *assignment.cpu]
    if sorted(placed) != list(work.experts):
        raise CheckError(f"layer {work.layer}: experts {list(work.experts)} must each run once, got {placed}")
    if assignment.cpu and not work.cpu_ns:
        raise CheckError(f"layer {work.layer}: experts {list(assignment.cpu)} cannot run on a CPU that does not see them")
    if not assignment.defer <= set(assignment.cpu):
        raise CheckError(f"layer {work.layer}: only experts of the CPU may be deferred, got {sorted(assignment.defer)}")
    loaded = set(assignment.gpu) - set(residents(work))
    if not assignment.drop <= loaded:
        raise CheckError(f"layer {work.layer}: only loaded experts may be dropped, got {sorted(assignment.drop)}")


def residents(work: LayerWork) -> list[int]:
    """Return the resident experts, rising."""
    return [expert for expert, there in zip(work.experts, work.resident, strict=True) if there]


def absentees(work: LayerWork) -> list[int]:
    """Return the absent experts, those of most rows first, then by id: the order in which the simulator loads them."""
    rows = [(-tokens, expert) for expert, tokens, there in zip(work.experts, work.tokens, work.resident, strict=True)
            if not there]
    return [expert for _, expert in sorted(rows)]


def by_expert(work: LayerWork, column: tuple[int, ...]) -> dict[int, int]:
    """Return a column of `work` by expert id."""
    return dict(zip(work.experts, column, strict=True))


def cpu_times(work: LayerWork, rule: str) -> dict[int, int]:
    """Return `cpu_ns` by expert; raises InputError where the CPU does not see the experts."""
    if not work.cpu_ns:
        raise InputError(f"miss rule {rule!r} needs the experts in the CPU's memory")
    return by_expert(work, work.cpu_ns)


def split(work: LayerWork, cpu: set[int]) -> Assignment:
    """Return the assignment with these experts on the CPU: residents first on the device, then `absentees`' order."""
    there = [expert for expert in residents(work) if expert not in cpu]
    loaded = [expert for expert in absentees(work) if expert not in cpu]
    rows = by_expert(work, work.tokens)
    return Assignment((*there, *loaded), tuple(sorted(cpu, key=lambda expert: (-rows[expert], expert))))


def check_not_negative(rule: str, **options: int) -> None:
    """Raise InputError unless every option is an integer of at least 0."""
    for name, value in options.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise InputError(f"miss rule {rule!r}: {name} must be an integer of at least 0, got {value!r}")
