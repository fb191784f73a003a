"""How fast cache replay is: accesses per CPU second, compiled and in Python, beside OrderedDict and libcachesim.

Run ``python benchmarks/cache.py`` (``--quick`` for a stream a tenth as long, ``--check`` exits 1 when a target is
missed). One expert tested against the cache is one access. A line is the median of its runs, the runs of all lines interleaved,
so that ratios hold on a noisy machine; Python's own lines run once. Lines that count the same thing must agree on their
hits, or the script stops. Compiled loops are warmed up first; making caches, policies and Belady's next uses is part of the time.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import numpy as np

from moesim.cache.cache import ExpertCache
from moesim.cache.compiled_layout import CODES, Layout
from moesim.cache.compiled_replay import replay_compiled
from moesim.cache.curves import hit_curves
from moesim.cache.policy import POLICIES, AccessStream, PolicyContext, make_policy
from moesim.cache.replay import replay

SEED, REPEATS = 0, 5
NUM_STEPS, QUICK_STEPS = 8000, 800
NUM_LAYERS, NUM_EXPERTS, TOP_K, SLOTS_PER_LAYER = 16, 64, 8, 32
CURVE_TOKENS, QUICK_CURVE_TOKENS, DRAWN_TOKENS = 1_000_000, 100_000, 50_000
ZIPF = 0.8
ORDERED_DICT = "lru: OrderedDict, one pool"
REFERENCE = "lru: Python, one by one, one pool"
LIBCACHESIM = {"lru": "LRU", "lfu-resident": "LFU", "belady": "Belady"}
# Targets of the compiled lines (a pool per layer, set semantics): M accesses/s, times libcachesim's C, and its counterpart.
TARGETS = {"lru": (90, 4, "lru"), "lfu": (30, 4, "lfu-resident"), "lfu-resident": (30, 4, "lfu-resident"),
           "belady": (40, 3, "belady")}
CURVES_S, CURVES_BYTES = 6.0, 2 * 2**30

Run = Callable[[], int]


def make_ids(num_steps: int, *, seed: int = SEED) -> np.ndarray:
    """Return int16[step, layer, k]: 8 of 64 experts, popularity falling as a power law, each layer in its own order.

    Drawn without replacement (Gumbel-top-k, Kool et al., ICML 2019).
    """
    rng = np.random.default_rng(seed)
    weight = rng.permuted(np.tile(np.arange(1.0, NUM_EXPERTS + 1) ** -ZIPF, (NUM_LAYERS, 1)), axis=1)
    chosen = [np.argpartition(-(np.log(weight) + rng.gumbel(size=(min(5000, num_steps - start), NUM_LAYERS, NUM_EXPERTS))),
                              TOP_K, axis=2)[..., :TOP_K] for start in range(0, num_steps, 5000)]
    return np.concatenate(chosen).astype(np.int16)


def make_stream(num_steps: int, *, seed: int = SEED) -> AccessStream:
    """Return `num_steps` steps of 16 layers, each step one token."""
    accesses = num_steps * NUM_LAYERS
    return AccessStream(np.tile(np.arange(NUM_LAYERS), num_steps), TOP_K * np.arange(accesses + 1),
                        np.sort(make_ids(num_steps, seed=seed), axis=2).ravel())


def context_of(stream: AccessStream) -> PolicyContext:
    """Popularity is the stream's own (`static` needs one)."""
    popularity = np.bincount(stream.keys(NUM_EXPERTS), minlength=NUM_LAYERS * NUM_EXPERTS)
    return PolicyContext(NUM_LAYERS, NUM_EXPERTS, popularity.reshape(NUM_LAYERS, -1).astype(np.float64), stream)


def compiled_hits(policy: str, context: PolicyContext, semantics: str, shared: bool) -> int:
    """Return the hits of the compiled replay."""
    assert context.future is not None
    return int(replay_compiled(context.future, policy, context, slots_per_layer=SLOTS_PER_LAYER, semantics=semantics,
                               shared=shared).hits.sum())


def python_hits(policy: str, context: PolicyContext, semantics: str, shared: bool) -> int:
    """Return the hits of the readable replay."""
    cache = ExpertCache(NUM_LAYERS, NUM_EXPERTS, SLOTS_PER_LAYER, make_policy(policy, context), shared=shared)
    assert context.future is not None
    return int(replay(context.future, cache, semantics=semantics).hits.sum())


