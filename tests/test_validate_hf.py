"""A real model with its experts offloaded: outputs bit for bit, counts of replay, slots, time, and errors."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from capture_families import FAMILIES, build  # noqa: E402

from moesim.cache.cache import ExpertCache  # noqa: E402
from moesim.cli import app  # noqa: E402
from moesim.errors import CheckError, InputError  # noqa: E402
from moesim.hardware.cost import CostModel  # noqa: E402
from moesim.lowering.graph import PRIORITY_DEMAND, PRIORITY_PREFETCH  # noqa: E402
from moesim.simulate.result import read_result  # noqa: E402
from moesim.simulate.simpy_executor import run_simpy  # noqa: E402
from moesim.traces.capture_hooks import RouterRecorder  # noqa: E402
from moesim.traces.store import read_trace  # noqa: E402
from moesim.validate import hf_run  # noqa: E402
from moesim.validate.hf_check import check_counts, prefetched_counts, replayed_counts  # noqa: E402
from moesim.validate.hf_generate import check_equal, generate  # noqa: E402
from moesim.validate.hf_loader import Load, Loader  # noqa: E402
from moesim.validate.hf_model import OffloadedModel, eager  # noqa: E402
from moesim.validate.hf_plan import HfCase, HfPlan, stand_in_model  # noqa: E402
from moesim.validate.hf_run import validate_hf  # noqa: E402
from moesim.validate.hf_runtime import ExpertRuntime  # noqa: E402
from moesim.validate.hf_weights import PASSING_SLOTS, SlotPool, SlowTier, expert_modules  # noqa: E402
from moesim.validate.local import local_machine  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")

REQUESTS = [(3, [5, 9, 9, 3, 60, 21, 8, 40]), (1, [7, 1, 30])]
NEW_TOKENS = 5
TINY = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 32, "intermediate_size": 48,
        "moe_intermediate_size": 16, "num_hidden_layers": 2, "num_experts": 8, "num_experts_per_tok": 2, "vocab_size": 64,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "torch_dtype": "float32"}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny models run fastest on one thread, and sums are cut alike."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Setup:
    """A tiny model of a family, what it generates when it is not offloaded, and its experts."""

    def __init__(self, family: str, requests: list[tuple[int, list[int]]] = REQUESTS) -> None:
        self.requests = requests
        self.model = build(family)
        eager(self.model)
        self.recorder = RouterRecorder(self.model)
        self.layers = expert_modules(self.model, self.recorder)
        self.plain = generate(self.model, self.recorder, requests, NEW_TOKENS)
        self.tier = SlowTier(self.layers, "cpu")

    def case(self, plan: HfPlan) -> HfCase:
        """The plan on the plain model's routing."""
        return HfCase(plan, self.plain.trace, self.plain.steps)

    def run(self, plan: HfPlan) -> tuple[Any, ExpertRuntime]:
        """Generate with the experts offloaded; returns what came out and the runtime."""
        case = self.case(plan)
        pool = SlotPool(self.tier, case.slots_per_layer * len(self.layers), "cpu")
        offloaded = OffloadedModel(self.model, self.layers, self.recorder)
        with Loader(self.tier, pool, "cpu", plan.bytes_per_s) as loader:
            runtime = ExpertRuntime(self.tier, pool, loader, case.cache(), miss=plan.miss, prefetcher=case.prefetcher())
            offloaded.runtime = runtime
            found = generate(self.model, offloaded, self.requests, NEW_TOKENS)
            runtime.check()
        return found, runtime


@pytest.fixture(scope="module")
def qwen() -> Setup:
    """A tiny Qwen3-MoE."""
    return Setup("qwen3_moe")


