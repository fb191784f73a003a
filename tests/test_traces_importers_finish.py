"""What happens between a reader and a trace: padding, filler rows, layer names, slots; counts likewise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from foreign_files import COUNTS, ROUTING, SLOTS, TOKENS, slot_counts, slots_of
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from moesim.errors import InputError
from moesim.model import load_model
from moesim.model.spec import ModelSpec
from moesim.traces.counts import CountTrace
from moesim.traces.importers import RawCounts, RawRouting, import_any, import_trace
from moesim.traces.importers.finish import Wishes, count_trace, routing_trace
from moesim.traces.trace import PAD


def raw(ids: np.ndarray, **changes: Any) -> RawRouting:
    """Return a recording of one request."""
    tokens, layers = ids.shape[:2]
    values = {"request_id": np.zeros(tokens, int), "position": np.arange(tokens), "layer_ids": np.arange(layers)}
    return RawRouting(ids, **(values | changes))


def dense_model() -> ModelSpec:
    """Return a model of 4 layers, the first of them dense, with the experts of ROUTING."""
    return load_model("deepseek-v2-lite").replace(
        num_layers=4, moe_layers=(1, 2, 3), num_experts=8, top_k=2, name="small")


def with_dense(ids: np.ndarray, fill: int) -> np.ndarray:
    """Return ids with a layer of filling before the first."""
    return np.insert(ids, 0, fill, axis=1)


@pytest.mark.parametrize("fill", [0, PAD, 5])
def test_rows_of_dense_layers(fill: int) -> None:
    """A recorder that keeps all layers fills dense ones; they are dropped, and the others keep the model's index."""
    found = routing_trace(raw(with_dense(ROUTING, fill)), Wishes())
    assert np.array_equal(found.expert_ids, ROUTING)
    assert found.layer_ids.tolist() == [1, 2, 3]
    found = routing_trace(raw(with_dense(ROUTING, fill)), Wishes(spec=dense_model()))
    assert (found.layer_ids.tolist(), found.model) == ([1, 2, 3], "small")
    assert "kept the 3 MoE layers of small, of 4 layers" in found.metadata["notes"]


def test_layers_that_count_from_0_are_named_by_the_model() -> None:
    """A file of MoE layers only has the same trace: the model says which layers they are."""
    found = routing_trace(raw(ROUTING), Wishes(spec=dense_model()))
    assert (found.layer_ids.tolist(), found.num_experts) == ([1, 2, 3], 8)


@pytest.mark.parametrize(("layer_ids", "words"), [
    ([0, 1, 2], "lacks MoE layer 3"), ([1, 2, 4], "lacks MoE layer 3"), ([2, 3, 7], "lacks MoE layer 1")])
def test_named_layers_must_be_the_models(layer_ids: list[int], words: str) -> None:
    """Where the file names its layers, they are compared and not renamed."""
    with pytest.raises(InputError, match=words):
        routing_trace(raw(ROUTING, layer_ids=np.array(layer_ids), layers_named=True), Wishes(spec=dense_model()))
    found = routing_trace(raw(ROUTING, layer_ids=np.array([1, 2, 3]), layers_named=True), Wishes(spec=dense_model()))
    assert found.layer_ids.tolist() == [1, 2, 3]


def test_a_routed_layer_that_the_model_has_not() -> None:
    """A dense layer of the model that routes, or a MoE layer that does not, is an error."""
    ids = with_dense(ROUTING, 0)
    ids[:, 0] = (1, 2)
    with pytest.raises(InputError, match="the file routes layer 0"):
        routing_trace(raw(ids, layers_named=True), Wishes(spec=dense_model()))
    ids = with_dense(ROUTING, 0)
    ids[:, 2] = 0
    with pytest.raises(InputError, match="layer 2 of the file is a MoE layer of 'small', but it holds one repeated id"):
        routing_trace(raw(ids), Wishes(spec=dense_model()))
    with pytest.raises(InputError, match="the file has 5 layers, but model 'small' has 4"):
        routing_trace(raw(with_dense(with_dense(ROUTING, 0), 0)), Wishes(spec=dense_model()))


