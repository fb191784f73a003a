"""Hooks between a Hugging Face model and the runtime that serves its experts' weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np

from moesim.errors import InputError
from moesim.traces.capture_hooks import PassRouting, RouterRecorder, without_zero_experts
from moesim.validate.hf_runtime import ExpertRuntime
from moesim.validate.hf_weights import ExpertModule, moved_out

NEEDS_TWO = "LongcatFlashExperts"  # cannot be called with a single choice per token


class OffloadedModel:
    """A model whose experts take their weights from `runtime` while `attached()`.

    The forward of every module but Llama-4's experts is the model's own. `skip_experts` calls them with no choice at
    all, which leaves the rest of the pass (for micro-benchmarks).

    Attributes:
        runtime: serves the weights; set it before a pass.
    """

    def __init__(self, model: Any, layers: Sequence[ExpertModule], recorder: RouterRecorder) -> None:
        self.model, self.layers = model, list(layers)
        self.num_experts, self.layer_ids = recorder.num_experts, recorder.layer_ids
        self.runtime: ExpertRuntime | None = None
        self.skip_experts = False
        self._chosen: Any = None
        self._ids: list[np.ndarray] = []

    def take(self) -> PassRouting:
        """Return the routing of the last pass, and forget it (as `RouterRecorder.take`, without weights)."""
        ids, self._ids = np.stack(self._ids, axis=1), []
        return PassRouting(*without_zero_experts(ids, None, self.num_experts), None)

    @contextmanager
    def attached(self) -> Iterator[OffloadedModel]:
        """Move the weights out and hook in; everything is as before at the end."""
        with ExitStack() as stack:
            stack.enter_context(moved_out(self.layers, self._find))
            stack.callback(self.model.register_forward_pre_hook(self._pass_begins, with_kwargs=True).remove)
            stack.callback(self.model.register_forward_hook(self._pass_ends).remove)
            for place, layer in enumerate(self.layers):
                self._hook(stack, place, layer)
            yield self

    def _hook(self, stack: ExitStack, place: int, layer: ExpertModule) -> None:
        if layer.at_once:
            router = self.model.get_submodule(layer.name.rpartition(".")[0]).router
            stack.callback(router.register_forward_hook(self._router_spoke).remove)
            layer.module.forward = lambda hidden: self._one_by_one(place, layer.module, hidden)
            stack.callback(layer.module.__dict__.pop, "forward", None)
            return
        stack.callback(layer.module.register_forward_pre_hook(self._experts_begin(place), with_kwargs=True).remove)
        stack.callback(layer.module.register_forward_hook(lambda *_: self._served.end(place)).remove)

    @property
    def _served(self) -> ExpertRuntime:
        assert self.runtime is not None
        return self.runtime

    def _find(self, layer: int, name: str, expert: int) -> Any:
        return self._served.weights(layer, name, expert)

    def _pass_begins(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._ids = []
        self._served.begin_pass(int(kwargs["input_ids"].numel() if "input_ids" in kwargs else args[0].numel()))

    def _pass_ends(self, *_: Any) -> None:
        self._served.end_pass()

    def _experts_begin(self, place: int) -> Any:
        def begin(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            names = list(kwargs)
            values = [*args, *kwargs.values()]
            where = next(i for i, v in enumerate(values) if v.ndim == 2 and not v.is_floating_point())
            if self.skip_experts:
                values = [v[:, :0] if v.shape == values[where].shape and i else v for i, v in enumerate(values)]
            self._served.begin(place, self._counts(values[where]))
            return tuple(values[: len(args)]), dict(zip(names, values[len(args) :], strict=True))

        return begin

    def _counts(self, ids: Any) -> np.ndarray:
        """Note torch[token, k] and return int64[expert], tokens by expert; zero experts have no weights and do not count."""
        found = ids.detach().cpu().numpy().copy()
        self._ids.append(found)
        flat = found.ravel()
        return np.bincount(flat[flat < self.num_experts], minlength=self.num_experts)

    def _router_spoke(self, router: Any, _: Any, output: tuple[Any, Any]) -> None:
        """Llama-4: the choice is the top k of the router's logits (see `capture_hooks`)."""
        self._chosen = output[1].detach().topk(router.top_k, dim=1).indices

    def _one_by_one(self, place: int, experts: Any, hidden: Any) -> Any:
        """Llama-4's experts, without those that nobody chose: their rows are zeros, and so are their results."""
        import torch

        rows = hidden.view(self.num_experts, -1, experts.hidden_size)
        result = torch.zeros_like(rows)
        counts = self._counts(self._chosen[:, :0] if self.skip_experts else self._chosen)
        self._served.begin(place, counts)
        for expert in np.flatnonzero(counts).tolist():
            gate, up = torch.bmm(rows[expert : expert + 1], experts.gate_up_proj[expert][None]).chunk(2, dim=-1)
            result[expert] = torch.bmm(up * experts.act_fn(gate), experts.down_proj[expert][None])[0]
        self._served.end(place)
        return result.view(-1, experts.hidden_size)

    def call_experts(self, place: int, hidden: Any, ids: Any) -> Any:
        """Call one layer's experts with torch[token, hidden] and int64[token, k], equal weights (a micro-benchmark)."""
        import torch

        if self.layers[place].at_once:
            self._chosen = ids
            return self.layers[place].module(hidden.repeat(self.num_experts, 1))
        if ids.shape[1] == 1 and type(self.layers[place].module).__name__ == NEEDS_TWO:
            ids = torch.cat([ids, torch.full_like(ids, self.num_experts)], dim=1)  # a zero expert
        return self.layers[place].module(hidden, ids, torch.full(ids.shape, 1 / ids.shape[1], dtype=hidden.dtype,
                                                                 device=hidden.device))


def eager(model: Any) -> None:
    """Make a model compute one chosen expert after the other, in rising order.

    Raises:
        InputError: transformers before 5.
    """
    if not hasattr(model, "set_experts_implementation"):
        raise InputError("an offloaded run needs transformers 5, whose models can compute their experts one by one")
    model.set_experts_implementation("eager")
