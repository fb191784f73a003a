"""Damaged and hostile files: every importer answers with one clear error or a valid result, never anything else."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from foreign_files import NUM_EXPERTS, ROUTING, SAMPLES, Sample, gguf, mblt, npz, policylang, rtrace, safetensors

from moesim.errors import InputError
from moesim.traces.arrivals import Arrivals
from moesim.traces.counts import CountTrace
from moesim.traces.importers import import_any, import_trace
from moesim.traces.trace import RoutingTrace

DAMAGES_PER_SAMPLE = 150


def _cut(data: bytes, rng: np.random.Generator) -> bytes:
    return data[:int(rng.integers(len(data)))]


def _flip(data: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(data)
    for place in rng.integers(len(data), size=int(rng.integers(1, 6))):
        changed[place] ^= int(rng.integers(1, 256))
    return bytes(changed)


def _shuffle(data: bytes, rng: np.random.Generator) -> bytes:
    size = int(rng.integers(1, 64))
    blocks = [data[start:start + size] for start in range(0, len(data), size)]
    first, second = rng.integers(len(blocks), size=2)
    blocks[first], blocks[second] = blocks[second], blocks[first]
    return b"".join(blocks)


def _huge(data: bytes, rng: np.random.Generator) -> bytes:
    place = int(rng.integers(len(data)))
    value = [b"\xff\xff\xff\x7f", b"\xff" * 8, b"\xff" * 4, b"\0\0\0\x80", b"\0" * 8][int(rng.integers(5))]
    return data[:place] + value + data[place + len(value):]


def _digits(data: bytes, rng: np.random.Generator) -> bytes:
    """Replace a number in text by one that is out of place."""
    places = [i for i, byte in enumerate(data) if 48 <= byte <= 57]
    if not places:
        return _flip(data, rng)
    place = places[int(rng.integers(len(places)))]
    words = [b"-1", b"1e400", b"NaN", b"99999999999999999999", b"null", b'"x"', b"[]", b"1.5", b"true", b"9" * 5000]
    return data[:place] + words[int(rng.integers(len(words)))] + data[place + 1:]


def _insert(data: bytes, rng: np.random.Generator) -> bytes:
    place = int(rng.integers(len(data)))
    return data[:place] + rng.bytes(int(rng.integers(1, 40))) + data[place:]


DAMAGES: list[Callable[[bytes, np.random.Generator], bytes]] = [_cut, _flip, _shuffle, _huge, _digits, _insert]


def _import(path: Path, **options: Any) -> RoutingTrace | CountTrace | Arrivals | None:
    """Return what the importer made of a file, or None for its error (one line that names the file)."""
    try:
        return import_any(path, **options)
    except InputError as error:
        text = str(error)
    assert text.startswith(str(path))
    assert "\n" not in text
    return None


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)
def test_damaged_files(sample: Sample, tmp_path: Path) -> None:
    """Cut, flipped, shuffled, overwritten and lengthened files: an InputError or a checked result."""
    if sample.needs_torch:
        pytest.importorskip("torch")
    path = sample.write(tmp_path)
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    rng = np.random.default_rng(zlib.crc32(sample.name.encode()))
    errors = 0
    for round_ in range(DAMAGES_PER_SAMPLE):
        file = files[int(rng.integers(len(files)))]
        data = file.read_bytes()
        file.write_bytes(DAMAGES[round_ % len(DAMAGES)](data, rng))
        errors += _import(path, source_format=sample.name, **sample.options) is None
        if round_ % 5 == 0:
            _import(path)  # whatever it looks like now
        file.write_bytes(data)
    assert errors >= DAMAGES_PER_SAMPLE // 10


@pytest.mark.parametrize("name", [sample.name for sample in SAMPLES])
@pytest.mark.parametrize("other", [sample for sample in SAMPLES if not sample.needs_torch], ids=lambda sample: sample.name)
def test_a_file_of_another_format(other: Sample, name: str, tmp_path: Path) -> None:
    """Every importer on every other format's file: an error, or a checked result where the content is the same."""
    _import(other.write(tmp_path), source_format=name)