@pytest.mark.parametrize(("filler", "kept"), [((0,), range(1, TOKENS)), ((TOKENS - 1,), range(TOKENS - 1))])
@pytest.mark.parametrize("fill", [0, PAD])
def test_rows_that_were_never_routed(filler: tuple[int, ...], kept: range, fill: int) -> None:
    """Zeros or padding in every layer at an end of a request: left out, noted, positions stay true."""
    ids = ROUTING.copy()
    ids[list(filler)] = fill
    found = routing_trace(raw(ids), Wishes())
    assert np.array_equal(found.expert_ids, ROUTING[kept])
    assert found.position.tolist() == list(kept)
    assert any("left out 1 rows of zeros or padding" in note for note in found.metadata["notes"])


def test_a_hole_in_a_request() -> None:
    """A row that was never routed between rows that were is an error that names it."""
    ids = ROUTING.copy()
    ids[4] = 0
    with pytest.raises(InputError, match="row 4 holds zeros or padding in every layer"):
        routing_trace(raw(ids), Wishes())
    with pytest.raises(InputError, match="every layer holds one repeated id"):
        routing_trace(raw(ids * 0), Wishes())


def test_expert_0_for_every_token_is_not_filling_with_top_1() -> None:
    """With one expert per token a repeated id may be real routing: it stays."""
    ids = np.zeros((5, 2, 1), int)
    ids[2] = 1
    assert np.array_equal(routing_trace(raw(ids), Wishes()).expert_ids, ids)


@given(hnp.arrays(bool, (6, 2, 4)), st.integers(0, 2**32 - 1))
def test_padding_goes_to_the_end(padded: np.ndarray, seed: int) -> None:
    """Wherever -1 stands in a row, the experts keep their order and the weights stay with them."""
    rng = np.random.default_rng(seed)
    ids: np.ndarray = rng.permuted(np.tile(np.arange(8), (6, 2, 1)), axis=2)[..., :4]
    padded = padded.copy()
    padded[:, :, 0] &= ~padded.all(axis=2)  # no cell without an expert here
    ids[padded] = PAD
    weights = ids / 16 + 0.25
    found = routing_trace(raw(ids, gate_weights=weights), Wishes(num_experts=8))
    assert found.gate_weights is not None
    for token in range(6):
        for layer in range(2):
            row = [(i, w) for i, w in zip(ids[token, layer], weights[token, layer], strict=True) if i != PAD]
            row += [(PAD, 0.0)] * (4 - len(row))
            assert list(zip(found.expert_ids[token, layer].tolist(), found.gate_weights[token, layer].tolist(),
                            strict=True)) == row


@pytest.mark.parametrize(("dtype", "wrapped"), [(np.uint8, 255), (np.uint16, 65535)])
def test_wrapped_padding(dtype: type, wrapped: int) -> None:
    """-1 in an unsigned array is its largest value: padding where the experts are known to be fewer, else refused."""
    ids = ROUTING.astype(dtype)
    ids[3, 1, 1] = wrapped
    found = routing_trace(raw(ids), Wishes(num_experts=8))
    assert found.expert_ids[3, 1].tolist() == [ROUTING[3, 1, 0], PAD]
    assert any("padding (a wrapped -1)" in note for note in found.metadata["notes"])
    with pytest.raises(InputError, match="state num_experts"):
        routing_trace(raw(ids), Wishes())


def test_255_of_256_experts_is_an_expert() -> None:
    """Ids that reach over half of uint8 are those of a large model."""
    ids = np.array([[[255, 3]], [[200, 1]], [[0, 255]]], np.uint8)
    assert routing_trace(raw(ids), Wishes()).expert_ids[0, 0].tolist() == [255, 3]
    assert routing_trace(raw(ids), Wishes(num_experts=256)).num_experts == 256


def test_slots_need_their_map() -> None:
    """Physical ids are turned into experts by the map, or refused with the reason."""
    slots = slots_of(ROUTING)
    assert slots.max() >= 8
    with pytest.raises(InputError, match=r"the ids are physical .* --physical-to-logical FILE"):
        routing_trace(raw(slots, physical=True), Wishes())
    for changes, wishes in (({"physical_to_logical": SLOTS, "physical": True}, Wishes()),
                            ({}, Wishes(physical_to_logical=SLOTS)),
                            ({"physical_to_logical": SLOTS * 0, "physical": True}, Wishes(physical_to_logical=SLOTS))):
        found = routing_trace(raw(slots, **changes), wishes)
        assert np.array_equal(found.expert_ids, ROUTING)
        assert found.num_experts == 8


