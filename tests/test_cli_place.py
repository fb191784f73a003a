"""``moesim place`` and its verbs: what they print and write, and that a mistake is one line and exit status 2."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import call, call_json
from typer.testing import CliRunner

from moesim.cli import app
from moesim.placement.plan import read_plan
from moesim.traces.split import split_requests
from moesim.traces.store import read_trace

COMMON = ("--trace", "tiny.trace.parquet", "--model", "tiny/config.json", "--hardware", "h100-sxmx4")
PLACE = ("place", *COMMON, "--time-limit", "0.5", "--out", "a.plan.json")


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(("line", "message"), [
    ("--solver lpd", "unknown placement solver 'lpd'. Did you mean 'lpt'?"),
    ("--solver eplb --option polcy=global", "has no option 'polcy'. Did you mean 'policy'?"),
    ("--option seed=1", "give it as --seed"),
    ("--option problem=1", "no solver has an option of this name"),
    ("--option a=1 --option a=2", "given twice"),
    ("--redundant-experts 3", "do not divide over 4 ranks"),
    ("--redundant-experts -1", "--redundant-experts"),
    ("--time-limit nan", "--time-limit must be a positive number of seconds, got nan"),
    ("--prove -1", "--prove must be a positive number of seconds, got -1.0"),
    ("--holdout 1.5", "holdout must be at least 0 and below 1, got 1.5"),
    ("--objective speed", "unknown objective 'speed'"),
    ("--objective balance+migration", "objective 'migration' needs the plan that is loaded now (--from)"),
    ("--execution homely", "execution must be home or coherent, got 'homely'"),
    ("--batch-size 0", "batch size must be at least 1, got 0"),
    ("--pin 3", "constraint pin '3': expected EXPERT@RANK or EXPERT@RANK:LAYER"),
    ("--pin 9@0", "constraint 'pin 9@0': expert 9 is outside 0 ... 7"),
    ("--pin 0@1 --pin 1@1 --pin 2@1 --solver lpt",
     "layer 0: no plan keeps these constraints together: pin 0@1; pin 1@1; pin 2@1"),
    ("--from nope.plan.json", "nope.plan.json: no such file"),
    ("--hardware hx4", "hardware 'h' is short for several machines: "),
    ("--hardware h100-sxmx0x2", "expected NAMExGPUSxNODES with at least 1 of each"),
    ("--model olmoe-1b-7b", "the trace (of synthetic) has 3 MoE layers x 8 experts, top-2, but model"),
    ("--out a.txt", "a plan's file ends in .plan.json"),
])
def test_a_mistake_is_one_line(line: str, message: str) -> None:
    """Whatever is wrong, the user reads one line that says what, and nothing is written."""
    before = sorted(Path.cwd().iterdir())
    done = CliRunner().invoke(app, [*PLACE, *line.split()])
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert sorted(Path.cwd().iterdir()) == before


@pytest.mark.parametrize(("arguments", "message"), [
    (("place", "--out", "a.plan.json"), "missing option --trace"),
    (("place", *COMMON), "missing option --out (-o)"),
    (("place", "--trace", "tiny.trace.parquet", "-o", "a.plan.json"), "missing option --hardware"),
    (("place", "compare", "--trace", "tiny.trace.parquet"), "missing option --hardware"),
])
def test_what_is_missing_is_named(arguments: tuple[str, ...], message: str) -> None:
    """Options that only some verbs need are asked for by name."""
    done = CliRunner().invoke(app, list(arguments))
    assert (done.exit_code, done.stdout) == (2, "")
    assert message in done.stderr


def test_place_writes_a_plan_and_judges_it(folder: Path) -> None:
    """The plan in the file has the imbalance that was printed, on the requests that were held out."""
    facts = call_json(*PLACE, "--solver", "lpt", "--seed", "5")
    plan = read_plan(folder / "a.plan.json")
    _, held_out = split_requests(read_trace(folder / "tiny.trace.parquet"), 0.5, 5)
    home = np.argsort(plan.physical_to_logical, axis=1) // plan.slots_per_rank
    worst = total = 0.0
    for layer in range(3):
        load = np.bincount(home[layer][held_out.expert_ids[:, layer].ravel()], minlength=4)
        worst, total = worst + load.max(), total + load.mean()
    assert facts["plans"][-1]["imbalance"] == pytest.approx(worst / total)
    assert facts["objective_bound"] <= facts["objective"]
    assert 0 <= facts["gap"] <= 1
    assert plan.provenance["model"] == "tiny"
    assert plan.provenance["trace_digest"] == read_trace(folder / "tiny.trace.parquet").digest()


def test_the_step_time_is_the_simulators(folder: Path) -> None:
    """What place predicts for a plan on held-out tokens is what the simulator gives for the same steps."""
    from moesim.hardware.cost import CostModel
    from moesim.hardware.load import load_hardware
    from moesim.lowering.expert_parallel import ExpertParallelProgram
    from moesim.model.catalog import load_model
    from moesim.scenario.placing import JUDGE_STEPS, full_steps
    from moesim.simulate.run import simulate
    from moesim.traces.steps import closed_loop_steps

    facts = call_json(*PLACE, "--batch-size", "3", "--objective", "step_time")
    _, held_out = split_requests(read_trace(folder / "tiny.trace.parquet"), 0.5, 0)
    steps = full_steps(closed_loop_steps(held_out, batch_size=3, max_steps=JUDGE_STEPS, include_prefill=False, seed=0))
    assert len(steps) > 1
    program = ExpertParallelProgram(load_model("tiny/config.json"), held_out, steps,
                                    read_plan(folder / "a.plan.json"),
                                    CostModel(load_hardware("h100-sxm", gpus_per_node=4)))
    assert facts["plans"][-1]["step_time_s"] == simulate(program).summary["step_time_s"]


def test_auto_is_not_slower_than_the_engines_first_plan_where_it_was_made(folder: Path) -> None:
    """On the tokens that it was made from the plan is never behind a contiguous one, by the goal."""
    facts = call_json(*PLACE)
    assert facts["solver"] == "auto"
    assert facts["plans"][-1]["gain_train_fraction"] >= 0
    assert facts["plans"][0]["plan"] == "contiguous"
    assert facts["plans"][0]["gain_held_out_fraction"] == 0


def test_few_tokens_are_warned_of(folder: Path) -> None:
    """80 tokens are too few for a plan by transitions, and the reader is told how many it would take."""
    done = CliRunner().invoke(app, [*PLACE, "--solver", "affinity"])
    assert done.exit_code == 0
    assert re.search(r"warning: the plan is made from \d\d tokens; .* some 800 are needed", done.stderr)


def test_place_with_options_for_people(folder: Path) -> None:
    """A solver's option gets through, numbers as numbers; the table names objective, bound and gap."""
    text = call(*PLACE, "--solver", "affinity", "--option", "node_weight=0.5")
    assert {"objective", "objective_bound", "gap", "bound_method"} <= set(re.findall(r"\w+", text))
    assert read_plan(folder / "a.plan.json").provenance["options"]["node_weight"] == 0.5