# ---------------------------------------------------------------- outputs and counts


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_gives_its_own_outputs_from_slots(family: str) -> None:
    """Logits bit for bit, tokens and routing are the plain model's; counts are replay's, with few slots and with one."""
    setup = Setup(family)
    for plan in (HfPlan(3), HfPlan(1), HfPlan(2, "lfu", miss="cpu"), HfPlan(3, prefetch="transition", prefetch_width=3)):
        found, runtime = setup.run(plan)
        check_equal(setup.plain, found)
        case = setup.case(plan)
        stream, prefetcher = case.context.future, case.prefetcher()
        expected = (replayed_counts(stream, case.cache()) if prefetcher is None else
                    prefetched_counts(stream, case.cache(), prefetcher, case.access_tokens))
        check_counts(runtime.counts, expected)
        assert 0 < runtime.most_resident <= plan.slots * len(setup.layers)
        assert runtime.counts["misses"].sum() == (runtime.counts["loads"] + runtime.counts["cpu_misses"]).sum() > 0
    assert any(expected["bypasses"] > 0) or family in ("ernie4_5_moe", "longcat_flash", "llama4")


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3", "mixtral"])
def test_all_experts_in_one_call_round_otherwise_but_little(family: str) -> None:
    """Against the usual grouped kernel the same tokens come out, and logits agree to six digits, not to the bit."""
    setup = Setup(family)
    setup.model.set_experts_implementation("grouped_mm")
    usual = generate(setup.model, setup.recorder, REQUESTS, NEW_TOKENS)
    eager(setup.model)
    found, _ = setup.run(HfPlan(3))
    assert usual.tokens == found.tokens
    for one, other in zip(usual.logits, found.logits, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("policy", ["lru", "lfu", "fifo", "belady", "belady-bypass", "static", "sieve", "arc", "lirs", "lhu"])
@pytest.mark.parametrize("slots", [1, 2, 5, 8])
def test_hits_and_misses_are_those_of_replay_whatever_the_policy(qwen: Setup, policy: str, slots: int) -> None:
    """Replay of the plain model's trace counts, layer by layer, what the real run met; all slots: first uses miss only."""
    plan = HfPlan(slots, policy)
    found, runtime = qwen.run(plan)
    check_equal(qwen.plain, found)
    expected = replayed_counts(qwen.case(plan).context.future, qwen.case(plan).cache())
    check_counts(runtime.counts, expected)
    if slots == 8:
        used = [len(set(qwen.plain.trace.expert_ids[:, layer].ravel().tolist())) for layer in range(2)]
        assert runtime.counts["misses"].tolist() == used


@pytest.mark.parametrize("name", ["popularity", "transition", "oracle"])
def test_prefetches_are_those_of_a_simulation_in_which_copies_take_no_time(name: str) -> None:
    """Hits (in time or late), misses and prefetches of the program that the simulator runs, on an endlessly fast link.

    Prompts are short: the simulator brings the fullest experts first, so with more experts than slots others would pass.
    """
    plan = HfPlan(4, prefetch=name, prefetch_width=2)
    qwen = Setup("qwen3_moe", [(number, [number, 50 - 3 * number]) for number in range(6)])
    case = qwen.case(plan)
    machine = local_machine("cpu", 1e18)
    program = case.program(stand_in_model(case.trace, 32, qwen.tier.expert_bytes), machine, CostModel(machine.hardware))
    run_simpy(program)
    found, runtime = qwen.run(plan)
    check_equal(qwen.plain, found)
    counts = program.cache_counts
    assert counts["cancelled_prefetches"].sum() == 0
    assert runtime.counts["hits"].tolist() == (counts["hits"] + counts["late_hits"]).tolist()
    assert runtime.counts["misses"].tolist() == counts["misses"].tolist()
    assert runtime.counts["prefetches"].tolist() == counts["prefetches"].tolist()
    assert min(runtime.counts["prefetches"].sum(), runtime.counts["evictions"].sum()) > 0
    assert runtime.counts["bypasses"].sum() == 0


def test_a_paced_tier_changes_time_and_nothing_else(qwen: Setup) -> None:
    """No copy is quicker than the pace; counts and outputs are the same."""
    plan = HfPlan(3, bytes_per_s=2e6)
    found, runtime = qwen.run(plan)
    check_equal(qwen.plain, found)
    quick = qwen.run(HfPlan(3))[1]
    for name, values in quick.counts.items():
        np.testing.assert_array_equal(values, runtime.counts[name])
    loads = runtime._loader.finished
    assert len(loads) == runtime.counts["loads"].sum()
    assert min(load.end_ns - load.start_ns for load in loads) >= qwen.tier.expert_bytes / 2e6 * 1e9


# ---------------------------------------------------------------- what the checks see


def test_one_wrong_weight_in_a_slot_is_seen(qwen: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy that changes one number is found in the slots; without that check, in the logits."""
    fill = SlotPool.fill

    def wrong(self: SlotPool, slot: int, parts: dict[str, Any]) -> None:
        fill(self, slot, parts)
        if slot == 0:
            self._buffers["down_proj"][slot, 0, 0] += 0.5

    monkeypatch.setattr(SlotPool, "fill", wrong)
    with pytest.raises(CheckError, match=r"after the run slot 0 does not hold expert \d of layer 0"):
        qwen.run(HfPlan(3))
    monkeypatch.setattr(ExpertRuntime, "check", lambda self: None)
    found, _ = qwen.run(HfPlan(3))
    with pytest.raises(CheckError, match=r"the logits of pass \d differ from the plain model's by up to"):
        check_equal(qwen.plain, found)


def test_a_wrong_count_is_seen(qwen: Setup) -> None:
    """One hit too many in one layer is named with both numbers."""
    _, runtime = qwen.run(HfPlan(3))
    expected = replayed_counts(qwen.case(HfPlan(3)).context.future, qwen.case(HfPlan(3)).cache())
    runtime.counts["hits"][1] += 1
    hits = int(expected["hits"][1])
    with pytest.raises(CheckError, match=f"counted {hits + 1} hits in layer 1, replay of the plain model's routing {hits}"):
        check_counts(runtime.counts, expected)


def test_another_expert_than_the_routers_choice_is_refused(qwen: Setup) -> None:
    """The runtime hands out the experts of the access in progress only."""
    pool = SlotPool(qwen.tier, 4, "cpu")
    with Loader(qwen.tier, pool, "cpu") as loader:
        runtime = ExpertRuntime(qwen.tier, pool, loader, qwen.case(HfPlan(2)).cache())
        runtime.begin_pass(1)
        runtime.begin(0, np.eye(8, dtype=np.int64)[5])
        with pytest.raises(CheckError, match="layer 0 computes expert 4, which its router did not choose"):
            runtime.weights(0, "down_proj", 4)


def test_the_model_is_left_as_it_was(qwen: Setup) -> None:
    """The same parameters in the same order, no hooks, no thread: and it computes what it did."""
    before = [(name, value.data_ptr()) for name, value in qwen.model.named_parameters()]
    qwen.run(HfPlan(2))
    assert [(name, value.data_ptr()) for name, value in qwen.model.named_parameters()] == before
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in qwen.model.modules())
    assert not any(thread.name == "expert loader" for thread in threading.enumerate())
    check_equal(qwen.plain, generate(qwen.model, qwen.recorder, REQUESTS, NEW_TOKENS))


def test_a_slot_pool_is_as_large_as_it_says(qwen: Setup) -> None:
    """N slots of one expert each and two to pass through, not a byte more."""
    pool = SlotPool(qwen.tier, 6, "cpu")
    assert pool.num_bytes == (6 + PASSING_SLOTS) * qwen.tier.expert_bytes
    assert qwen.tier.expert_bytes == 3 * 16 * 32 * 4


# ---------------------------------------------------------------- the loader


def test_demanded_experts_overtake_and_what_lost_its_slot_is_not_copied(qwen: Setup) -> None:
    """Of three queued prefetches one is promoted, one's slot goes to another expert: it is never copied."""
    pool = SlotPool(qwen.tier, 8, "cpu")
    loads = [Load("prefetch", 0, 0, expert, slot) for expert, slot in ((0, 0), (1, 1), (2, 2), (3, 1))]
    loader = Loader(qwen.tier, pool, "cpu")
    for load in loads[:3]:
        loader.ask(load, PRIORITY_PREFETCH)
    loader.promote(loads[2])
    loader.ask(loads[3], PRIORITY_DEMAND)
    with loader:
        loader.drain()
    assert [load.expert for load in loader.finished] == [2, 3, 0]
    assert pool.holds(1, qwen.tier.of(0, 3))
    assert not loads[1].done


def test_an_error_in_the_loader_ends_the_run(qwen: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes wrong in the other thread is raised where its expert is waited for."""
    def fail(self: SlotPool, slot: int, parts: dict[str, Any]) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(SlotPool, "fill", fail)
    with pytest.raises(MemoryError, match="no room"):
        qwen.run(HfPlan(3))


# ---------------------------------------------------------------- files as the slow tier


@pytest.mark.parametrize(("family", "own"), [("gpt_oss", 12), ("dbrx", 0), ("mixtral", 0)])
def test_a_slow_tier_in_files_holds_the_same_bytes(tmp_path: Path, family: str, own: int) -> None:
    """Mapped from the checkpoint where it keeps weights as the model does, else from a copy; bit for bit the model's."""
    setup = Setup(family)
    setup.model.save_pretrained(tmp_path / "saved")
    tier = SlowTier(setup.layers, "cpu")
    tier.to_files(setup.layers, tmp_path / "saved")
    total = sum(len(layer.parts) for layer in setup.layers)
    found = int(re.search(r"\((\d+) of (\d+) tensors", tier.origin)[1])
    assert f"of {total} tensors" in tier.origin
    assert found == own or (own == 0 and found in (0, total))
    for layer, module in enumerate(setup.layers):
        for name, value in module.parts.items():
            assert torch.equal(tier.parts[layer][name], value)
            assert tier.parts[layer][name].data_ptr() != value.data_ptr()
    setup.tier = tier
    check_equal(setup.plain, setup.run(HfPlan(2))[0])
    tier.close()


def test_an_index_that_is_none_is_named(qwen: Setup, tmp_path: Path) -> None:
    """A broken index of a checkpoint is an error with its path."""
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(InputError, match=r"index\.json: expected a JSON object with a weight_map"):
        SlowTier(qwen.layers, "cpu").to_files(qwen.layers, tmp_path)


# ---------------------------------------------------------------- what cannot be offloaded


class Listed(torch.nn.Module):
    """Experts as a list of modules, as transformers had them before version 5."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.layers = torch.nn.ModuleList([torch.nn.Module()])
        self.layers[0].experts = torch.nn.ModuleList([torch.nn.Linear(4, 4) for _ in range(8)])


def test_a_family_that_keeps_its_experts_otherwise_is_refused(qwen: Setup) -> None:
    """The message names the family and those that are supported."""
    model = Listed(qwen.model.config)
    with pytest.raises(InputError, match=r"offloaded run of 'qwen3_moe' is not supported: its ModuleList .* Mixtral, Qwen2"):
        expert_modules(model, RouterRecorder(model))


@pytest.mark.parametrize(("change", "message"), [
    ({"slots": 0}, "slots must be at least 1, got 0"),
    ({"miss": "lod"}, "way to handle a miss.*'lod'.*Did you mean 'load'"),
    ({"tier": "flash"}, "slow tier.*'flash'"),
    ({"bytes_per_s": -1.0}, "rate must be positive, got -1.0"),
    ({"miss": "cpu", "device": "cuda"}, "miss cpu needs device cpu"),
    ({"prefetch_width": 0}, "prefetch_width must be at least 1"),
])
def test_bad_plans(change: dict[str, Any], message: str) -> None:
    """A plan says what is wrong with it."""
    with pytest.raises(InputError, match=message):
        HfPlan(**{"slots": 2, **change})


def test_a_prefetcher_of_later_layers_is_refused(qwen: Setup) -> None:
    """The run follows prefetchers of the next layer; the message lists them."""
    with pytest.raises(InputError, match=r"'hobbit' looks further than the next layer.*none, popularity, transition"):
        qwen.case(HfPlan(2, prefetch="hobbit")).prefetcher()


# ---------------------------------------------------------------- the whole validation


@pytest.fixture(scope="module")
def validated() -> Any:
    """A validation with few rounds, once for the tests below."""
    model = build("mixtral")
    return model, validate_hf(model, REQUESTS, HfPlan(3, bytes_per_s=2e8), new_tokens=NEW_TOKENS, repeats=2, probe_rounds=3)


def test_the_time_is_predicted_from_measurements_alone(validated: Any) -> None:
    """No cost comes from a data sheet; both runs have the same passes, experts and kinds."""
    _, found = validated
    assert set(found.facts["simulated"]["cost_sources"]) <= {"measured", "interpolated", "extrapolated"}
    counts = [result.tasks["kind"].value_counts() for result in (found.predicted, found.measured)]
    for kind in ("expert", "attention", "router", "head"):
        assert counts[0][kind] == counts[1][kind] > 0
    assert found.report.kinds["kind"].tolist() == ["attention", "executor", "expert", "head", "load", "router", "end to end"]
    assert found.report.kinds["error_share"].iloc[:-1].sum() == pytest.approx(1)
    assert np.isfinite(found.report.runs["error"]).all()


def test_the_measured_run_adds_up(validated: Any) -> None:
    """The computing thread never does two things at once; its spans and its waits are the whole time; copies are counted."""
    _, found = validated
    measured, tasks = found.facts["measured"], found.measured.tasks
    for _, own in tasks.groupby("resource"):
        ordered = own.sort_values("start_ns")
        assert (ordered["start_ns"].to_numpy()[1:] >= ordered["end_ns"].to_numpy()[:-1]).all()
    assert measured["expert_s"] + measured["rest_s"] + measured["wait_s"] == pytest.approx(measured["makespan_s"])
    assert measured["wait_s"] >= 0
    assert measured["htod_bytes"] == measured["num_copies"] * found.facts["expert_bytes"]
    assert measured["num_copies"] == measured["cache"]["loads"]
    assert measured["cache"]["hits"] + measured["cache"]["misses"] == measured["cache"]["accesses"]
    assert found.facts["generated_tokens"] == len(REQUESTS) * NEW_TOKENS
    assert found.trace.expert_ids.shape == (8 + 3 + 2 * (NEW_TOKENS - 1), 3, 2)


def test_a_validation_gives_the_model_back(validated: Any) -> None:
    """The usual implementation of experts is set again."""
    model, found = validated
    assert model.config.get_text_config()._experts_implementation == "grouped_mm"
    assert found.facts["usual_computation"]["same_tokens"]
    with pytest.raises(InputError, match="repeats and new_tokens must be at least 1, got 0 and 5"):
        validate_hf(model, REQUESTS, HfPlan(3), new_tokens=5, repeats=0)


def test_a_validation_whose_replay_disagrees_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check is not decoration: a replay that counts otherwise ends the validation."""
    def other(stream: Any, cache: ExpertCache) -> dict[str, np.ndarray]:
        return {name: values + (name == "hits") for name, values in replayed_counts(stream, cache).items()}

    monkeypatch.setattr(hf_run, "replayed_counts", other)
    with pytest.raises(CheckError, match="hits in layer 0"):
        validate_hf(build("olmoe"), REQUESTS, HfPlan(3), new_tokens=2, repeats=1, probe_rounds=2)


# ---------------------------------------------------------------- the command


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a config, in the working directory; probes are short."""
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(TINY))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hf_run.validate_hf, "__kwdefaults__", {**hf_run.validate_hf.__kwdefaults__, "probe_rounds": 2})
    return tmp_path


def test_the_command_writes_what_it_names(tiny: Path) -> None:
    """`validate --hf` with JSON: files that can be read again, a timeline of both runs, and counts that add up."""
    done = CliRunner().invoke(app, ["validate", "--hf", "tiny", "--random-weights", "--slots", "3", "--new-tokens", "4",
                                    "--random-tokens", "6", "--repeats", "1", "-o", "out", "--json"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert all((tiny / file).exists() for file in said["files"])
    assert read_trace("out/tiny.trace.parquet").num_tokens == 6 + 3
    measured = read_result("out/tiny.measured.result")
    assert measured.summary["cache"] == said["facts"]["measured"]["cache"]
    timeline = json.loads((tiny / "out/tiny.perfetto.json").read_text())
    names = {event["args"]["name"] for event in timeline["traceEvents"] if event["name"] == "process_name"}
    assert {"predicted: device", "measured: device"} <= names
    assert timeline["otherData"]["paired"] > 0


def test_the_command_talks_to_people_and_takes_a_described_machine(tiny: Path) -> None:
    """A prediction for a catalog machine; a checkpoint that was saved; a prompts file."""
    import transformers

    transformers.Qwen3MoeForCausalLM(transformers.AutoConfig.from_pretrained("tiny")).save_pretrained("saved")
    Path("p.jsonl").write_text('{"request_id": 4, "token_ids": [1, 2, 3]}\n')
    done = CliRunner().invoke(app, ["validate", "--hf", "saved", "--slots", "3", "--new-tokens", "3", "--prompts", "p.jsonl",
                                    "--hardware", "rtx-4090", "--tier", "file", "--repeats", "1"])
    assert done.exit_code == 0, done.output
    text = " ".join(done.stdout.split())
    assert "bit for bit those of the plain model" in text
    assert "memory-mapped safetensors" in text
    assert "results/saved/saved.validation.json" in text


@pytest.mark.parametrize(("arguments", "message"), [
    ("", "expected a scenario, or --hf PATH"),
    ("x.yaml --hf tiny", "give a scenario or --hf PATH, not both"),
    ("x.yaml --slots 3", "--slots belongs to --hf PATH"),
    ("x.yaml --new-tokens 3", "--new-tokens belongs to --hf PATH"),
    ("--hf tiny --random-weights", "--hf needs --slots N"),
    ("--hf nowhere --slots 2", "nowhere: expected a local model folder with a config.json"),
    ("--hf nowhere --slots 2 --random-weights", "nowhere: expected a config.json"),
    ("--hf tiny --slots 2", "tiny: transformers cannot load it"),  # no weights there
    ("--hf tiny --slots 2 --random-weights --policy lrv", "'lrv'. Did you mean 'lru'"),
    ("--hf tiny --slots 2 --random-weights --prompt hello", "no tokenizer for --prompt"),
    ("--hf tiny --slots 2 --random-weights --prompt a --random-tokens 3", "give one of --prompt and --random-tokens"),
    ("--hf tiny --slots 2 --random-weights --random-tokens 0", "--random-tokens must be at least 1"),
    ("--hf tiny --slots 2 --random-weights --profile p.json", "--profile needs --hardware"),
])
def test_what_the_command_refuses(tiny: Path, arguments: str, message: str) -> None:
    """One line on what is wrong, and exit status 2."""
    done = CliRunner().invoke(app, ["validate", *arguments.split()])
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split()), done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
