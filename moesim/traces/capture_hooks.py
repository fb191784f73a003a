"""Hooks that see what the routers of a Hugging Face model chose, without changing what it computes.

In transformers 5 every MoE block calls ``experts(hidden [T, D], top_k_index [T, k], top_k_weights
[T, k])``, whatever its router does (group limits, score corrections, hashing), so a pre-hook on modules
named ``*.experts`` sees the real choice; nothing is recomputed from logits. Llama-4 is the exception: its
experts get every token, scaled by the scores that its router returns, so the router's output is read there.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from moesim.errors import InputError
from moesim.traces.trace import PAD

EXPERT_COUNTS = ("num_routed_experts", "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_ROUTERS = ("gate", "router")


class PassRouting(NamedTuple):
    """The routing of one forward pass; a row is a token, in the order of the flattened batch.

    Attributes:
        ids: int64[row, layer, k]; -1 at the end where a choice is no routed expert (a "zero expert").
        weights: float32[row, layer, k], or None where the experts are not given them.
        scores: float32[row, layer, column], what the routers scored with, or None.
    """

    ids: np.ndarray
    weights: np.ndarray | None
    scores: np.ndarray | None

    def rows(self, chosen: np.ndarray) -> PassRouting:
        """Return the routing of these rows."""
        return PassRouting(*(None if part is None else part[chosen] for part in self))  # type: ignore[arg-type]


class RouterRecorder:
    """What the expert modules of one model were called with in the last forward pass.

    Args:
        model: a transformers model (any torch module whose MoE blocks have an ``experts`` module).
        with_scores: also keep each router's scores (the logits of all but a few families).

    Attributes:
        layer_ids: the model's own index of each MoE layer, from the module names.
        num_experts: routed experts per layer.

    Raises:
        InputError: no expert modules, an encoder-decoder, or (with_scores) a block without a router module.
    """

    def __init__(self, model: Any, *, with_scores: bool = False) -> None:
        modules = [(name, module) for name, module in model.named_modules() if name.endswith(".experts")]
        if not modules:
            raise InputError("the model has no module named '*.experts': it is not a Mixture-of-Experts "
                             "model that transformers 5 routes through one experts module per layer")
        self.modules = modules
        self.layer_ids = [_layer_id(name) for name, _ in modules]
        if sorted(set(self.layer_ids)) != self.layer_ids:
            raise InputError(f"the expert modules are not one stack of layers (their numbers are {self.layer_ids}): "
                             f"a model of several stacks, as an encoder and a decoder, cannot be captured")
        self.num_experts = _num_experts(model, modules[0][1])
        self._parents = [model.get_submodule(name.rpartition(".")[0]) for name, _ in modules]
        self._with_scores = with_scores
        self._calls: dict[int, tuple[Any, Any]] = {}
        self._scores: dict[int, Any] = {}
        if with_scores:
            for layer in range(len(modules)):
                self._router(layer)

    @contextmanager
    def attached(self) -> Iterator[RouterRecorder]:
        """Attach the hooks; always take them off again."""
        handles = []
        try:
            for layer, (name, module) in enumerate(self.modules):
                if _is_given_choices(module):
                    handles.append(module.register_forward_pre_hook(self._hook(layer, name), with_kwargs=True))
                else:
                    handles.append(self._router(layer).register_forward_hook(self._llama4_hook(layer, name)))
                if self._with_scores:
                    handles.append(self._router(layer).register_forward_hook(self._score_hook(layer)))
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def take(self) -> PassRouting:
        """Return the routing of the last pass, and forget it.

        Raises:
            InputError: a module that was not called in the pass.
        """
        calls, self._calls = self._calls, {}
        scores, self._scores = self._scores, {}
        for layer, (name, _) in enumerate(self.modules):
            if layer not in calls or (self._with_scores and layer not in scores):
                raise InputError(f"module {name!r} was not called in the forward pass; "
                                 f"its routing cannot be captured")
        ids = _stacked([calls[layer][0] for layer in range(len(calls))])
        weights = None
        if all(weight is not None for _, weight in calls.values()):
            weights = _stacked([calls[layer][1].float() for layer in range(len(calls))])
        routed = without_zero_experts(ids, weights, self.num_experts)
        kept = _stacked([scores[layer].float() for layer in range(len(scores))]) if scores else None
        return PassRouting(*routed, kept)

    def _hook(self, layer: int, name: str) -> Callable[..., None]:
        def record(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tensors = [value for value in (*args, *kwargs.values()) if hasattr(value, "is_floating_point")]
            ids = next((t for t in tensors if t.ndim == 2 and not t.is_floating_point()), None)
            if ids is None or layer in self._calls:
                raise _uncapturable(name)
            like = [t for t in tensors if t.shape == ids.shape and t.is_floating_point()]
            # clones: an implementation may reuse these buffers
            self._calls[layer] = (ids.detach().clone(), like[-1].detach().clone() if like else None)
        return record

    def _llama4_hook(self, layer: int, name: str) -> Callable[..., None]:
        """Read Llama-4's router: (scores [T, E], logits [T, E]); it takes the plain top k of the logits.

        The same operation on the same tensor names them again; the scores alone do not, for sigmoids round to 1.
        """
        def record(router: Any, args: tuple[Any, ...], output: tuple[Any, Any]) -> None:
            if layer in self._calls or type(router).__name__ != "Llama4Router":
                raise _uncapturable(name)
            ids = output[1].detach().topk(router.top_k, dim=1).indices
            self._calls[layer] = (ids, output[0].detach().gather(1, ids))
        return record

    def _score_hook(self, layer: int) -> Callable[..., None]:
        def record(router: Any, args: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, tuple):  # (logits, weights, ids); of Llama-4's (weights, logits) the second
                output = output[len(output) == 2]
            self._scores[layer] = output.detach().reshape(-1, output.shape[-1]).clone()
        return record

    def _router(self, layer: int) -> Any:
        found = [getattr(self._parents[layer], name) for name in _ROUTERS if hasattr(self._parents[layer], name)]
        if not found:
            raise InputError(f"module {self.modules[layer][0]!r} has no sibling named {' or '.join(_ROUTERS)}: "
                             f"its router cannot be read")
        return found[0]


def without_zero_experts(ids: np.ndarray, weights: np.ndarray | None,
                         num_experts: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Return ids and weights without the choices that are no routed expert; the rest moves to the front.

    LongCat-Flash (arXiv 2509.01322, section 2.1) has experts that pass a token on unchanged, numbered after
    the routed ones: they hold no weights, so a trace has -1 and weight 0 there, at the end of a row.
    """
    none = ids >= num_experts
    if not none.any():
        return ids, weights
    order = np.argsort(none, axis=-1, kind="stable")
    ids = np.take_along_axis(np.where(none, PAD, ids), order, axis=-1)
    if weights is not None:
        weights = np.take_along_axis(np.where(none, np.float32(0), weights), order, axis=-1)
    return ids, weights


