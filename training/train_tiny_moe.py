"""Train a small OLMoE-architecture model within a wall-time budget.

    python training/train_tiny_moe.py --cache DIR --out DIR --minutes 40

The result is an ordinary Hugging Face folder (model and tokenizer).  A
checkpoint beside it (``<out>.checkpoint.pt``) allows ``--resume``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from corpus import DEFAULT_CACHE
from data import MixedBatches, domain_chunks, load_tokenizer, train_tokenizer
from fast_experts import register_fast_experts
from parallel import clip, flat_gradients, keep_freed_memory, launch, mean_over_workers
from tiny_model import (
    EXPERTS,
    LAYERS,
    RoutingTap,
    balance_loss,
    build_config,
    build_model,
    imbalance,
)
from torch import Tensor
from transformers import OlmoeForCausalLM, PreTrainedTokenizerFast

EXTRA = LAYERS * EXPERTS + 2
WARMUP = 0.04
FINAL_LR = 0.05
LOAD_MOMENTUM = 0.9


@dataclass
class Run:
    """Everything that changes while training, and so goes into a checkpoint."""

    model: OlmoeForCausalLM
    optimizer: torch.optim.Optimizer
    load: Tensor
    gradients: Tensor
    step: int = 0
    seconds: float = 0.0
    loss: float = math.nan
    log: list[dict[str, float]] = field(default_factory=list)


def pick_device(name: str) -> torch.device:
    """Resolve ``auto`` to CUDA when there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def pick_experts(name: str, device: torch.device) -> str:
    """Resolve ``auto`` to the fastest measured expert path of a device."""
    if name == "auto":
        return "sorted_loop" if device.type == "cpu" else "padded_bmm"
    return name


def rate(used: float, peak: float) -> float:
    """Learning rate: linear warm-up, then cosine down to a share of the peak."""
    if used < WARMUP:
        return peak * max(used / WARMUP, 0.01)
    turn = (min(used, 1.0) - WARMUP) / (1 - WARMUP)
    return peak * (FINAL_LR + (1 - FINAL_LR) * 0.5 * (1 + math.cos(math.pi * turn)))


def build_optimizer(model: OlmoeForCausalLM, decay: float) -> torch.optim.Optimizer:
    """AdamW; vectors (norms) are not decayed."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)


def get_tokenizer(args: argparse.Namespace) -> PreTrainedTokenizerFast:
    """The tokenizer saved in the output folder, or a newly trained one."""
    if (args.out / "tokenizer.json").is_file():
        return load_tokenizer(args.out)
    print("training the tokenizer", flush=True)
    tokenizer = train_tokenizer(args.cache, args.vocab)
    tokenizer.save_pretrained(args.out)
    return tokenizer


def backward(run: Run, tap: RoutingTap, ids: Tensor, aux: float) -> Tensor:
    """Gradients of this worker's sequences; returns their loss."""
    tap.clear()
    bf16 = torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.device.type == "cuda")
    with bf16:
        loss = run.model(input_ids=ids, labels=ids, use_cache=False).loss
    total = loss + aux * LAYERS * balance_loss(tap.logits, run.load)
    total.backward()
    return loss.detach()


def train_step(run: Run, tap: RoutingTap, ids: Tensor, aux: float, started: float) -> None:
    """One update from all workers' sequences; all workers end in the same state."""
    run.gradients.zero_()
    loss = backward(run, tap, ids, aux)
    figures = run.gradients[-EXTRA:]
    figures[:-2] = tap.load().flatten()
    figures[-2], figures[-1] = loss, time.monotonic() - started
    mean_over_workers(run.gradients)
    run.load.lerp_(figures[:-2].view_as(run.load), 1 - LOAD_MOMENTUM)
    run.loss, seconds = figures[-2:].tolist()
    clip(run.gradients[:-EXTRA], 1.0)
    run.optimizer.step()
    run.seconds += seconds
    run.step += 1


def checkpoint_path(out: Path) -> Path:
    """Where the checkpoint of an output folder lies."""
    return out.with_name(out.name + ".checkpoint.pt")


