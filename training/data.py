"""Tokenizer and batches over the collected corpus."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

EOS = "<|endoftext|>"


def domains(cache: Path, half: str) -> list[str]:
    """Names of the collected domains, sorted."""
    found = sorted(path.stem for path in (cache / "corpus" / half).glob("*.jsonl"))
    if not found:
        raise SystemExit(f"no corpus in {cache}: run 'python training/corpus.py --cache {cache}'")
    return found


def texts(cache: Path, half: str, domain: str) -> list[str]:
    """Documents of one domain, in stored order."""
    path = cache / "corpus" / half / f"{domain}.jsonl"
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def all_texts(cache: Path) -> Iterator[str]:
    """Training documents of all domains."""
    for domain in domains(cache, "train"):
        yield from texts(cache, "train", domain)


def train_tokenizer(cache: Path, vocab: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on the training half."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(all_texts(cache), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer saved in a model folder."""
    if not (folder / "tokenizer.json").is_file():
        raise SystemExit(f"no tokenizer in {folder}: run training/train_tiny_moe.py with --out {folder}")
    return PreTrainedTokenizerFast.from_pretrained(folder)


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> list[list[int]]:
    """Token ids of each document, without special tokens."""
    encodings = tokenizer.backend_tokenizer.encode_batch(documents, add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


def chunks(tokenizer: PreTrainedTokenizerFast, documents: list[str], length: int) -> np.ndarray:
    """(n, length) table of the documents' tokens joined with end-of-text tokens."""
    stream: list[int] = []
    for ids in encode(tokenizer, documents):
        stream += [*ids, tokenizer.eos_token_id]
    count = len(stream) // length
    return np.array(stream[: count * length], dtype=np.int32).reshape(count, length)


def domain_chunks(cache: Path, half: str, tokenizer: PreTrainedTokenizerFast, length: int) -> dict[str, np.ndarray]:
    """Chunks of every domain of one half that has at least one."""
    tables = {d: chunks(tokenizer, texts(cache, half, d), length) for d in domains(cache, half)}
    return {domain: table for domain, table in tables.items() if len(table)}


class MixedBatches:
    """Batches that go round all domains; a pure function of seed and position."""

    def __init__(self, tables: dict[str, np.ndarray], batch: int, seed: int) -> None:
        self._names = sorted(tables)
        self._batch = batch
        self._seed = seed
        self._tables = {name: self._shuffled(name, tables[name]) for name in self._names}

    def _shuffled(self, name: str, table: np.ndarray) -> np.ndarray:
        order = list(range(len(table)))
        random.Random(f"{self._seed}:{name}").shuffle(order)
        return table[order]

    def _sequence(self, position: int) -> np.ndarray:
        turn, slot = divmod(position, len(self._names))
        order = random.Random(f"{self._seed}:{turn}").sample(self._names, len(self._names))
        table = self._tables[order[slot]]
        return table[turn % len(table)]

    def batch(self, step: int) -> np.ndarray:
        """(batch, length) token ids of one training step."""
        first = step * self._batch
        rows = [self._sequence(first + offset) for offset in range(self._batch)]
        return np.stack(rows).astype(np.int64)
