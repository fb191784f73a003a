"""`moesim place` and `moesim trace info / stats` on a counts file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from command_line import call, call_json
from typer.testing import CliRunner

from moesim.cli import app
from moesim.placement.plan import read_plan
from moesim.traces.counts import CountTrace, write_counts

PLACE = ("--trace", "c.counts.parquet", "--model", "tiny/config.json", "--hardware", "h100-sxm", "--gpus-per-node", "4",
         "--time-limit", "1")


@pytest.fixture
def counts(folder: Path) -> CountTrace:
    """Counts of the tiny model in the working directory."""
    trace = CountTrace(np.random.default_rng(0).integers(1, 99, (4, 3, 8)), np.arange(3), "forward pass")
    write_counts(trace, folder / "c.counts.parquet")
    return trace


def test_a_plan_from_counts(counts: CountTrace) -> None:
    """The plan's imbalance is that of its ranks on the counts, and no worse than the contiguous plan's."""
    rows = call_json("place", *PLACE, "--objective", "balance", "-o", "c.plan.json")["plans"]
    plan = read_plan("c.plan.json")
    ranks = np.zeros((3, 4))
    for layer in range(3):
        for slot, expert in enumerate(plan.physical_to_logical[layer]):
            ranks[layer, slot // plan.slots_per_rank] += counts.expert_load()[layer, expert]
    assert rows[-1]["imbalance"] == pytest.approx(ranks.max(axis=1).sum() / ranks.mean(axis=1).sum())
    assert rows[-1]["imbalance"] <= rows[0]["imbalance"]
    assert plan.provenance["trace_digest"] == counts.digest()


@pytest.mark.parametrize(("arguments", "words"), [
    (("place", *PLACE, "--objective", "affinity", "-o", "x.plan.json"), "objective 'affinity' needs tokens, but it holds "
                                                                        "expert counts without tokens"),
    (("place", "compare", *PLACE, "-o", "x"), "it is no trace: it holds expert counts without tokens"),
])
def test_what_needs_tokens_says_so(counts: CountTrace, arguments: tuple[str, ...], words: str) -> None:
    """Objectives and verbs that need tokens refuse counts with the reason."""
    done = CliRunner().invoke(app, list(arguments))
    assert done.exit_code == 2
    assert words in done.stderr


def test_info_and_stats_of_counts(counts: CountTrace) -> None:
    """The header and a short summary."""
    assert call_json("trace", "info", "c.counts.parquet")["digest"] == counts.digest()
    assert call_json("trace", "stats", "c.counts.parquet") == counts.summary()
    assert "max_over_mean_load" in call("trace", "stats", "c.counts.parquet")
