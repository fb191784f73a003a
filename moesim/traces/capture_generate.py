"""Generation whose routing is recorded: batches of requests, padded, each with its own random numbers."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moesim.errors import InputError
from moesim.traces.capture_hooks import EXPERT_COUNTS, PassRouting, RouterRecorder

Request = tuple[int, Sequence[int]]
PADDINGS = ("left", "right")
_SIZES = ("hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
          "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size", "num_experts_per_tok",
          *EXPERT_COUNTS)
_PAD_TOKEN = 0  # any token will do: no real token attends to it


@dataclass(frozen=True)
class Settings:
    """What decides a run's tokens besides the model and the prompts.

    Raises:
        InputError: a value out of range.
    """

    max_new_tokens: int
    seed: int
    temperature: float = 1.0
    stop_at_eos: bool = True
    batch_size: int = 1
    padding: str = "left"

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature must be finite and not negative, got {self.temperature}")
        if self.padding not in PADDINGS:
            raise InputError(f"padding must be {' or '.join(PADDINGS)}, got {self.padding!r}")


class RequestRun:
    """One request while it runs: its tokens so far, its random numbers, and the routing of what was fed.

    Attributes:
        fed: token ids that the model was given; steps: the pass of the batch that held each of them.
    """

    def __init__(self, request: Request, settings: Settings) -> None:
        self.request_id = request[0]
        self.fed = [int(token) for token in request[1]]
        self.prompt_tokens = len(self.fed)
        self.passes: list[PassRouting] = []
        self.done = False
        self._temperature = settings.temperature
        self._entropy = [settings.seed, self.request_id]
        self._generator: Any = None

    def sample(self, logits: Any) -> int:
        """Return the next token of float[vocabulary], drawn on the CPU in float32 so that the device does not matter."""
        import torch

        logits = logits.float().cpu()
        if self._temperature == 0:
            return int(logits.argmax())
        if self._generator is None:
            state = np.random.SeedSequence(self._entropy).generate_state(1, np.uint64)[0]
            self._generator = torch.Generator().manual_seed(int(state) >> 1)
        shares = torch.softmax(logits / self._temperature, dim=-1)
        return int(torch.multinomial(shares, 1, generator=self._generator))

    def steps(self) -> np.ndarray:
        """Return int64[token], the pass of each fed token: 0 for the prompt, then 1, 2, ..."""
        return np.maximum(np.arange(len(self.fed)) - self.prompt_tokens + 1, 0)

    def joined(self) -> PassRouting:
        """Return the routing of all fed tokens, in their order."""
        parts = zip(*self.passes, strict=True)
        return PassRouting(*(None if part[0] is None else np.concatenate(part) for part in parts))  # type: ignore[arg-type]


class Generation:
    """A Hugging Face model that generates while its routing is recorded."""

    origin = "hooks on its expert modules"

    def __init__(self, model: Any, recorder: RouterRecorder, settings: Settings) -> None:
        self.model, self.recorder, self.settings = model, recorder, settings
        self.layer_ids, self.num_experts = recorder.layer_ids, recorder.num_experts
        config = model.config.get_text_config()
        eos = getattr(config, "eos_token_id", None) if settings.stop_at_eos else None
        self.eos = set(eos) if isinstance(eos, list | tuple) else {eos} - {None}
        self.accepts = set(inspect.signature(model.forward).parameters)
        if settings.padding == "right" and settings.batch_size > 1 and settings.max_new_tokens > 1:
            _refuse_right_padding(config)

    def sizes(self) -> dict[str, int]:
        """Return the sizes that the model's config names, for a trace's metadata."""
        config = self.model.config.get_text_config()
        return {name: value for name in _SIZES if isinstance(value := getattr(config, name, None), int)}

    def routing_of(self, tokens: Sequence[int]) -> PassRouting:
        """Return the routing of one pass over one unpadded row, without a cache."""
        self._forward(np.array([list(tokens)]), None, None)
        return self.recorder.take()

    def run(self, requests: Sequence[Request]) -> list[RequestRun]:
        """Run a batch of requests until each has ended; return them with their routing.

        A request that ends early keeps its row of the batch, filled with padding that is not recorded.
        """
        runs = [RequestRun(request, self.settings) for request in requests]
        tokens, mask = _padded([run.fed for run in runs], self.settings.padding)
        cache, last = None, [int(row.nonzero()[0][-1]) for row in mask]
        for number in range(self.settings.max_new_tokens):
            live = mask[:, -tokens.shape[1]:] & ~np.array([run.done for run in runs])[:, None]
            logits, cache = self._forward(tokens, mask, cache, last)
            self._note(runs, live)
            if number + 1 == self.settings.max_new_tokens:
                break  # the last token would not be fed
            tokens = self._next_tokens(runs, logits)
            if all(run.done for run in runs):
                break
            mask = np.concatenate([mask, np.ones((len(runs), 1), bool)], axis=1)
            last = [0] * len(runs)
        return runs

    def _note(self, runs: list[RequestRun], live: np.ndarray) -> None:
        """Give each run the rows of the last pass that are its own tokens (`live`: bool[request, column])."""
        routing = self.recorder.take()
        if len(routing.ids) != live.size:
            raise InputError(f"the experts were given {len(routing.ids)} rows in a pass of {live.size} tokens; "
                             f"rows cannot be told apart")
        rows = np.arange(live.size).reshape(live.shape)
        for run, own, chosen in zip(runs, rows, live, strict=True):
            if chosen.any():
                run.passes.append(routing.rows(own[chosen]))

    def _next_tokens(self, runs: list[RequestRun], logits: Any) -> np.ndarray:
        tokens = np.full((len(runs), 1), _PAD_TOKEN)
        for row, run in enumerate(runs):
            if run.done:
                continue
            token = run.sample(logits[row])
            run.done = token in self.eos
            if not run.done:
                run.fed.append(token)
                tokens[row] = token
        return tokens

    def _forward(self, tokens: np.ndarray, mask: np.ndarray | None, cache: Any,
                 last: Sequence[int] = (-1,)) -> tuple[Any, Any]:
        """Return (logits[request, vocabulary] at each row's `last` column, KV cache) after feeding `tokens`."""
        import torch

        device = self.model.device
        options: dict[str, Any] = {}
        columns, places = np.unique(np.array(last)), np.array(last)
        if "logits_to_keep" in self.accepts:  # a long prompt's logits would fill the memory
            whole = len(columns) == 1 and columns[0] in (-1, tokens.shape[1] - 1)
            options["logits_to_keep"] = 1 if whole else torch.tensor(columns, device=device)
            places = np.searchsorted(columns, places)
        if mask is not None and not (mask.all() and len(mask) == 1):
            options["attention_mask"] = torch.tensor(mask.astype(np.int64), device=device)
            if "position_ids" in self.accepts:
                positions = np.maximum(mask.cumsum(axis=1) - 1, 0)[:, -tokens.shape[1]:]
                options["position_ids"] = torch.tensor(positions, device=device)
        output = self.model(input_ids=torch.tensor(tokens, device=device), past_key_values=cache,
                            use_cache=True, **options)
        rows = torch.arange(len(tokens), device=output.logits.device)
        return output.logits[rows, torch.tensor(places, device=rows.device)], output.past_key_values


def _padded(prompts: Sequence[Sequence[int]], padding: str) -> tuple[np.ndarray, np.ndarray]:
    """Return (int64[request, column], bool[request, column] where a column is the prompt's own)."""
    width = max(len(prompt) for prompt in prompts)
    tokens, mask = np.full((len(prompts), width), _PAD_TOKEN), np.zeros((len(prompts), width), bool)
    for row, prompt in enumerate(prompts):
        own = slice(width - len(prompt), width) if padding == "left" else slice(0, len(prompt))
        tokens[row, own], mask[row, own] = prompt, True
    return tokens, mask


def _refuse_right_padding(config: Any) -> None:
    """A gap between prompt and new tokens shifts a window over the cache and runs through a recurrent state."""
    kinds = set(getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ())
    window = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    if window or kinds - {"full_attention", "attention"}:
        raise InputError("padding: this model has layers with a window or a recurrent state, whose results would "
                         "change with padding on the right; use padding on the left")