def test_a_flipped_archive_never_changes_ids(tmp_path: Path) -> None:
    """The archive's checksums catch every change of its values."""
    path = npz(tmp_path)
    data = path.read_bytes()
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1:])
        found = _import(path, source_format="npz")
        assert found is None or (isinstance(found, RoutingTrace) and np.array_equal(found.expert_ids, ROUTING))


@pytest.mark.parametrize("sample", [s for s in SAMPLES if s.name in {
    "npz", "npy", "exflow", "moe-infinity", "imatrix", "rtrace", "moe-policylang", "moe-policylang-parquet"}],
    ids=lambda sample: sample.name)
def test_no_cut_goes_unnoticed(sample: Sample, tmp_path: Path) -> None:
    """Where a size or count is announced, every strict prefix is an error (RTRACE01: but for whole records)."""
    path = sample.write(tmp_path)
    data = path.read_bytes()
    record = 8 + 4 * NUM_EXPERTS
    for end in range(0, len(data), max(1, len(data) // 400)):
        if sample.name == "rtrace" and end > 16 and (end - 16) % record == 0:
            continue
        if data[end:].strip() == b"":
            continue  # only the last line's end is missing
        path.write_bytes(data[:end])
        assert _import(path, source_format=sample.name, **sample.options) is None, end


@pytest.mark.parametrize("name", ["mblt", "expert-log"])
def test_a_cut_recording_is_the_start_of_the_whole_one(name: str, tmp_path: Path) -> None:
    """Where a stopped recorder is accepted, what is read is a prefix of what was recorded."""
    sample = next(sample for sample in SAMPLES if sample.name == name)
    path = sample.write(tmp_path)
    data = path.read_bytes()
    read = 0
    for end in range(0, len(data), 7):
        path.write_bytes(data[:end] if name == "mblt" else data[:data.rfind(b"\n", 0, end) + 1])
        found = _import(path, source_format=name)
        if found is not None:
            assert isinstance(found, RoutingTrace)
            assert np.array_equal(found.expert_ids, ROUTING[:found.num_tokens])
            read += 1
    assert read > 10


class Evil:
    """Touches a file when it is unpickled."""

    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("kind", ["bare", "npy", "npz", "torch", "torch-old"])
def test_nothing_is_unpickled(kind: str, tmp_path: Path) -> None:
    """A pickle that runs a command does not run it, wherever it hides."""
    mark, path = tmp_path / "ran", tmp_path / "evil.bin"
    evil = Evil(str(mark))
    names = ["npz", "npy", "exflow", "moe-infinity"]
    if kind == "bare":
        path.write_bytes(pickle.dumps(evil))
    elif kind in ("npy", "npz"):
        array = np.array([evil], dtype=object)
        with open(path, "wb") as file:
            (np.save if kind == "npy" else np.savez)(file, array)  # type: ignore[operator]
    else:
        torch = pytest.importorskip("torch")
        names = ["sglang-stat", "sglang-per-pass", "sglang-per-token"]
        torch.save({"logical_count": evil, "records": [{"topk_ids_of_layer": evil, "global_physical_count": 0}]}, path,
                   _use_new_zipfile_serialization=kind == "torch")
    for name in (None, *names):
        assert _import(path, source_format=name) is None
    with pytest.raises(InputError):
        import_any(npz(tmp_path), physical_to_logical=path)
    assert not mark.exists()


def _npy(path: Path, header: str, body: bytes = b"") -> None:
    text = header.encode()
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + body)


def _npy_bomb(path: Path) -> None:
    _npy(path, "{'descr': '<i8', 'fortran_order': False, 'shape': (1000000, 1000, 1000), }\n")


def _npy_product_overflows(path: Path) -> None:
    _npy(path, "{'descr': '<i8', 'fortran_order': False, 'shape': (4294967296, 4294967296, 1), }\n")


def _npy_code(path: Path) -> None:
    _npy(path, "{'descr': __import__('os').getcwd(), 'fortran_order': False, 'shape': (1,), }\n", b"\0" * 8)


def _npy_nested(path: Path) -> None:
    _npy(path, "(" * 5000)


def _zip_bomb(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("expert_ids.npy", "w") as file:
        head = io.BytesIO()
        np.lib.format.write_array_header_1_0(head, {"descr": "|u1", "fortran_order": False, "shape": (128 << 20, 1, 1)})
        file.write(head.getvalue())
        for _ in range(128):
            file.write(bytes(1 << 20))


def _gguf_huge(path: Path) -> None:
    gguf(path, [("general.type", 9, struct.pack("<IQ", 4, 1 << 60))], {})


def _gguf_deep(path: Path) -> None:
    gguf(path, [("general.type", 9, struct.pack("<IQ", 9, 1) * 4000)], {})


def _gguf_many(path: Path) -> None:
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1 << 62, 1 << 62) + b"imatrix")


