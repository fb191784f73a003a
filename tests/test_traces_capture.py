"""Capture from tiny random models, against what the models' own routers say."""

from __future__ import annotations

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from moesim.errors import InputError  # noqa: E402
from moesim.traces import DECODE, PREFILL, read_trace, trace_info  # noqa: E402
from moesim.traces.capture import (  # noqa: E402
    RouterRecorder,
    capture_command,
    capture_routing,
    read_prompts,
)
from moesim.traces.capture_generate import Generation, Settings  # noqa: E402
from moesim.traces.capture_hooks import PassRouting  # noqa: E402
from moesim.traces.capture_scores import iter_scores  # noqa: E402

COMMON = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
          "num_key_value_heads": 2, "num_experts_per_tok": 2, "bos_token_id": None, "eos_token_id": None}
REQUESTS = [(7, [1, 2, 3]), (2, [9]), (5, [4, 4, 60, 8, 1])]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny models run fastest on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def olmoe():
    """Return a tiny OLMoE with 8 experts of which 2 are used."""
    torch.manual_seed(0)
    config = transformers.OlmoeConfig(**COMMON, intermediate_size=16, num_experts=8, pad_token_id=0)
    return transformers.OlmoeForCausalLM(config).eval()


def mixtral():
    """Return a tiny Mixtral with 6 experts of which 2 are used; its gate weights sum to 1."""
    torch.manual_seed(1)
    config = transformers.MixtralConfig(**COMMON, intermediate_size=16, num_local_experts=6)
    return transformers.MixtralForCausalLM(config).eval()


def qwen_sparse():
    """Return a tiny Qwen3-MoE with MoE layers 1 and 3 of 4; the others are dense."""
    torch.manual_seed(2)
    config = transformers.Qwen3MoeConfig(**(COMMON | {"num_hidden_layers": 4}), intermediate_size=16,
                                         moe_intermediate_size=8, num_experts=5, decoder_sparse_step=2)
    return transformers.Qwen3MoeForCausalLM(config).eval()


def router_choice(model, tokens, top_k):
    """Return the top k and their shares of softmax by the model's own router logits, without hooks."""
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([tokens]), output_router_logits=True).router_logits
    shares = torch.stack([layer.float().softmax(dim=-1) for layer in logits], dim=1)
    weights, ids = shares.topk(top_k, dim=-1)
    return ids.numpy(), weights.numpy()


@pytest.mark.parametrize(("build", "experts", "layers", "normalized"), [
    (olmoe, 8, [0, 1, 2], False), (mixtral, 6, [0, 1, 2], True), (qwen_sparse, 5, [1, 3], False)])
def test_captured_routing_is_what_the_routers_chose(tmp_path, build, experts, layers, normalized):
    """Ids, weights, layer ids and expert count agree with the router logits of a hook-free full pass."""
    model = build()
    capture_routing(model, REQUESTS, tmp_path / "a", max_new_tokens=5, seed=0, with_token_ids=True)
    trace = read_trace(tmp_path / "a")
    assert (trace.num_experts, trace.layer_ids.tolist(), trace.num_tokens) == (experts, layers, 3 * 4 + 9)
    for request_id, _ in REQUESTS:
        rows = trace.request_id == request_id
        ids, weights = router_choice(model, trace.token_id[rows].tolist(), 2)
        np.testing.assert_array_equal(trace.expert_ids[rows], ids)
        if normalized:
            weights = weights / weights.sum(axis=-1, keepdims=True)
        np.testing.assert_allclose(trace.gate_weights[rows], weights, atol=1e-3)


def test_phases_positions_and_steps(tmp_path):
    """A prompt is one prefill pass, each fed token one decode pass; requests keep their order."""
    capture_routing(olmoe(), REQUESTS, tmp_path / "a", max_new_tokens=3, seed=0)
    trace = read_trace(tmp_path / "a")
    assert trace.token_id is None
    assert trace.request_id.tolist() == [7] * 5 + [2] * 3 + [5] * 7
    assert trace.position.tolist() == [*range(5), *range(3), *range(7)]
    assert np.flatnonzero(trace.phase == DECODE).tolist() == [3, 4, 6, 7, 13, 14]
    assert set(trace.phase.tolist()) == {PREFILL, DECODE}
    assert trace.step.tolist() == [0, 0, 0, 1, 2, 3, 4, 5, 6, 6, 6, 6, 6, 7, 8]