def test_maps_that_do_not_fit() -> None:
    """A map of other layers or fewer slots, or one that sends two slots of a token to one expert, is an error."""
    slots = slots_of(ROUTING)
    with pytest.raises(InputError, match="map has 2 layers, the file 3"):
        routing_trace(raw(slots), Wishes(physical_to_logical=SLOTS[:2]))
    with pytest.raises(InputError, match=r"slot \d is not in the physical-to-logical map of 8 slots"):
        routing_trace(raw(slots), Wishes(physical_to_logical=SLOTS[:, :8]))
    with pytest.raises(InputError, match="names an expert twice"):
        routing_trace(raw(slots), Wishes(physical_to_logical=SLOTS * 0))


def test_a_map_for_all_layers_of_the_model() -> None:
    """The engine's map has rows for dense layers too; they go with their layers."""
    table = np.vstack([np.arange(10)[None] % 8, SLOTS])
    found = routing_trace(raw(with_dense(slots_of(ROUTING), PAD)), Wishes(physical_to_logical=table))
    assert np.array_equal(found.expert_ids, ROUTING)
    short = routing_trace(raw(with_dense(slots_of(ROUTING), PAD)), Wishes(physical_to_logical=SLOTS))
    assert np.array_equal(short.expert_ids, ROUTING)


@pytest.mark.parametrize("form", ["list", "dict", "npy", "pt"])
def test_maps_from_files(form: str, tmp_path: Path) -> None:
    """The map is read from JSON (plain or SGLang's), .npy and .pt."""
    path = tmp_path / f"map.{form}"
    if form == "npy":
        np.save(path.open("wb"), SLOTS)
    elif form == "pt":
        torch = pytest.importorskip("torch")
        torch.save({"physical_to_logical_map": torch.from_numpy(SLOTS)}, path)
    else:
        path.write_text(json.dumps(SLOTS.tolist() if form == "list" else {"physical_to_logical_map": SLOTS.tolist()}))
    np.save(tmp_path / "ids.npy", slots_of(ROUTING))
    trace = import_trace(tmp_path / "ids.npy", physical_to_logical=path)
    assert np.array_equal(trace.expert_ids, ROUTING)


@pytest.mark.parametrize(("text", "words"), [
    ("", "not valid JSON"), ("{}", "expected a map under one of"), ("[[0, 1], [2]]", "rows of different lengths"),
    ("[[0, -1]]", "must hold experts 0"), ("[[0, 1.5]]", "expected lists of whole numbers"), ("[1]", "[layer, slot]"),
    ('{"physical_to_logical_map": "x"}', "expected lists of whole numbers"), ("[[1e400]]", "whole numbers"),
    ("[[99999999999999999999999]]", "whole numbers"), ("[[true]]", "whole numbers")])
def test_bad_maps_are_named(text: str, words: str, tmp_path: Path) -> None:
    """A map file that is none is an error that names it."""
    (tmp_path / "map.json").write_text(text)
    np.save(tmp_path / "ids.npy", slots_of(ROUTING))
    with pytest.raises(InputError) as error:
        import_trace(tmp_path / "ids.npy", physical_to_logical=tmp_path / "map.json")
    assert words in str(error.value)
    assert "map.json" in str(error.value)


def test_ids_below_their_base() -> None:
    """An id below id_base is an error, and never becomes padding."""
    assert np.array_equal(routing_trace(raw(ROUTING + 1), Wishes(id_base=1)).expert_ids, ROUTING)
    with pytest.raises(InputError, match="an id of 0 is below id_base 1"):
        routing_trace(raw(ROUTING), Wishes(id_base=1))


def counts_of(counts: np.ndarray, **changes: Any) -> RawCounts:
    """Return counts as a reader hands them over."""
    return RawCounts(counts, np.arange(counts.shape[1]), "pass", **changes)