def save_checkpoint(run: Run, out: Path) -> None:
    """Write the state beside the target and rename, so that a kill loses nothing."""
    path = checkpoint_path(out)
    state = {
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "load": run.load,
        "step": run.step,
        "seconds": run.seconds,
        "log": run.log,
    }
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def load_checkpoint(run: Run, out: Path) -> None:
    """Continue from the checkpoint of an output folder."""
    path = checkpoint_path(out)
    if not path.is_file():
        raise SystemExit(f"nothing to resume at {path}: start without --resume")
    state = torch.load(path, map_location=run.load.device, weights_only=True)
    run.model.load_state_dict(state["model"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.load = state["load"]
    run.step, run.seconds, run.log = state["step"], state["seconds"], state["log"]


def progress(run: Run, args: argparse.Namespace) -> float:
    """Share of the budget used: of the wall time or of the tokens, whichever is more."""
    tokens = run.step * args.batch * args.length
    return max(run.seconds / (args.minutes * 60), tokens / args.tokens)


def report(run: Run, args: argparse.Namespace, seconds: float, steps: int) -> None:
    """Print one progress line and keep its figures."""
    worst = imbalance(run.load)
    speed = steps * args.batch * args.length / seconds
    left = run.seconds * (1 / max(progress(run, args), 1e-6) - 1)
    run.log.append({"step": run.step, "loss": run.loss, "seconds": run.seconds})
    print(
        f"step {run.step:5d}  loss {run.loss:6.3f}  {speed:6.0f} tok/s  "
        f"eta {left / 60:5.1f} min  load max/mean {worst.mean():.2f} (worst layer "
        f"{worst.max():.2f}, least used {run.load.min() * EXPERTS:.3f} of mean)",
        flush=True,
    )


def train(run: Run, batches: MixedBatches, rank: int, args: argparse.Namespace) -> None:
    """Steps until the wall-time budget is used up; only worker 0 prints and saves."""
    printed, printed_step, saved = run.seconds, run.step, run.seconds
    started = time.monotonic()
    with RoutingTap(run.model) as tap:
        while progress(run, args) < 1:
            for group in run.optimizer.param_groups:
                group["lr"] = rate(progress(run, args), args.lr)
            rows = torch.from_numpy(batches.batch(run.step)[rank :: args.workers])
            since, started = started, time.monotonic()
            train_step(run, tap, rows.to(run.load.device), args.aux, since)
            if rank == 0 and run.seconds - printed >= args.print_seconds:
                report(run, args, run.seconds - printed, run.step - printed_step)
                printed, printed_step = run.seconds, run.step
            if rank == 0 and run.seconds - saved >= args.checkpoint_minutes * 60:
                save_checkpoint(run, args.out)
                saved = run.seconds


def save_model(run: Run, args: argparse.Namespace) -> None:
    """Write the Hugging Face folder and the figures of the run."""
    run.model.set_experts_implementation("eager")
    run.model.save_pretrained(args.out)
    tail = [entry["loss"] for entry in run.log[-20:]] or [run.loss]
    figures = {
        "steps": run.step,
        "tokens": run.step * args.batch * args.length,
        "minutes": round(run.seconds / 60, 2),
        "train_loss": round(sum(tail) / len(tail), 4),
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "log": run.log,
    }
    (args.out / "training_log.json").write_text(json.dumps(figures, indent=1) + "\n")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line of the trainer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=40, help="training wall time")
    parser.add_argument("--tokens", type=float, default=1e12, help="stop after so many")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--workers", type=int, help="processes (default: one a thread)")
    parser.add_argument("--experts", default="auto", help="expert path, see fast_experts.py")
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--width", type=int, default=64, help="expert width")
    parser.add_argument("--length", type=int, default=256, help="tokens a sequence")
    parser.add_argument("--batch", type=int, default=8, help="sequences a step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--decay", type=float, default=0.05)
    parser.add_argument("--aux", type=float, default=0.01, help="balance weight per layer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--print-seconds", type=float, default=10)
    parser.add_argument("--checkpoint-minutes", type=float, default=4)
    return parser.parse_args(argv)


def prepare(args: argparse.Namespace) -> Run:
    """Model, optimizer and gradient buffer as the arguments ask."""
    device = pick_device(args.device)
    config = build_config(args.vocab, args.hidden, args.width, eos_id=0)
    model = build_model(config, args.seed)
    torch.nn.Module.to(model, device)
    model.train()
    model.set_experts_implementation(pick_experts(args.experts, device))
    load = torch.full((LAYERS, EXPERTS), 1 / EXPERTS, device=device)
    optimizer = build_optimizer(model, args.decay)
    run = Run(model, optimizer, load, flat_gradients(model, EXTRA))
    if args.resume:
        load_checkpoint(run, args.out)
    return run


def work(rank: int, batches: MixedBatches, args: argparse.Namespace) -> None:
    """What one worker does; worker 0 writes the results."""
    torch.set_num_threads(max(1, args.threads // args.workers))
    torch.set_flush_denormal(True)
    keep_freed_memory()
    register_fast_experts()
    run = prepare(args)
    train(run, batches, rank, args)
    if rank == 0:
        save_checkpoint(run, args.out)
        save_model(run, args)


def main(argv: list[str] | None = None) -> int:
    """Train, keep a checkpoint and write the model."""
    args = parse_args(argv)
    args.cache, args.out = args.cache.expanduser(), args.out.expanduser()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.workers is None:
        args.workers = args.threads if pick_device(args.device).type == "cpu" else 1
    tables = domain_chunks(args.cache, "train", get_tokenizer(args), args.length)
    launch(args.workers, work, MixedBatches(tables, args.batch, args.seed), args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