def ordered_dict_hits(keys: list[int]) -> int:
    """Return the hits of the smallest LRU that Python can write: one OrderedDict, no bookkeeping."""
    capacity = NUM_LAYERS * SLOTS_PER_LAYER
    content: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for key in keys:
        if key in content:
            content.move_to_end(key)
            hits += 1
        else:
            if len(content) == capacity:
                content.popitem(last=False)
            content[key] = None
    return hits


def write_oracle_general(keys: np.ndarray, path: Path) -> None:
    """Write keys in libcachesim's binary format: time, id, size, next access (-1: none), 24 bytes each.

    The next accesses matter: without them its Belady answers all the same, and wrongly.
    """
    layout = np.dtype([("time", "<u4"), ("id", "<u8"), ("num_bytes", "<u4"), ("next", "<i8")])
    table = np.zeros(len(keys), layout)
    table["time"], table["id"], table["num_bytes"], table["next"] = np.arange(len(keys)), keys, 1, -1
    order = np.argsort(keys, kind="stable")
    again = keys[order[1:]] == keys[order[:-1]]
    table["next"][order[:-1][again]] = order[1:][again]
    path.write_bytes(table.tobytes())


def libcachesim_hits(policy: str, path: Path, num_keys: int) -> int:
    """Return the hits of libcachesim reading a trace file by itself, all of it in C."""
    import libcachesim

    reader = libcachesim.TraceReader(str(path), libcachesim.TraceType.ORACLE_GENERAL_TRACE)
    cache = getattr(libcachesim, policy)(cache_size=NUM_LAYERS * SLOTS_PER_LAYER, hashpower=12)
    miss_ratio, _ = cache.process_trace(reader)
    return round((1 - miss_ratio) * num_keys)


def next_uses_found(stream: AccessStream) -> int:
    """Return how many uses have a next one: what Belady must know first."""
    upcoming, _ = Layout(NUM_LAYERS, NUM_EXPERTS, False).next_uses(stream)
    return int((upcoming >= 0).sum())


@dataclass(frozen=True)
class Line:
    """One line: what runs, the count it must share with other lines ("": none), and whether one run is enough."""

    name: str
    run: Run
    agrees: str = ""
    is_slow: bool = False


def make_lines(stream: AccessStream, folder: Path) -> list[Line]:
    """Return every policy under moesim's own semantics, then what counts one key at a time in one pool."""
    context, keys = context_of(stream), stream.keys(NUM_EXPERTS)
    return [*_set_lines(context), *_one_pool_lines(context, keys, folder)]


def _set_lines(context: PolicyContext) -> Iterator[Line]:
    stream = context.future
    assert stream is not None
    names = [name for name in POLICIES.names() if POLICIES[name] in CODES]
    for name in names:
        yield Line(f"{name}: compiled, a pool per layer", partial(compiled_hits, name, context, "set", False),
                   f"{name}, a pool per layer")
    yield Line("belady: its next uses alone, compiled", lambda: next_uses_found(stream))
    for name in ("lru", "belady"):
        yield Line(f"{name}: curve of all sizes, compiled", partial(curve_hits, name, stream),
                   f"{name}, a pool per layer")
    for name in names:
        yield Line(f"{name}: Python, a pool per layer", partial(python_hits, name, context, "set", False),
                   f"{name}, a pool per layer", True)


def _one_pool_lines(context: PolicyContext, keys: np.ndarray, folder: Path) -> Iterator[Line]:
    as_list = keys.tolist()
    for name in LIBCACHESIM:
        yield Line(f"{name}: compiled, one by one, one pool",
                   partial(compiled_hits, name, context, "sequential", True), f"{name}, one pool")
    yield Line(REFERENCE, lambda: python_hits("lru", context, "sequential", True), "lru, one pool", True)
    yield Line(ORDERED_DICT, lambda: ordered_dict_hits(as_list), "lru, one pool")
    if find_spec("libcachesim"):
        file = folder / "keys.oracleGeneral"
        write_oracle_general(keys, file)
        for name, theirs in LIBCACHESIM.items():
            yield Line(_in_c(name), partial(libcachesim_hits, theirs, file, len(keys)), f"{name}, one pool")


def _in_c(policy: str) -> str:
    return f"{policy}: libcachesim {LIBCACHESIM[policy]} in C, one pool"


def curve_hits(policy: str, stream: AccessStream) -> int:
    """Return the hits that the curve gives for the slots of the other lines."""
    curve = hit_curves(stream, NUM_EXPERTS, policies=(policy,))[policy]
    return int(curve.hits_at(SLOTS_PER_LAYER).sum())


