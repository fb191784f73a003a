"""Figures of a trained model on held-out text: loss, load and routing locality.

    python training/evaluate.py --cache DIR --model DIR

Prints a summary and writes ``evaluation.json`` into the model folder.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from corpus import DEFAULT_CACHE
from data import domain_chunks, load_tokenizer
from fast_experts import FAST_EXPERTS, register_fast_experts
from parallel import keep_freed_memory
from tiny_model import EXPERTS, TOP_K, RoutingTap, build_model, imbalance
from torch import Tensor
from transformers import AutoModelForCausalLM, OlmoeForCausalLM


@torch.no_grad()
def forward_domain(model: OlmoeForCausalLM, tap: RoutingTap, table: Tensor) -> tuple[float, Tensor]:
    """Mean loss of a (sequences, length) table and its chosen experts.

    The experts come as a (layers, sequences, length, experts) table of booleans.
    """
    tap.clear()
    loss = model(input_ids=table, labels=table, use_cache=False).loss.item()
    chosen = torch.stack(tap.indices)
    hot = torch.zeros(*chosen.shape[:2], EXPERTS, dtype=torch.bool).scatter_(2, chosen, True)
    return loss, hot.view(len(tap.indices), *table.shape, EXPERTS)


@torch.no_grad()
def fast_path_error(model: OlmoeForCausalLM, ids: Tensor) -> dict[str, float]:
    """Largest difference in logits between each fast expert path and the stock one."""
    model.set_experts_implementation("eager")
    stock = model(input_ids=ids, use_cache=False).logits
    errors = {}
    for name in FAST_EXPERTS:
        model.set_experts_implementation(name)
        errors[name] = (model(input_ids=ids, use_cache=False).logits - stock).abs().max().item()
    return errors


def overlap(left: Tensor, right: Tensor) -> Tensor:
    """Mean share of experts that two aligned token tables have in common, per layer."""
    common = (left & right).sum(dim=-1).float() / TOP_K
    return common.flatten(1).mean(dim=1)


def shuffled(hot: Tensor, within: bool, generator: torch.Generator) -> Tensor:
    """Tokens in random order: over all text, or only within each sequence."""
    layers, sequences, length, experts = hot.shape
    if within:
        order = torch.rand(sequences, length, generator=generator).argsort(dim=1)
        return hot[:, torch.arange(sequences)[:, None], order]
    order = torch.randperm(sequences * length, generator=generator)
    return hot.reshape(layers, -1, experts)[:, order].view_as(hot)


def same_domain_overlap(hot: Tensor, sequences: int, generator: torch.Generator) -> Tensor:
    """Overlap of random tokens of different sequences of the same domain, per layer."""
    parts = hot.split(sequences, dim=1)
    order = torch.randperm(hot.shape[2], generator=generator)
    pairs = [overlap(part, part.roll(1, dims=1)[:, :, order]) for part in parts]
    return torch.stack(pairs).mean(dim=0)


def locality(hot: Tensor, sequences: int, seed: int) -> dict[str, float | list[float]]:
    """Next-token overlap against tokens shuffled over all text and within a sequence."""
    generator = torch.Generator().manual_seed(seed)
    following = overlap(hot[:, :, :-1], hot[:, :, 1:])
    by_chance = overlap(hot, shuffled(hot, False, generator))
    inside = overlap(hot, shuffled(hot, True, generator))
    domain = same_domain_overlap(hot, sequences, generator)
    return {
        "next_token_overlap": following.mean().item(),
        "shuffled_overlap": by_chance.mean().item(),
        "within_request_overlap": inside.mean().item(),
        "same_domain_overlap": domain.mean().item(),
        "ratio_same_domain": (domain.mean() / by_chance.mean()).item(),
        "ratio": (following.mean() / by_chance.mean()).item(),
        "ratio_within_request": (following.mean() / inside.mean()).item(),
        "ratio_per_layer": (following / by_chance).tolist(),
    }


def load_model(folder: Path, untrained: bool, seed: int) -> OlmoeForCausalLM:
    """The trained model, or freshly initialised weights of its shape as a control."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    if untrained:
        model = build_model(model.config, seed)
    model.eval()
    return model


def evaluate(args: argparse.Namespace) -> dict[str, object]:
    """All figures of one model folder."""
    tokenizer = load_tokenizer(args.model)
    model = load_model(args.model, args.untrained, args.seed)
    errors = fast_path_error(model, torch.arange(2 * args.length).view(2, -1))
    model.set_experts_implementation("sorted_loop")
    losses, tables = {}, []
    with RoutingTap(model) as tap:
        for domain, table in domain_chunks(args.cache, "heldout", tokenizer, args.length).items():
            ids = torch.from_numpy(table[: args.sequences].astype("int64"))
            losses[domain], hot = forward_domain(model, tap, ids)
            tables.append(hot)
    hot = torch.cat(tables, dim=1)
    load = hot.flatten(1, 2).float().mean(dim=1)
    return {
        "heldout_loss": sum(losses.values()) / len(losses),
        "loss_per_domain": losses,
        "tokens": hot.shape[1] * hot.shape[2],
        "imbalance_per_layer": imbalance(load).tolist(),
        "least_used_per_layer": (load.min(dim=1).values / load.mean(dim=1)).tolist(),
        "locality": locality(hot, args.sequences, args.seed),
        "fast_path_error": errors,
    }


def summary(figures: dict) -> str:
    """The figures as text."""
    place, skew = figures["locality"], figures["imbalance_per_layer"]
    per_domain = sorted(figures["loss_per_domain"].items(), key=lambda item: item[1])
    lines = [
        f"held-out loss {figures['heldout_loss']:.3f} over {figures['tokens']} tokens",
        "  " + ", ".join(f"{name} {loss:.2f}" for name, loss in per_domain),
        "max/mean load per layer: " + " ".join(f"{value:.2f}" for value in skew),
        "least used / mean:       " + " ".join(f"{value:.2f}" for value in figures["least_used_per_layer"]),
        f"next-token overlap {place['next_token_overlap']:.3f}, shuffled over all "
        f"{place['shuffled_overlap']:.3f}, within a sequence {place['within_request_overlap']:.3f}",
        f"locality ratio {place['ratio']:.2f} (against within-sequence shuffle {place['ratio_within_request']:.2f})",
        f"other sequence of the same domain: overlap {place['same_domain_overlap']:.3f}, "
        f"{place['ratio_same_domain']:.2f} times that of any text",
        f"fast expert paths differ from the stock path by at most {max(figures['fast_path_error'].values()):.1e}",
        "ratio per layer: " + " ".join(f"{value:.2f}" for value in place["ratio_per_layer"]),
    ]
    return "\n".join(lines)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of the evaluation."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--sequences", type=int, default=24, help="per domain")
    parser.add_argument("--untrained", action="store_true", help="control: fresh weights, nothing saved")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Evaluate, print and save."""
    args = parse_args(argv)
    args.cache, args.model = args.cache.expanduser(), args.model.expanduser()
    keep_freed_memory()
    register_fast_experts()
    figures = evaluate(args)
    if not args.untrained:
        (args.model / "evaluation.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(summary(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