def _uncapturable(name: str) -> InputError:
    return InputError(f"module {name!r} is not called once per pass as experts(hidden, "
                      f"top_k_index, top_k_weights); its routing cannot be captured")


def _is_given_choices(experts: Any) -> bool:
    """Return whether `experts` takes more than the hidden states (all but Llama-4's do)."""
    return len(inspect.signature(experts.forward).parameters) > 1


def _stacked(tensors: list[Any]) -> np.ndarray:
    """Return [row, layer, ...] of one tensor [row, ...] per layer, wherever each of them lies."""
    return np.stack([tensor.cpu().numpy() for tensor in tensors], axis=1)


def _layer_id(name: str) -> int:
    """Return the last number in a module name: ``model.layers.3.mlp.experts`` -> 3."""
    numbers = [part for part in name.split(".") if part.isdigit()]
    if not numbers:
        raise InputError(f"module {name!r} has no layer number in its name")
    return int(numbers[-1])


def _num_experts(model: Any, experts: Any) -> int:
    owners = (experts, model.config.get_text_config())
    found = [getattr(owner, name) for owner in owners for name in EXPERT_COUNTS if hasattr(owner, name)]
    if not found:
        raise InputError(f"neither the experts nor the config have one of {', '.join(EXPERT_COUNTS)}")
    return int(found[0])