def test_logits_are_the_same_with_hooks():
    """Hooks change no bit of the output, and none is left behind."""
    model, tokens = olmoe(), torch.tensor([[1, 2, 3, 4]])
    with torch.inference_mode():
        without = model(input_ids=tokens).logits
        recorder = RouterRecorder(model)
        with recorder.attached():
            with_hooks = model(input_ids=tokens).logits
        ids, weights, _ = recorder.take()
    assert torch.equal(without, with_hooks)
    assert ids.shape == weights.shape == (4, 3, 2)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_generated_tokens_are_those_of_generate(tmp_path):
    """Greedy tokens equal those of transformers' own generate."""
    model = olmoe()
    capture_routing(model, [(0, [1, 2, 3])], tmp_path / "a", max_new_tokens=6, seed=0, temperature=0,
                    with_token_ids=True)
    expected = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=6, do_sample=False,
                              attention_mask=torch.ones(1, 3, dtype=torch.long))
    assert read_trace(tmp_path / "a").token_id.tolist() == expected[0, :-1].tolist()


def test_sampling_follows_the_seed_only(tmp_path):
    """The same seed gives the same file, whatever the global generator; another seed other tokens."""
    model = olmoe()
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.manual_seed(ord(name))
        capture_routing(model, REQUESTS, tmp_path / name, max_new_tokens=8, seed=seed, with_token_ids=True)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert read_trace(tmp_path / "a").token_id.tolist() != read_trace(tmp_path / "c").token_id.tolist()


def test_a_request_ends_at_the_end_token(tmp_path):
    """The end-of-sequence token is not fed; without `stop_at_eos` the request goes on."""
    model = olmoe()
    capture_routing(model, REQUESTS[:1], tmp_path / "a", max_new_tokens=9, seed=0, with_token_ids=True)
    tokens = read_trace(tmp_path / "a").token_id.tolist()
    model.config.eos_token_id = [63, tokens[6]]
    end = tokens.index(tokens[6], 3)
    for name, stop, length in (("b", True, end), ("c", False, len(tokens))):
        capture_routing(model, REQUESTS[:1], tmp_path / name, max_new_tokens=9, seed=0, stop_at_eos=stop)
        assert read_trace(tmp_path / name).num_tokens == length


class StopAfterError(Exception):
    """Raised by a progress callback to break a capture."""


def stop_after(count):
    """Return a progress callback that breaks the run after `count` requests."""
    def progress(done, total):
        if done == count:
            raise StopAfterError
    return progress