def test_place_on_all_requests_judges_nothing_held_out(folder: Path) -> None:
    """With --holdout 0 no request is held out, and no figure pretends that one was."""
    facts = call_json(*PLACE, "--holdout", "0")
    assert not any("held_out" in key for row in facts["plans"] for key in row)
    assert "nothing is held out" in call(*PLACE, "--holdout", "0")


def test_a_migration_starts_from_the_loaded_plan(folder: Path) -> None:
    """With --from the loaded plan is in the table, at no cost of moving; migration first means to stay."""
    call(*PLACE, "--solver", "random", "--out", "old.plan.json")
    facts = call_json(*PLACE, "--from", "old.plan.json", "--objective", "migration,balance")
    rows = {row["plan"]: row for row in facts["plans"]}
    assert rows["current"]["migration_bytes"] == 0
    assert rows["auto"]["moved_experts"] == 0
    assert rows["contiguous"]["migration_bytes"] > 0


@pytest.mark.parametrize(("solver", "objective"), [
    ("lpt", "balance"), ("affinity", "affinity"), ("auto", "hops"), ("auto", "bottleneck"), ("auto", "step_time"),
    ("auto", "fanout"), ("auto", "balance"), ("auto", "affinity")])
def test_what_place_claims_can_be_verified(solver: str, objective: str, folder: Path) -> None:
    """Plan, objective and bound hold when they are checked again from the files."""
    facts = call_json(*PLACE, "--solver", solver, "--objective", objective, "--prove", "0.5", "--pin", "1@2")
    assert facts["objective_bound"] is not None
    assert len(facts["files"]) == 2  # the plan and its certificate
    found = call_json("place", "verify", "a.plan.json")
    assert found["holds"]
    assert any("proven again" in text for text, _ in found["claims"])


