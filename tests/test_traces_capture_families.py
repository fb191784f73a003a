"""Capture on tiny random models of every family: what the experts really do is what is recorded."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from capture_families import FAMILIES, RECURRENT, WINDOWED, build  # noqa: E402

from moesim.errors import InputError  # noqa: E402
from moesim.traces import read_trace  # noqa: E402
from moesim.traces.capture import capture_routing  # noqa: E402
from moesim.traces.capture_hooks import RouterRecorder, without_zero_experts  # noqa: E402

TOKENS = torch.tensor([[5, 9, 9, 3, 60, 21, 8, 40, 33, 2], [7, 1, 30, 31, 50, 51, 52, 2, 2, 6]])
REQUESTS = [(7, [1, 2, 3]), (2, [9]), (5, [4, 4, 60, 8, 1, 33]), (1, [11, 12])]

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny models run fastest on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def recorded(model, tokens=TOKENS, **options):
    """Return (logits, routing) of one hooked pass."""
    recorder = RouterRecorder(model, **options)
    with torch.inference_mode(), recorder.attached():
        logits = model(input_ids=tokens).logits
    return logits, recorder.take()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_outputs_do_not_change(family):
    """Logits with hooks, scores included, are bit for bit those without, and no hook is left behind."""
    model = build(family)
    with torch.inference_mode():
        before = model(input_ids=TOKENS).logits
    during, routing = recorded(model, with_scores=True)
    with torch.inference_mode():
        after = model(input_ids=TOKENS).logits
    assert torch.equal(before, during)
    assert torch.equal(before, after)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    recorder = RouterRecorder(model)
    assert (recorder.layer_ids, recorder.num_experts) == (FAMILIES[family][2], 8)
    width = 16 if family == "longcat_flash" else 8  # its zero experts have scores too
    assert routing.scores.shape == (TOKENS.numel(), len(recorder.layer_ids), width)


def poisoned(model, place, expert):
    """Return which tokens' hidden states after MoE layer `place` change to NaN with that expert's weights."""
    experts = RouterRecorder(model).modules[place][1]
    down = next(value for key, value in experts.named_parameters() if key.endswith(("down_proj", "w2")))
    per_expert = down.view(8, -1)  # DBRX keeps all experts in one matrix
    kept = per_expert[expert].clone()
    seen = []
    handle = experts.register_forward_hook(lambda module, args, output: seen.append(output.reshape(TOKENS.numel(), -1)))
    with torch.inference_mode():
        per_expert[expert] = torch.nan
        model(input_ids=TOKENS)
        per_expert[expert] = kept
    handle.remove()
    return seen[0].isnan().any(dim=-1).numpy()


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"llama4"}))
def test_recorded_experts_are_those_that_compute(family):
    """Poisoning one expert's weights poisons exactly the tokens that are recorded as its own."""
    model = build(family)
    model.set_experts_implementation("eager")
    _, routing = recorded(model)
    hit = 0
    for place in (0, routing.ids.shape[1] - 1):
        for expert in range(8):
            own = (routing.ids[:, place] == expert).any(axis=-1)
            np.testing.assert_array_equal(poisoned(model, place, expert), own)
            hit += own.sum()
    assert hit > 0


def test_llama4_experts_and_weights():
    """Llama-4's experts are the top of its router's logits, their weights the sigmoids."""
    model = build("llama4")
    _, routing = recorded(model, with_scores=True)
    best = np.sort(routing.scores, axis=-1)[..., ::-1][..., :2]
    np.testing.assert_array_equal(np.take_along_axis(routing.scores, routing.ids, axis=-1), best)
    np.testing.assert_allclose(routing.weights, 1 / (1 + np.exp(-best)), rtol=1e-5)


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "glm4_moe"])
def test_grouped_and_corrected_choices_are_not_recomputed(family):
    """Three ids keep to 2 of 4 groups of experts, and somewhere differ from the top of the plain scores."""
    _, routing = recorded(build(family), with_scores=True)
    groups = routing.ids // 2
    assert max(len(set(row)) for row in groups.reshape(-1, 3).tolist()) == 2
    top = np.argsort(-routing.scores, axis=-1)[..., :3]
    assert (np.sort(top) != np.sort(routing.ids)).any()


def test_zero_experts_are_padding():
    """LongCat-Flash's choices of zero experts become -1 at the end of a row, with weight 0."""
    _, routing = recorded(build("longcat_flash"))
    none = routing.ids < 0
    assert 0 < none.sum() < none.size
    assert (np.diff(none.astype(int), axis=-1) >= 0).all()
    assert (routing.weights[none] == 0).all()
    assert (routing.weights[~none] > 0).all()
    ids, weights = without_zero_experts(np.array([[[9, 3, 8, 1]]]), np.array([[[0.4, 0.3, 0.2, 0.1]]]), 8)
    assert ids.tolist() == [[[3, 1, -1, -1]]]
    assert weights.tolist() == [[[0.3, 0.1, 0, 0]]]


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("padding", ["left", "right"])
def test_batches_give_what_requests_give_alone(tmp_path, family, padding):
    """Prefill and decode in padded batches of three record the tokens and experts of each request by itself."""
    model = build(family, double=True)
    settings = {"max_new_tokens": 5, "seed": 4, "with_token_ids": True}
    if padding == "right" and family in (*RECURRENT, *WINDOWED):
        with pytest.raises(InputError, match="use padding on the left"):
            capture_routing(model, REQUESTS, tmp_path / "a", batch_size=3, padding="right", **settings)
        return
    capture_routing(model, REQUESTS, tmp_path / "alone", **settings)
    capture_routing(model, REQUESTS, tmp_path / "batch", batch_size=3, padding=padding, **settings)
    alone, batch = read_trace(tmp_path / "alone"), read_trace(tmp_path / "batch")
    for name in ("request_id", "position", "phase", "token_id", "expert_ids"):
        np.testing.assert_array_equal(getattr(alone, name), getattr(batch, name), err_msg=name)
    np.testing.assert_allclose(alone.gate_weights, batch.gate_weights, atol=1e-3)  # kept as float16
    assert batch.step.max() == 9  # two batches of five passes
    assert alone.step.max() == 19