def test_an_interrupted_capture_goes_on(tmp_path):
    """Broken after a request and resumed, the file equals an uninterrupted one; hooks are off, mode is back."""
    model = olmoe().train()
    seen = []
    settings = {"max_new_tokens": 4, "seed": 3}
    capture_routing(model, REQUESTS, tmp_path / "whole", **settings, progress=lambda *a: seen.append(a))
    with pytest.raises(StopAfterError):
        capture_routing(model, REQUESTS, tmp_path / "a", **settings, progress=stop_after(2))
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(InputError, match="now 4; a run can only be resumed with the same settings"):
        capture_routing(model, REQUESTS, tmp_path / "a", max_new_tokens=4, seed=4, resume=True)
    assert capture_routing(model, REQUESTS, tmp_path / "a", **settings, resume=True) == 1
    assert (tmp_path / "a").read_bytes() == (tmp_path / "whole").read_bytes()
    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(("requests", "changes", "words"), [
    ([], {}, "no requests"),
    ([(0, [1]), (0, [2])], {}, "request 0 is there twice"),
    ([(0, [])], {}, "request 0 has no tokens"),
    ([(3, [1, 64])], {}, "request 3 has token ids outside 0 ... 63"),
    ([(-1, [1])], {}, "request_id must lie in 0"),
    ([(0, [1])], {"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
    ([(0, [1])], {"temperature": -1.0}, "temperature must be finite"),
])
def test_bad_requests_are_refused(tmp_path, requests, changes, words):
    """A wrong request or setting is an error before anything is run or written."""
    with pytest.raises(InputError, match=words):
        capture_routing(olmoe(), requests, tmp_path / "a", **({"max_new_tokens": 2, "seed": 0} | changes))
    assert list(tmp_path.iterdir()) == []


def test_a_dense_model_has_no_routing(tmp_path):
    """A model without experts is told apart."""
    config = transformers.LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=16, num_hidden_layers=1,
                                      num_attention_heads=2)
    with pytest.raises(InputError, match="no module named"):
        capture_routing(transformers.LlamaForCausalLM(config), REQUESTS, tmp_path / "a", max_new_tokens=2, seed=0)


def test_experts_called_otherwise_are_refused():
    """Experts that are not given their ids (as Llama 4's) raise an error that names the module."""
    model = olmoe()
    recorder = RouterRecorder(model)
    with recorder.attached(), pytest.raises(InputError, match=r"'model\.layers\.0\.mlp\.experts' is not called"):
        model.model.layers[0].mlp.experts(torch.zeros(8, 32))
    with recorder.attached(), pytest.raises(InputError, match="was not called in the forward pass"):
        recorder.take()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved tiny OLMoE and a prompts file."""
    path = tmp_path_factory.mktemp("models") / "tiny-olmoe"
    olmoe().save_pretrained(path)
    lines = [json.dumps({"request_id": request, "token_ids": tokens}) for request, tokens in REQUESTS]
    (path.parent / "prompts.jsonl").write_text("\n".join(lines) + "\n\n")
    return path


def test_the_command_loads_a_local_folder(tmp_path, folder):
    """The command gives the routing of the saved model, with its origin in the metadata and no text."""
    prompts = folder.parent / "prompts.jsonl"
    trace = capture_command(folder, prompts, tmp_path / "a", max_new_tokens=3, seed=1)
    capture_routing(olmoe(), REQUESTS, tmp_path / "b", max_new_tokens=3, seed=1)
    np.testing.assert_array_equal(trace.expert_ids, read_trace(tmp_path / "b").expert_ids)
    assert (trace.model, trace.metadata["seed"], trace.token_id) == ("tiny-olmoe", 1, None)
    assert trace.metadata["config"]["hidden_size"] == 32
    assert "token_ids" not in json.dumps(trace_info(tmp_path / "a")["metadata"])


def test_a_finished_capture_is_not_run_again(tmp_path, folder, monkeypatch):
    """Resuming a run that is complete returns its trace without a forward pass."""
    prompts = folder.parent / "prompts.jsonl"
    first = capture_command(folder, prompts, tmp_path / "a", max_new_tokens=3, seed=1)
    monkeypatch.setattr("moesim.traces.capture.capture_routing", None)
    again = capture_command(folder, prompts, tmp_path / "a", max_new_tokens=3, seed=1, resume=True)
    assert again.digest() == first.digest()


@pytest.mark.parametrize("config", [None, "{}", '{"model_type": "no-such-model"}'])
def test_a_folder_without_a_model_is_refused(tmp_path, folder, config):
    """A folder without a config, or with one that transformers does not know, is an error with its path."""
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(InputError) as error:
        capture_command(tmp_path, folder.parent / "prompts.jsonl", tmp_path / "a", max_new_tokens=3, seed=1)
    assert str(error.value).startswith(f"{tmp_path}: ")


@pytest.mark.parametrize(("text", "words"), [
    ("", "no prompts"),
    ('{"request_id": 0, "token_ids": [1]}\n{', ":2: not valid JSON"),
    ('{"request_id": 0}', ":1: expected"),
    ('{"request_id": 0, "token_ids": [1], "text": "x"}', ":1: expected"),
    ('{"request_id": "a", "token_ids": [1]}', ":1: request_id must be a whole number"),
    ('{"request_id": 0, "token_ids": [1.5]}', "token_ids a list of them"),
    ('{"request_id": 0, "token_ids": 3}', "token_ids a list of them"),
])
def test_bad_prompt_lines_are_located(tmp_path, text, words):
    """A bad prompts file is refused with its line."""
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(InputError) as error:
        read_prompts(tmp_path / "p.jsonl")
    assert str(error.value).startswith(str(tmp_path / "p.jsonl"))
    assert words in str(error.value)


def test_the_verb_takes_batches_and_scores(tmp_path, folder):
    """`trace capture` in batches gives the routing of the library call, and writes the scores beside it."""
    from command_line import call_json

    prompts = str(folder.parent / "prompts.jsonl")
    facts = call_json("trace", "capture", str(folder), prompts, "--out", str(tmp_path / "a"), "--max-new-tokens", "3",
                      "--batch-size", "2", "--scores", str(tmp_path / "s"), "--seed", "1")
    capture_routing(olmoe(), REQUESTS, tmp_path / "b", max_new_tokens=3, seed=1, batch_size=2)
    assert read_trace(tmp_path / "a").digest() == read_trace(tmp_path / "b").digest()
    assert (facts["scores"], facts["num_tokens"]) == (str(tmp_path / "s"), 3 * 2 + 9)
    (rows,) = iter_scores(tmp_path / "s")
    assert rows.scores.shape == (15, 3, 8)


@pytest.mark.parametrize(("changes", "words"), [
    ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ({"padding": "middle"}, "padding must be left or right, got 'middle'"),
    ({"temperature": float("nan")}, "temperature must be finite"),
])
def test_bad_settings_are_refused(changes, words):
    """A wrong setting is an error with its name."""
    with pytest.raises(InputError, match=words):
        Settings(**({"max_new_tokens": 2, "seed": 0} | changes))


def test_rows_that_cannot_be_told_apart_are_refused():
    """Experts that are given another number of rows than the pass has tokens raise an error."""
    model = olmoe()
    recorder = RouterRecorder(model)
    generation = Generation(model, recorder, Settings(2, 0))
    recorder.take = lambda: PassRouting(np.zeros((2, 3, 2), int), None, None)
    with torch.inference_mode(), pytest.raises(InputError, match="given 2 rows in a pass of 3 tokens"):
        generation.run([(0, [1, 2, 3])])
