"""ExpertVersions: the bit widths in which a model's experts exist, and the bytes of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from moesim.errors import InputError
from moesim.model.spec import ModelSpec

ABSENT_LEVEL = -1  # no version at all: not resident, or skipped
FLOAT_BITS = 16  # from this width on weights are floats and carry no group scales


@dataclass(frozen=True)
class Quantization:
    """What groups of integer weights carry beside their bits; weights of 16 bits or more carry nothing.

    `group_size`: weights of one row that share a scale (None: a whole row, "channel-wise", as EdgeMoE does). `scale_bits` and
    `zero_bits`: of one group's scale and zero point (0: symmetric). A plane on top of a narrower version has a scale and no
    zero point (D2MoE, arXiv 2504.15299: a residual of +-1 with a scale of its own; groups of 128).

    Raises:
        InputError: a group below one weight, or negative bits.
    """

    group_size: int | None = 128
    scale_bits: int = 16
    zero_bits: int = 16

    def __post_init__(self) -> None:
        if self.group_size is not None and self.group_size < 1:
            raise InputError(f"quantization: group_size must be at least 1, got {self.group_size}")
        if self.scale_bits < 0 or self.zero_bits < 0:
            raise InputError(f"quantization: scale_bits and zero_bits must not be negative, got {self.scale_bits} and "
                             f"{self.zero_bits}")

    def num_groups(self, model: ModelSpec) -> int:
        """Return the groups of one routed expert: rows of its matrices, each cut into groups."""
        width, inner = model.expert_width, model.expert_intermediate_size
        return (model.matrices - 1) * inner * self._per_row(width) + width * self._per_row(inner)

    def num_bytes(self, model: ModelSpec, bits: int, *, plane: bool = False) -> int:
        """Return the bytes of one expert of `bits` per weight, or of a plane that adds `bits`.

        A width that is the model's own takes what the model says (``model.expert_bytes``).
        """
        if not plane and bits == 8 * model.weight_bytes:
            return model.expert_bytes
        weights = _whole_bytes(model.expert_params * bits)
        if bits >= FLOAT_BITS:
            return weights
        return weights + _whole_bytes(self.num_groups(model) * (self.scale_bits + (0 if plane else self.zero_bits)))

    def _per_row(self, length: int) -> int:
        return 1 if self.group_size is None else -(-length // self.group_size)


CHANNEL_WISE = Quantization(group_size=None, zero_bits=0)  # "channel-wise linear": EdgeMoE, arXiv 2308.14352


@dataclass(frozen=True)
class ExpertVersions:
    """The versions of one expert (all experts are alike). A level is an index into `bits`; -1 is no version.

    Attributes:
        bits: bits per weight of each level, rising.
        part_bytes: exclusive: bytes of the copy at each level. Nested: bytes of the plane that raises the level below to it.
        nested: whether a version is the one below plus a plane (D2MoE) or a copy of its own (HOBBIT, EdgeMoE).
        on_slow_tier: the levels that lie there (None: all); of nested ones, those from 0 on.

    Raises:
        InputError: no level, widths that do not rise, bytes below 1, copies that do not grow with their width, or levels on
            the slow tier that do not exist.
    """

    bits: tuple[int, ...]
    part_bytes: tuple[int, ...]
    nested: bool = False
    on_slow_tier: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not self.bits or self.bits[0] < 1 or list(self.bits) != sorted(set(self.bits)):
            raise InputError(f"expert versions: bits must rise from at least 1, got {list(self.bits)}")
        if len(self.part_bytes) != len(self.bits) or min(self.part_bytes) < 1:
            raise InputError(f"expert versions: {len(self.bits)} widths need as many sizes of at least 1 byte, got "
                             f"{list(self.part_bytes)}")
        if not self.nested and list(self.part_bytes) != sorted(set(self.part_bytes)):
            raise InputError(f"expert versions: a wider copy must take more bytes, got {list(self.part_bytes)} for "
                             f"{list(self.bits)} bits")
        stored = tuple(range(len(self.bits))) if self.on_slow_tier is None else self.on_slow_tier
        rising = not self.nested or list(stored) == list(range(len(stored)))
        if not stored or not rising or not set(stored) <= set(range(len(self.bits))):
            raise InputError(f"expert versions: the slow tier must hold some of levels 0 ... {len(self.bits) - 1}"
                             f"{', from 0 on' if self.nested else ''}, got {list(stored)}")
        object.__setattr__(self, "on_slow_tier", stored)

    @property
    def num_levels(self) -> int:
        """Number of versions."""
        return len(self.bits)

    @property
    def slow_bytes(self) -> int:
        """Bytes of one expert on the slow tier, all stored versions together."""
        assert self.on_slow_tier is not None
        return sum(self.part_bytes[level] for level in self.on_slow_tier)

    def level_of(self, bits: int) -> int:
        """Return the level of a width; raises InputError where the experts do not exist in it."""
        if bits not in self.bits:
            raise InputError(f"experts exist in {', '.join(map(str, self.bits))} bits, not in {bits}")
        return self.bits.index(bits)

    def weight_bytes(self, level: int) -> int:
        """Return the bytes that a kernel reads and a slot holds at `level` (-1: none)."""
        if level == ABSENT_LEVEL:
            return 0
        return sum(self.part_bytes[: level + 1]) if self.nested else self.part_bytes[level]

    def copy_bytes(self, have: int, want: int) -> int:
        """Return the bytes that must come from the slow tier to serve `want` where level `have` is resident (-1: none).

        Nested: the missing planes. Exclusive: the whole copy, unless it is there.
        """
        if self.nested:
            return sum(self.part_bytes[have + 1: want + 1])
        return 0 if want in (have, ABSENT_LEVEL) else self.part_bytes[want]


def exclusive_versions(model: ModelSpec, bits: Sequence[int], how: Quantization | None = None) -> ExpertVersions:
    """Return copies of a model's experts at several widths (HOBBIT, EdgeMoE); `how` defaults to groups of 128."""
    how = how or Quantization()
    return ExpertVersions(tuple(bits), tuple(how.num_bytes(model, width) for width in bits))


def nested_versions(model: ModelSpec, bits: Sequence[int], how: Quantization | None = None) -> ExpertVersions:
    """Return a base width and planes on top of it (D2MoE's Matryoshka weights); `how` defaults to groups of 128.

    A step of several bits is as many planes of one bit, each with a scale per group.
    """
    how, widths = how or Quantization(), tuple(bits)
    if not widths or list(widths) != sorted(set(widths)):
        raise InputError(f"expert versions: bits must rise from at least 1, got {list(widths)}")
    planes = [(high - low) * how.num_bytes(model, 1, plane=True) for low, high in pairwise(widths)]
    base = how.num_bytes(model.replace(weight_bytes=FLOAT_BITS / 8), widths[0])
    return ExpertVersions(widths, (base, *planes), nested=True)


def _whole_bytes(bits: int) -> int:
    return -(-bits // 8)
