"""AccuracyDebit: how much of the routed gate weight a run computed at which width, and what it left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moesim.errors import CheckError
from moesim.traces.trace import PAD

_ROUNDING = 1e-8


@dataclass(frozen=True)
class Published:
    """A figure that a paper prints for a method; `settings` are those without which it does not apply."""

    method: str
    model: str
    figure: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def applies(self, method: str, settings: Mapping[str, Any]) -> bool:
        """Return whether a run of `method` with these settings is the one that the paper measured."""
        return method == self.method and all(settings.get(name) == value for name, value in self.settings.items())


PUBLISHED = (
    Published("hobbit", "Mixtral-8x7B", "GSM8K 0.52 to 0.51 (arXiv 2411.01433)",
              {"t1": 0.6, "t2": 0.9, "paper_widths": True}),
    Published("edgemoe", "Switch-base-8", "0.89 % loss at 0.81 of 2.43 GB (arXiv 2308.14352)",
              {"tolerable_loss": 0.02, "proxy": False}),
    Published("edgemoe", "Switch-base-16", "1.95 % loss at 0.95 of 4.12 GB (arXiv 2308.14352)",
              {"tolerable_loss": 0.02, "proxy": False}),
    Published("d2moe", "LLaMA-MoE-3.5B", "perplexity 14.55 to 14.58 (V2) or 15.68 (V1; arXiv 2504.15299)",
              {"paper_widths": True}),
    Published("d2moe", "Mixtral-8x7B", "perplexity 4.04 to 4.09 (V2) or 4.28 (V1; arXiv 2504.15299)",
              {"paper_widths": True}),
)


@dataclass(frozen=True)
class AccuracyDebit:
    """What a run gave up, in gate weight; it is no accuracy, and no accuracy follows from it.

    Attributes:
        method: ``hobbit``, ``edgemoe`` or ``d2moe``.
        bits, shares: the widths, and the share of the routed gate weight computed at each.
        skipped: the share that was not computed. With `shares` it sums to 1.
        weighted: whether the trace had gate weights; otherwise every choice of a token counts alike.
        source: who chose the widths: the rule itself, a table of losses, a proxy, a stated capacity.
        published: figures that the paper prints for this setting, each with its model.

    Raises:
        CheckError: shares that do not sum to 1.
    """

    method: str
    bits: tuple[int, ...]
    shares: tuple[float, ...]
    skipped: float
    weighted: bool
    source: str
    published: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.bits) != len(self.shares) or abs(sum(self.shares) + self.skipped - 1) > _ROUNDING:
            raise CheckError(f"accuracy debit: shares {self.shares} at {self.bits} bits and {self.skipped} skipped do not "
                             f"sum to 1")

    @property
    def mean_bits(self) -> float:
        """Bits per weight, weighted by gate weight; what is skipped counts as 0."""
        return sum(bits * share for bits, share in zip(self.bits, self.shares, strict=True))

    def columns(self) -> dict[str, Any]:
        """Return the columns that a row of a study must show."""
        rows = [f"{bits} bit {100 * share:.1f} %" for bits, share in zip(self.bits, self.shares, strict=True)][::-1]
        return {
            "debit_by_bits": ", ".join(rows) + ("" if self.weighted else " (of choices: no gate weights)"),
            "debit_widest_share": self.shares[-1],
            "debit_skipped_share": self.skipped,
            "debit_mean_bits": self.mean_bits,
            "debit_source": self.source,
            "debit_published": "; ".join(self.published) or "none for this setting",
        }


class DebitCounter:
    """Adds up the gate weight that a run computes at each level."""

    def __init__(self, num_levels: int) -> None:
        self._weight = np.zeros(num_levels + 1)  # skipped, -1: the last
        self.weighted = True

    def add(self, expert_ids: np.ndarray, gate_weights: np.ndarray | None, levels: np.ndarray) -> None:
        """Add the choices of one access: ids, weights (or None) and levels (-1: skipped), each [token, k]."""
        shares = token_shares(expert_ids, gate_weights)
        self.weighted &= gate_weights is not None
        chosen = expert_ids != PAD
        np.add.at(self._weight, levels[chosen].astype(np.int64), shares[chosen])

    def debit(self, method: str, bits: tuple[int, ...], source: str, settings: Mapping[str, Any]) -> AccuracyDebit:
        """Return the debit of everything added; raises CheckError before anything was."""
        total = self._weight.sum()
        if not total > 0:
            raise CheckError("accuracy debit: the program has not run yet")
        *shares, skipped = (self._weight / total).tolist()
        found = [row for row in PUBLISHED if row.applies(method, settings)]
        return AccuracyDebit(method, bits, tuple(shares), skipped, self.weighted, source,
                             tuple(f"published for {row.model}: {row.figure}" for row in found))


def token_shares(expert_ids: np.ndarray, gate_weights: np.ndarray | None) -> np.ndarray:
    """Return float64[..., k]: each choice's share of its token's gate weight, 0 where padded; equal without weights."""
    weights = np.where(expert_ids == PAD, 0.0, 1.0 if gate_weights is None else np.asarray(gate_weights, np.float64))
    total = weights.sum(axis=-1, keepdims=True)
    equal = (expert_ids != PAD) / np.maximum((expert_ids != PAD).sum(axis=-1, keepdims=True), 1)
    return np.where(total > 0, weights / np.where(total > 0, total, 1.0), equal)