def forged(folder: Path, change: dict[str, Any]) -> None:
    """Change a plan's provenance."""
    file = folder / "a.plan.json"
    document = json.loads(file.read_text())
    document["provenance"] |= change
    file.write_text(json.dumps(document))


@pytest.mark.parametrize(("change", "message"), [
    ({"objective": 1.0}, "claims do not hold"),
    ({"trace_digest": "sha256:0"}, "not the trace that a.plan.json was made from"),
    ({"constraints": ["pin 0@0", "pin 1@0", "pin 2@0"]}, "claims do not hold"),
    ({"certificate": {"file": "gone.bound.npz", "digest": ""}}, "its certificate gone.bound.npz is not beside it"),
    ({"certificate": {"file": "a.bound.npz", "digest": "sha256:0"}}, "not the certificate that a.plan.json names"),
])
def test_what_was_forged_does_not_pass(change: dict[str, Any], message: str, folder: Path) -> None:
    """A claimed objective, another trace, constraints that the plan breaks, a lost or swapped certificate are found."""
    call(*PLACE, "--solver", "lpt", "--objective", "affinity", "--prove", "0.2")
    forged(folder, change)
    done = CliRunner().invoke(app, ["place", "verify", "a.plan.json"])
    assert done.exit_code == 2
    assert message in done.stderr


def test_a_bound_that_its_multipliers_do_not_prove_does_not_pass(folder: Path) -> None:
    """A certificate that claims a tighter bound than its multipliers prove is caught, whatever its digest says."""
    import dataclasses

    from moesim.artifacts import digest_file
    from moesim.placement.certificate import read_certificate

    call(*PLACE, "--solver", "lpt", "--objective", "affinity", "--prove", "0.2")
    made = read_certificate(folder / "a.bound.npz")
    dataclasses.replace(made, bound=0.9 * made.bound).write(folder / "a.bound.npz")
    forged(folder, {"certificate": {"file": "a.bound.npz", "digest": digest_file(folder / "a.bound.npz")}})
    done = CliRunner().invoke(app, ["place", "verify", "a.plan.json"])
    assert done.exit_code == 2
    assert re.search(r"it claims a bound of \S+, its multipliers prove \S+ +NO", " ".join(done.stdout.split()))


def test_compare_ranks_all_solvers_and_draws_them(folder: Path) -> None:
    """Every solver is in the table or in a note with its reason; the best come first; the picture is a PNG."""
    from moesim.placement.solvers import SOLVERS

    found = call_json("place", "compare", *COMMON, "--objective", "affinity", "--time-limit", "0.5", "--prove", "0.5",
                      "--out", "cmp")
    notes = " ".join(json.loads((folder / "cmp/compare.json").read_text())["notes"])
    ran = [row["solver"] for row in found["rows"]]
    assert set(SOLVERS.names()) == {*ran, *(name for name in SOLVERS.names() if f"{name}:" in notes)}
    values = [row["objective"] for row in found["rows"]]
    assert values == sorted(values, reverse=True)
    assert all(value <= found["bound"] * (1 + 1e-9) for value in values)
    assert {"lpt", "affinity", "auto", "exact"} <= set(ran)
    alone = {row["solver"]: row for row in found["rows"]}
    call(*PLACE, "--solver", "random", "--objective", "affinity")
    plain = read_plan(folder / "a.plan.json").provenance["objective"]
    assert alone["random"]["objective"] == plain < alone["auto"]["objective"]  # no prover's plan passes for random's
    assert (folder / "cmp/compare.png").read_bytes().startswith(b"\x89PNG")


