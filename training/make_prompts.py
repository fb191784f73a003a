"""Write held-out prompts, drawn evenly from all domains, as a JSONL file.

    python training/make_prompts.py --cache DIR --model DIR --out prompts.jsonl

Each line is ``{"request_id": int, "domain": str, "token_ids": [int, ...]}``.
The file holds text (as token ids), so it stays in the cache and is not shipped.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

from corpus import DEFAULT_CACHE
from data import domains, encode, load_tokenizer, texts
from transformers import PreTrainedTokenizerFast


def pick_windows(documents: list[list[int]], count: int, length: int, rng: random.Random) -> list[list[int]]:
    """``count`` windows of ``length`` tokens, from as many documents as possible."""
    usable = [ids for ids in documents if len(ids) >= length]
    if not usable:
        raise SystemExit(f"no held-out document has {length} tokens: lower --length")
    order = rng.sample(usable, len(usable))
    windows = []
    for number in range(count):
        ids = order[number % len(order)]
        start = rng.randrange(len(ids) - length + 1)
        windows.append(ids[start : start + length])
    return windows


def domain_quota(requests: int, names: list[str]) -> dict[str, int]:
    """Requests of each domain; they differ by at most one."""
    base, rest = divmod(requests, len(names))
    return {name: base + (place < rest) for place, name in enumerate(names)}


def build_prompts(cache: Path, tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> list[dict[str, object]]:
    """Prompts of all domains, shuffled so that neighbours differ in domain."""
    drawn: list[tuple[str, list[int]]] = []
    for domain, count in domain_quota(args.requests, domains(cache, "heldout")).items():
        documents = encode(tokenizer, texts(cache, "heldout", domain))
        rng = random.Random(f"{args.seed}:{domain}")
        drawn += [(domain, ids) for ids in pick_windows(documents, count, args.length, rng)]
    random.Random(args.seed).shuffle(drawn)
    return [{"request_id": number, "domain": domain, "token_ids": ids} for number, (domain, ids) in enumerate(drawn)]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of the prompt writer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE)
    parser.add_argument("--model", type=Path, required=True, help="folder with the tokenizer")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Draw the prompts and write them."""
    args = parse_args(argv)
    tokenizer = load_tokenizer(args.model.expanduser())
    prompts = build_prompts(args.cache.expanduser(), tokenizer, args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    print(f"{len(prompts)} prompts of {args.length} tokens in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