def test_counts_lose_unused_windows_and_dense_layers() -> None:
    """Rows of zeros of a ring buffer and of dense layers go; what is left keeps its place."""
    counts = np.zeros((4, 4, 8), int)
    counts[1, 1:] = counts[3, 1:] = COUNTS
    found = count_trace(counts_of(counts, layers_named=True), Wishes())
    assert isinstance(found, CountTrace)
    assert (found.counts.shape, found.layer_ids.tolist()) == ((2, 3, 8), [1, 2, 3])
    assert found.metadata["notes"] == ["left out 2 windows of zeros (unused rows of the recorder)",
                                       "left out layer 0: it has no counts (a dense layer)"]
    assert count_trace(counts_of(counts), Wishes(spec=dense_model())).model == "small"
    assert count_trace(counts_of(counts), Wishes(skip_rows=2)).num_windows == 1


def test_counts_of_slots_are_added_up_per_expert() -> None:
    """Each copy's count goes to its expert; nothing is lost."""
    counts = slot_counts()[None]
    found = count_trace(counts_of(counts, physical=True, physical_to_logical=SLOTS), Wishes())
    assert np.array_equal(found.counts[0], COUNTS)
    with pytest.raises(InputError, match="--physical-to-logical"):
        count_trace(counts_of(counts, physical=True), Wishes())
    with pytest.raises(InputError, match="10 slots are counted, the physical-to-logical map has 9"):
        count_trace(counts_of(counts, physical=True), Wishes(physical_to_logical=SLOTS[:, :9]))


@pytest.mark.parametrize(("wishes", "words"), [
    (Wishes(phase="decode"), "phase does not apply"), (Wishes(id_base=1), "id_base does not apply"),
    (Wishes(skip_rows=1), "skip_rows must lie in 0 ... 0 (windows), got 1"),
    (Wishes(num_experts=9), "the file counts 8 experts, not 9")])
def test_options_that_counts_have_not(wishes: Wishes, words: str) -> None:
    """What only tokens have is refused for counts."""
    with pytest.raises(InputError) as error:
        count_trace(counts_of(COUNTS[None]), wishes)
    assert words in str(error.value)


@pytest.mark.parametrize(("axes", "order"), [("window,layer,expert", (0, 1, 2)), ("expert,layer,window", (2, 1, 0)),
                                             ("layer,window,expert", (1, 0, 2))])
def test_counts_with_stated_axes(axes: str, order: tuple[int, ...], tmp_path: Path) -> None:
    """An array whose axes name "expert" is read as counts, in any order."""
    counts = np.stack([COUNTS, 2 * COUNTS])
    np.save(tmp_path / "c.npy", counts.transpose(order))
    found = import_any(tmp_path / "c.npy", axes=axes)
    assert isinstance(found, CountTrace)
    assert np.array_equal(found.counts, counts)


def test_counts_in_an_archive(tmp_path: Path) -> None:
    """`counts` is found by its name; [layer, expert] is one window; layer ids can be stated."""
    np.savez(tmp_path / "c.npz", counts=COUNTS[None], other=COUNTS.T.astype(float))
    assert np.array_equal(import_any(tmp_path / "c.npz").expert_load(), COUNTS)  # type: ignore[union-attr]
    found = import_any(tmp_path / "c.npz", axes="expert,layer", counts_key="other", layer_ids="0,7,15")
    assert isinstance(found, CountTrace)
    assert (found.layer_ids.tolist(), found.counts.tolist()) == ([0, 7, 15], COUNTS[None].tolist())


@pytest.mark.parametrize(("change", "words"), [
    (lambda c: c / 3, "counts must be whole numbers, found"), (lambda c: c * np.nan, "counts must be finite"),
    (lambda c: c - 99, "from 0 to 2^62"), (lambda c: c.astype(float) * 1e30, "from 0 to 2^62"),
    (lambda c: c * 0, "every count is 0"), (lambda c: c > 0, "counts must be whole numbers from 0")])
def test_counts_that_are_none(change: Any, words: str, tmp_path: Path) -> None:
    """Shares, NaN, negative and far too large counts are named."""
    np.save(tmp_path / "c.npy", change(COUNTS))
    with pytest.raises(InputError) as error:
        import_any(tmp_path / "c.npy", axes="layer,expert")
    assert words in str(error.value)