def _gguf_tensor(path: Path) -> None:
    name = b"blk.0.ffn_up_exps.weight.counts"
    body = struct.pack("<Q", len(name)) + name + struct.pack("<IQQIQ", 2, 1 << 40, 1 << 40, 0, 0)
    key = b"general.type"
    fact = struct.pack("<Q", len(key)) + key + struct.pack("<IQ", 8, 7) + b"imatrix"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + fact + body)


def _mblt_huge(path: Path) -> None:
    path.write_bytes(struct.pack("<4siiiii", b"MBLT", 1, 8, 0, 2, 2**31 - 1))


def _rtrace_nan(path: Path) -> None:
    path.write_bytes(b"RTRACE01" + struct.pack("<iiii8f", 8, 0, 0, 0, *[float("nan")] * 8))


def _deep_json(path: Path) -> None:
    path.write_text('{"choices": ' + "[" * 100_000)


def _long_number(path: Path) -> None:
    path.write_text('{"timestamp": ' + "9" * 5000 + ', "input_length": 1, "output_length": 1}')


def _infinite_time(path: Path) -> None:
    path.write_text('{"timestamp": Infinity, "input_length": 1, "output_length": 1}')


HOSTILE = [
    (_npy_bomb, "npy", "announces 8000000000000 bytes"),
    (_npy_product_overflows, "npy", "announces 147573952589676412928 bytes"),
    (_npy_code, "npy", "bad header"),
    (_npy_nested, "npy", "bad header"),
    (_zip_bomb, "npz", "announces 1342"),
    (_gguf_huge, "imatrix", "of 1152921504606846976 elements (4611686018427387904 bytes expected, 4 left)"),
    (_gguf_deep, "imatrix", "has the unknown type 9"),
    (_gguf_many, "imatrix", "the file ends within a table of 4611686018427387904 tensors"),
    (_gguf_tensor, "imatrix", "but the file has 134"),
    (_mblt_huge, "mblt", "no whole forward pass"),
    (_rtrace_nan, "rtrace", "row 0 is not a softmax"),
    (_deep_json, "vllm", "not valid JSON: RecursionError"),
    (_long_number, "mooncake", "not valid JSON: ValueError"),
    (_infinite_time, "mooncake", "expected a time in seconds, found inf"),
]


@pytest.mark.parametrize(("make", "name", "words"), HOSTILE, ids=lambda value: getattr(value, "__name__", None))
def test_hostile_files_cost_nothing(make: Callable[[Path], None], name: str, words: str, tmp_path: Path) -> None:
    """Sizes that a header announces are checked before anything is allocated."""
    path = tmp_path / "hostile.bin"
    make(path)
    tracemalloc.start()
    try:
        with pytest.raises(InputError) as error:
            import_any(path, source_format=name, **({"top_k": 2} if name == "rtrace" else {}))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert words in str(error.value)
    assert peak < 32 << 20