def test_a_plan_of_exflow_goes_out_and_comes_back(folder: Path) -> None:
    """A plan exported as ExFlow's CSV and imported again holds the same experts on the same ranks."""
    call(*PLACE, "--solver", "lpt")
    call("export", "a.plan.json", "--to", "exflow", "--out", "a.csv")
    call("place", "import", "a.csv", "--num-experts", "8", "-o", "b.plan.json")
    both = [np.sort(read_plan(folder / name).physical_to_logical.reshape(3, 4, 2), axis=2)
            for name in ("a.plan.json", "b.plan.json")]
    assert np.array_equal(*both)
    done = CliRunner().invoke(app, ["place", "import", "a.csv", "--num-experts", "7", "-o", "c.plan.json"])
    assert done.exit_code == 2
    assert "a.csv" in done.stderr


def test_rolling_pays_for_its_moves(folder: Path) -> None:
    """The first block has no move; later blocks say what was copied; the mean over the run adds up."""
    found = call_json("place", "rolling", *COMMON, "--every", "4", "--window", "4", "--max-steps", "12",
                      "--batch-size", "3", "--solver", "lpt")
    rows = found["rows"]
    assert [row["first_step"] for row in rows] == [0, 4, 8]
    assert rows[0]["static_step_time_s"] == rows[0]["rolling_step_time_s"]
    assert rows[0]["migration_bytes"] == 0
    assert found["migration_bytes"] == sum(row["migration_bytes"] for row in rows) > 0
    paid = sum(4 * row["rolling_step_time_s"] + row["migration_time_s"] for row in rows) / 12
    assert found["rolling_with_moves_step_time_s"] == pytest.approx(paid)


def test_rolling_needs_more_steps_than_a_window(folder: Path) -> None:
    """A run that ends before the first new plan compares nothing, and says so."""
    done = CliRunner().invoke(app, ["place", "rolling", *COMMON, "--every", "50"])
    assert done.exit_code == 2
    assert "use a longer trace or a smaller --every" in done.stderr


def test_migration_takes_the_near_copy_and_spreads_the_senders() -> None:
    """A newly held expert comes from a holder of the same node, the one that sends least so far."""
    from moesim.placement.plan import PlacementPlan
    from moesim.scenario.replanning import migration_traffic

    before = PlacementPlan(np.array([[0, 1, 0, 1, 0, 1, 2, 3]]), 4, 4)
    after = PlacementPlan(np.array([[0, 1, 0, 1, 2, 0, 2, 3]]), 4, 4)
    traffic = migration_traffic(before, after, np.array([10]), 2)
    assert traffic[3, 2] == 10  # rank 2 gets expert 2 from rank 3 of its node
    assert traffic.sum() == 10
    two = migration_traffic(PlacementPlan(np.array([[0, 1, 0, 1, 2, 3, 2, 3]]), 4, 4),
                            PlacementPlan(np.array([[0, 1, 0, 1, 0, 3, 2, 1]]), 4, 4), np.array([10]), 2)
    assert sorted(np.flatnonzero(two.sum(axis=1)).tolist()) == [0, 1]  # two copies from afar, one from each holder


@pytest.mark.parametrize(("text", "expected"), [
    ("h100-sxm", ("h100-sxm", None, None)), ("h200x8x8", ("h200-sxm", 8, 8)), ("h100-sxmx4", ("h100-sxm", 4, 1)),
    ("mine.yaml", ("mine.yaml", None, None))])
def test_clusters_in_one_word(text: str, expected: tuple[str, int | None, int | None]) -> None:
    """NAMExGPUSxNODES gives machine, GPUs per node and nodes; a start of a name stands for the machine."""
    from moesim.hardware.shorthand import parse_cluster

    assert parse_cluster(text) == expected