def time_lines(lines: Sequence[Line], repeats: int) -> dict[str, tuple[float, int]]:
    """Return (median CPU seconds, hits) by line; raises SystemExit if lines that must agree differ, or runs of one."""
    seconds: dict[str, list[float]] = {line.name: [] for line in lines}
    hits: dict[str, set[int]] = {line.name: set() for line in lines}
    for turn in range(repeats):
        for line in lines:
            if turn == 0 or not line.is_slow:
                start = time.process_time()
                hits[line.name].add(line.run())
                seconds[line.name].append(time.process_time() - start)
    groups: dict[str, set[int]] = {}
    for line in lines:
        groups.setdefault(line.agrees or line.name, set()).update(hits[line.name])
    if any(len(found) != 1 for found in groups.values()):
        raise SystemExit(f"the hits differ between runs, or between engines: {hits}")
    return {line.name: (median(seconds[line.name]), hits[line.name].pop()) for line in lines}


def verdict(name: str, found: dict[str, tuple[float, int]], num_uses: int) -> tuple[str, bool]:
    """Return what is asked of a line, and whether it is met (an absent libcachesim asks nothing)."""
    policy, _, rest = name.partition(": ")
    if rest != "compiled, a pool per layer" or policy not in TARGETS:
        return "", True
    millions, times, counterpart = TARGETS[policy]
    met, asked = num_uses / found[name][0] / 1e6 >= millions, f"{millions} M/s"
    if _in_c(counterpart) in found:
        ratio = found[_in_c(counterpart)][0] / found[name][0]
        met, asked = met and ratio >= times, f"{asked}, {times} x libcachesim {LIBCACHESIM[counterpart]} (is {ratio:.1f})"
    return asked, met


def print_table(found: dict[str, tuple[float, int]], num_uses: int) -> list[str]:
    """Print the lines as Markdown; return the names of those that miss their target."""
    print(f"**Cache replay**: {num_uses:,} accesses, {NUM_LAYERS} layers x {NUM_EXPERTS} experts, top-{TOP_K}, "
          f"{SLOTS_PER_LAYER} slots per layer\n")
    print("| replay | hits | CPU s | M accesses/s | target | met |\n|---|---|---|---|---|---|")
    missed = []
    for name, (cpu_s, hits) in found.items():
        asked, met = verdict(name, found, num_uses)
        print(f"| {name} | {hits:,} | {cpu_s:.4f} | {num_uses / cpu_s / 1e6:.2f} | {asked} | "
              f"{('yes' if met else '**no**') if asked else ''} |")
        missed += [] if met else [name]
    return missed


def print_curves(num_tokens: int) -> list[str]:
    """Print what both curves of `num_tokens` tokens take; return the targets missed."""
    ids = np.tile(make_ids(min(num_tokens, DRAWN_TOKENS)), (-(-num_tokens // DRAWN_TOKENS), 1, 1))[:num_tokens]
    start = time.process_time()
    curves = hit_curves(ids, NUM_EXPERTS)
    cpu_s = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    limit_s = CURVES_S * num_tokens / CURVE_TOKENS
    rates = ", ".join(f"{name} {curve.hits_at(SLOTS_PER_LAYER).sum() / curve.accesses.sum():.4f}"
                      for name, curve in curves.items())
    print(f"\n**Hit curves** of LRU and Belady at all {NUM_EXPERTS} sizes, {num_tokens:,} tokens ({DRAWN_TOKENS:,} drawn, "
          f"repeated): {cpu_s:.2f} CPU s (target {limit_s:.1f}), {ids.size / cpu_s / 1e6:.1f} M accesses/s for both; peak memory "
          f"of the whole script {peak / 2**30:.2f} GiB (target 2). Hit rates at {SLOTS_PER_LAYER} slots: {rates}.")
    return [what for what, met in (("time of the curves", cpu_s <= limit_s), ("memory", peak <= CURVES_BYTES)) if not met]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and the curves; return 1 where `--check` finds a target missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a stream a tenth as long, each line once")
    parser.add_argument("--check", action="store_true", help="exit 1 when a target is missed")
    options = parser.parse_args(arguments)
    num_steps, repeats = (QUICK_STEPS, 1) if options.quick else (NUM_STEPS, REPEATS)
    with tempfile.TemporaryDirectory() as folder:
        time_lines([line for line in make_lines(make_stream(20), Path(folder)) if not line.is_slow], 1)  # compile
        stream = make_stream(num_steps)
        found = time_lines(make_lines(stream, Path(folder)), repeats)
    missed = print_table(found, len(stream.experts))
    missed += print_curves(QUICK_CURVE_TOKENS if options.quick else CURVE_TOKENS)
    print("\nEvery target met." if not missed else f"\nMissed: {'; '.join(missed)}.")
    return 1 if options.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