def test_a_parquet_file_of_too_many_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run-length encoding puts any number of equal values into a small file: their number is held against a limit."""
    from moesim.traces.importers import policylang as reader

    zeros = pa.array(np.zeros(100_000, np.int32))
    lists = pa.array([[0]] * 100_000, pa.list_(pa.int32()))
    pq.write_table(pa.table({"prompt_id": zeros, "token_idx": zeros, "layer_idx": zeros, "selected_experts": lists}),
                   tmp_path / "t.parquet")
    assert (tmp_path / "t.parquet").stat().st_size < 10_000
    monkeypatch.setattr(reader, "_MAX_VALUES", 399_999)
    with pytest.raises(InputError, match="announces 400000 values, more than 399999"):
        import_any(tmp_path / "t.parquet")


def test_a_tensor_larger_than_its_storage_is_refused(tmp_path: Path) -> None:
    """A tensor whose strides repeat one value announces any size; it is refused before it is copied."""
    torch = pytest.importorskip("torch")
    path = tmp_path / "expanded.pt"
    torch.save({"logical_count": torch.ones(1, dtype=torch.int32).expand(1000, 1000, 1000)}, path)
    with pytest.raises(InputError, match="is larger than the values that the file holds"):
        import_any(path)


@pytest.mark.parametrize("header", [
    {"a": {"dtype": "I64", "shape": [1 << 40], "data_offsets": [0, 8 << 40]}},
    {"a": {"dtype": "I64", "shape": [2], "data_offsets": [8, 0]}},
    {"a": {"dtype": "I64", "shape": [-1], "data_offsets": [0, 8]}},
    {"a": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}},
    {"a": {"dtype": "I64", "shape": [True], "data_offsets": [0, 8]}},
    {"a": []}, [], {"a": {"dtype": ["I64"], "shape": [1], "data_offsets": [0, 8]}},
])
def test_bad_safetensors_headers(header: Any, tmp_path: Path) -> None:
    """Offsets and shapes of a safetensors table must lie within the file."""
    text = json.dumps(header).encode()
    (tmp_path / "rank0.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 16)
    assert _import(tmp_path, source_format="tensorrt-llm") is None
    (tmp_path / "rank0.safetensors").write_bytes(struct.pack("<Q", 1 << 62) + text)
    assert _import(tmp_path, source_format="tensorrt-llm") is None


@pytest.mark.parametrize(("change", "words"), [
    (lambda ids: ids * 0 - 2, "expert id -2 is outside -1"),
    (lambda ids: ids + 40_000, "expert id 40"),
    (lambda ids: ids.astype(np.int64) + (1 << 40), "is outside -1"),
    (lambda ids: ids.astype(np.uint64) + np.uint64(1 << 63), "is outside -1"),
    (lambda ids: ids.astype(complex), "expected numbers"),
    (lambda ids: ids.astype("U3"), "expected numbers"),
    (lambda ids: ids.astype(bool), "expert ids must be integers, found bool"),
    (lambda ids: ids.astype("M8[s]"), "expected numbers"),
    (lambda ids: ids[:, :0], "is empty"),
    (lambda ids: ids[None], "found shape (1, "),
])
def test_wrong_values_and_dtypes(change: Callable[[np.ndarray], np.ndarray], words: str, tmp_path: Path) -> None:
    """Negative and far too large ids, and arrays of other things than whole numbers, are named."""
    np.save(tmp_path / "x.npy", change(ROUTING))
    with pytest.raises(InputError) as error:
        import_trace(tmp_path / "x.npy", source_format="npy")
    assert words in str(error.value)


def test_safetensors_of_negative_ids(tmp_path: Path) -> None:
    """An id below -1, or a negative count, is refused."""
    safetensors(tmp_path / "rank0_raw.safetensors", {"1_3": np.array([[0, -7]])})
    assert _import(tmp_path) is None
    safetensors(tmp_path / "rank0.safetensors", {"1_3": np.array([0, -7])})
    assert _import(tmp_path, source_format="tensorrt-llm") is None


@pytest.mark.parametrize("make", [mblt, rtrace, policylang])
def test_an_empty_file(make: Callable[[Path], Path], tmp_path: Path) -> None:
    """A file of no bytes is an error for every importer."""
    path = make(tmp_path)
    path.write_bytes(b"")
    for sample in SAMPLES:
        if not sample.needs_torch:
            assert _import(path, source_format=sample.name, **sample.options) is None, sample.name
