"""What an offload study says to do: one point, one sentence, and the reasons, from the study's rows alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moesim.errors import InputError

Row = Mapping[str, Any]
WITHIN = 0.05
IDLE = 0.05
NEEDED = ("policy", "prefetch", "miss", "slots_per_layer", "tokens_per_s", "tpot_gap", "stall_fraction", "sees_future")
NO_PREFETCH = "none"

# How a miss is handled; any other name is that of a rule.
_MISSES = {"load": "load misses", "cpu": "let the CPU compute misses", "faster": "let the CPU compute a miss where that is faster"}
# What the device waits for, by the causes of `moesim.simulate.stalls`.
_CAUSES = {"load": "loads of missing experts", "prefetch": "copies ahead that are late or in the way",
           "admit": "copies in the background", "cpu expert": "experts on the CPU", "far link": "copies before the last link",
           "other": "nothing that is a task"}


@dataclass(frozen=True)
class Advice:
    """`knee`: the row to follow; `sentence`: what to do and why; `reasons`: what else the rows say, one sentence each."""

    knee: Row
    sentence: str
    reasons: tuple[str, ...]


def deployable(row: Row) -> bool:
    """Return whether a row's policy and prefetcher know nothing of the future."""
    return not row["sees_future"]


def advice(rows: Sequence[Row], usable: Callable[[Row], bool] = deployable) -> Advice:
    """Return which point of one offload study to use.

    The knee: of each number of slots the usable point with the most tokens/s counts; the knee is the smallest number of
    slots that reaches at least 95 % of the most tokens/s of any usable point.

    Args:
        rows: of one machine and workload, with the keys in `NEEDED`. Where they are there, these are used too:
            ``resident_fraction``; ``bound_for``, ``on_demand`` if ``tpot_gap`` is above the bound for policies that
            wait for their routers; ``stall_cause`` and ``stall_cause_fraction``, what the device waits for longest, and that as
            a share of the whole time.
        usable: which rows may be advised.

    Raises:
        InputError: a row without a needed key, or no usable row.
    """
    for number, row in enumerate(rows):
        if missing := [key for key in NEEDED if key not in row]:
            raise InputError(f"advice: row {number} of the study has no {', '.join(missing)}")
    chosen = [row for row in rows if usable(row)]
    if not chosen:
        raise InputError(f"advice: none of the {len(rows)} rows of the study can be deployed")
    best = {slots: _fastest(row for row in chosen if row["slots_per_layer"] == slots)
            for slots in sorted({row["slots_per_layer"] for row in chosen})}
    most = max(row["tokens_per_s"] for row in best.values())
    knee = next(row for row in best.values() if row["tokens_per_s"] >= (1 - WITHIN) * most)
    facts = (f"{_whole(knee)}: {knee['tokens_per_s']:.4g} tokens/s", _above_bound(knee), _more_slots(knee, best), _stalls(knee))
    sentence = "; ".join((", ".join(fact for fact in facts[:2] if fact), *(fact for fact in facts[2:] if fact))) + "."
    return Advice(knee, sentence, tuple(_reasons(knee, best, rows, chosen)))


def _fastest(rows: Any) -> Row:
    """The row with the most tokens/s; the first of equal ones."""
    return max(rows, key=lambda row: row["tokens_per_s"])


def _whole(row: Row) -> str:
    """What to do."""
    slots, fraction = row["slots_per_layer"], row.get("resident_fraction")
    of = f" of {round(slots / fraction)}" if fraction else ""
    ahead = "" if row["prefetch"] == NO_PREFETCH else f", prefetch with {row['prefetch']}"
    return f"Keep {slots}{of} experts per layer with {row['policy']}{ahead} and {_miss(row)}"


def _miss(row: Row) -> str:
    return _MISSES.get(row["miss"], f"handle misses by the rule {row['miss']}")


def _name(row: Row) -> str:
    ahead = "" if row["prefetch"] == NO_PREFETCH else f" and {row['prefetch']}"
    return f"{row['policy']}{ahead} ({row['miss']})"


def _above_bound(row: Row) -> str:
    """How far the row's time is above its bound: ``tpot_gap`` is a share of the time, this one of the bound."""
    gap = row["tpot_gap"]
    kind = "on-demand policy" if row.get("bound_for") == "on_demand" else "policy"
    kind += " that loads its misses" if row["miss"] in ("load", "gpu-only") else ""  # its bound knows of no CPU
    if gap is None or gap >= 1:
        return ""
    above = gap / (1 - gap)
    if above < WITHIN / 100:
        return f"which no {kind} can beat with these slots"
    return f"at most {_percent(above)} more time than the best {kind} with these slots would take"


def _more_slots(knee: Row, best: Mapping[int, Row]) -> str:
    """What other numbers of slots give."""
    slots, rate = knee["slots_per_layer"], knee["tokens_per_s"]
    more = [row["tokens_per_s"] for size, row in best.items() if size > slots]
    fewer = [row for size, row in best.items() if size < slots]
    if more:
        gain = max(more) / rate - 1
        return f"more slots (up to {max(best)}) gain " + (f"at most {_percent(gain)}" if gain > 0 else "nothing")
    if fewer:
        nearest = fewer[-1]
        return (f"it is the largest size tried, and {nearest['slots_per_layer']} slots give "
                f"{_percent(1 - nearest['tokens_per_s'] / rate)} fewer")
    return ""


def _stalls(row: Row) -> str:
    """What the time goes to."""
    idle = row["stall_fraction"]
    if idle < IDLE:
        return f"the device computes {_percent(1 - idle)} of the time"
    cause, share = row.get("stall_cause"), row.get("stall_cause_fraction")
    longest = f", longest for {_CAUSES.get(cause, cause)} ({_percent(share)})" if cause and share is not None else ""
    return f"the device waits {_percent(idle)} of the time{longest}"


def _reasons(knee: Row, best: Mapping[int, Row], rows: Sequence[Row], chosen: Sequence[Row]) -> list[str]:
    slots, rate = knee["slots_per_layer"], knee["tokens_per_s"]
    told = [f"{size} slots per layer: {row['tokens_per_s']:.4g} tokens/s with {_name(row)}." for size, row in best.items()]
    reasons = ["The most tokens/s by size: " + " ".join(told)] if len(best) > 1 else []
    others = [row for row in chosen if row["slots_per_layer"] == slots and row is not knee]
    if others:
        second = _fastest(others)
        reasons.append(f"Of the {len(others) + 1} points with {slots} slots that can be deployed, {_name(second)} comes next with "
                       f"{_percent(1 - second['tokens_per_s'] / rate)} fewer tokens/s.")
    seers = [row for row in rows if row["sees_future"] and row["slots_per_layer"] == slots and row["tokens_per_s"] > rate]
    if seers:
        first = _fastest(seers)
        reasons.append(f"With the future known, {_name(first)} reaches {_percent(first['tokens_per_s'] / rate - 1)} more.")
    return reasons


def _percent(fraction: float) -> str:
    """Two digits below ten percent, whole percents above."""
    return f"{100 * fraction:.2g} %" if abs(fraction) < 0.1 else f"{100 * fraction:.0f} %"
