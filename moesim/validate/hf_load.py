"""What an offloaded run starts from: a model out of a folder (or of a config, with random weights), and its prompts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moesim.errors import InputError, require
from moesim.traces.capture import check_requests, load_model, read_prompts
from moesim.traces.capture_generate import Request

RANDOM_TOKENS = 32
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def load_hf_model(path: str | os.PathLike[str], device: str, *, random_weights: bool = False, seed: int = 0) -> Any:
    """Return the causal language model in a local folder, in eval mode; only safetensors and transformers' own classes.

    Args:
        random_weights: make a model of the config with random weights (`path` may be the config.json itself).

    Raises:
        InputError: no such folder, no config, or weights that cannot be loaded safely.
    """
    folder = Path(path)
    if not random_weights:
        return load_model(folder, device)
    require("torch", "torch", "running a model")
    require("transformers", "hf", "running a model")
    file = folder / "config.json" if folder.is_dir() else folder
    if not file.is_file():
        raise InputError(f"{path}: expected a config.json, or a folder with one")
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    try:
        config = AutoConfig.from_pretrained(str(file.parent), local_files_only=True, trust_remote_code=False)
        model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise InputError(f"{file}: transformers makes no model of it: {str(error).splitlines()[0]}") from None
    return model.to(device).eval()


def read_requests(model: Any, folder: str | os.PathLike[str], *, text: str | None = None,
                  prompts: str | os.PathLike[str] | None = None, random_tokens: int | None = None,
                  seed: int = 0) -> Sequence[Request]:
    """Return the requests to run: one text, the prompts of a file, or one prompt of random tokens (the default).

    Raises:
        InputError: more than one of them, no tokenizer in the folder, or tokens outside the vocabulary.
    """
    given = [name for name, value in (("--prompt", text), ("--prompts", prompts), ("--random-tokens", random_tokens))
             if value is not None]
    if len(given) > 1:
        raise InputError(f"give one of {' and '.join(given)}, not both")
    vocabulary = int(model.config.get_text_config().vocab_size)
    if prompts is not None:
        requests: Sequence[Request] = read_prompts(prompts)
    elif text is not None:
        requests = [(0, _tokens(Path(folder), text))]
    else:
        count = RANDOM_TOKENS if random_tokens is None else random_tokens
        if count < 1:
            raise InputError(f"--random-tokens must be at least 1, got {count}")
        requests = [(0, np.random.default_rng(seed).integers(vocabulary, size=count).tolist())]
    check_requests(requests, vocabulary)
    return requests


def _tokens(folder: Path, text: str) -> list[int]:
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in TOKENIZER_FILES):  # transformers would make an empty one
        raise InputError(f"{folder}: no tokenizer for --prompt (none of {', '.join(TOKENIZER_FILES)}); use --prompts with "
                         "token_ids, or --random-tokens")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder}: transformers cannot load its tokenizer: {str(error).splitlines()[0]}") from None
    return list(tokenizer(text)["input_ids"])
