"""How fast cache replay is: accesses per CPU second of each policy, beside other LRUs on the same keys.

Run ``python benchmarks/cache.py`` (``--quick`` for a stream a tenth as long). One expert tested against the
cache is one access. Every line is the median of three runs, the runs of all lines interleaved, so that the
ratios hold on a noisy machine. The LRUs must agree on their hits, or the script stops.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import numpy as np
from rich.console import Console
from rich.table import Table

from moesim.cache.cache import ExpertCache
from moesim.cache.policy import POLICIES, AccessStream, PolicyContext, make_policy
from moesim.cache.replay import replay

SEED, REPEATS = 0, 3
NUM_STEPS, QUICK_STEPS = 1000, 100
NUM_LAYERS, NUM_EXPERTS, TOP_K, SLOTS_PER_LAYER = 16, 64, 8, 32
ZIPF = 0.8
REFERENCE = "moesim lru, one by one, one pool"
COLUMNS = ("replay", "accesses", "hits", "CPU s", "accesses/s", "time over OrderedDict")
ORDERED_DICT = "OrderedDict LRU, one pool"

Run = Callable[[], int]


def make_stream(num_steps: int, *, seed: int = SEED) -> AccessStream:
    """Return `num_steps` steps of 16 layers; each picks 8 of 64 experts, popularity falling as a power law.

    Drawn without replacement (Gumbel-top-k, Kool et al., ICML 2019); each layer has its own order.
    """
    rng = np.random.default_rng(seed)
    weight = rng.permuted(np.tile(np.arange(1.0, NUM_EXPERTS + 1) ** -ZIPF, (NUM_LAYERS, 1)), axis=1)
    noise = rng.gumbel(size=(num_steps, NUM_LAYERS, NUM_EXPERTS))
    chosen = np.argpartition(-(np.log(weight) + noise), TOP_K, axis=2)[..., :TOP_K]
    accesses = num_steps * NUM_LAYERS
    return AccessStream(np.tile(np.arange(NUM_LAYERS), num_steps), TOP_K * np.arange(accesses + 1),
                        np.sort(chosen, axis=2).ravel())


def new_cache(policy: str, stream: AccessStream, *, shared: bool = False) -> ExpertCache:
    """Return an empty cache of half the experts; popularity is the stream's own (`static` needs one)."""
    keys = stream.keys(NUM_EXPERTS)
    popularity = np.bincount(keys, minlength=NUM_LAYERS * NUM_EXPERTS).reshape(NUM_LAYERS, NUM_EXPERTS)
    context = PolicyContext(NUM_LAYERS, NUM_EXPERTS, popularity.astype(np.float64), stream)
    return ExpertCache(NUM_LAYERS, NUM_EXPERTS, SLOTS_PER_LAYER, make_policy(policy, context), shared=shared)


def replay_hits(policy: str, stream: AccessStream, semantics: str, shared: bool) -> int:
    """Return the hits of one replay; making the cache and its policy is part of the time."""
    return int(replay(stream, new_cache(policy, stream, shared=shared), semantics=semantics).hits.sum())


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


def libcachesim_get_hits(keys: list[int]) -> int:
    """Return the hits of libcachesim's LRU, asked from Python one request at a time."""
    from libcachesim import LRU, Request

    cache = LRU(cache_size=NUM_LAYERS * SLOTS_PER_LAYER, hashpower=12)
    request = Request(obj_size=1)
    hits = 0
    for key in keys:
        request.obj_id = key
        hits += cache.get(request)
    return hits


def write_oracle_general(keys: list[int], path: Path) -> None:
    """Write keys in libcachesim's binary format (time, id, size, next access: 24 bytes each)."""
    layout = np.dtype([("time", "<u4"), ("id", "<u8"), ("num_bytes", "<u4"), ("next", "<i8")])
    table = np.zeros(len(keys), layout)
    table["time"], table["id"] = np.arange(len(keys)), keys
    table["num_bytes"], table["next"] = 1, -2
    path.write_bytes(table.tobytes())


def libcachesim_file_hits(path: Path, num_keys: int) -> int:
    """Return the hits of libcachesim's LRU reading a trace file by itself, all of it in C."""
    from libcachesim import LRU, TraceReader, TraceType

    reader = TraceReader(str(path), TraceType.ORACLE_GENERAL_TRACE)
    cache = LRU(cache_size=NUM_LAYERS * SLOTS_PER_LAYER, hashpower=12)
    miss_ratio, _ = cache.process_trace(reader)
    return round((1 - miss_ratio) * num_keys)


@dataclass(frozen=True)
class Line:
    """One line of the table: what runs, and whether its hits must be those of `OrderedDict`."""

    name: str
    run: Run
    is_same_lru: bool = False


def make_lines(stream: AccessStream, folder: Path) -> list[Line]:
    """Return every policy under moesim's own semantics, then the LRUs that count one key at a time."""
    keys = stream.keys(NUM_EXPERTS).tolist()
    lines = [Line(f"moesim {name}, a pool per layer", lambda name=name: replay_hits(name, stream, "set", False))
             for name in POLICIES.names()]
    lines += [Line(REFERENCE, lambda: replay_hits("lru", stream, "sequential", True), True),
              Line(ORDERED_DICT, lambda: ordered_dict_hits(keys), True)]
    if find_spec("libcachesim"):
        file = folder / "keys.oracleGeneral"
        write_oracle_general(keys, file)
        lines += [Line("libcachesim LRU from Python, one pool", lambda: libcachesim_get_hits(keys), True),
                  Line("libcachesim LRU in C, one pool", lambda: libcachesim_file_hits(file, len(keys)), True)]
    return lines


def time_lines(lines: Sequence[Line], repeats: int) -> dict[str, tuple[float, int]]:
    """Return (median CPU seconds, hits) by line; raises SystemExit if LRUs disagree or a run differs."""
    seconds: dict[str, list[float]] = {line.name: [] for line in lines}
    hits: dict[str, set[int]] = {line.name: set() for line in lines}
    for _ in range(repeats):
        for line in lines:
            start = time.process_time()
            hits[line.name].add(line.run())
            seconds[line.name].append(time.process_time() - start)
    same = {line.name: hits[line.name] for line in lines if line.is_same_lru}
    if any(len(found) != 1 for found in hits.values()) or len(set().union(*same.values())) != 1:
        raise SystemExit(f"the hits differ between runs, or between LRUs: {hits}")
    return {line.name: (median(seconds[line.name]), hits[line.name].pop()) for line in lines}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a stream a tenth as long, each line once")
    options = parser.parse_args(arguments)
    num_steps, repeats = (QUICK_STEPS, 1) if options.quick else (NUM_STEPS, REPEATS)
    stream = make_stream(num_steps)
    with tempfile.TemporaryDirectory() as folder:
        found = time_lines(make_lines(stream, Path(folder)), repeats)
    num_uses, base_s = len(stream.experts), found[ORDERED_DICT][0]
    table = Table(*COLUMNS, title=f"Cache replay, {NUM_LAYERS} layers x {NUM_EXPERTS} experts, top-{TOP_K}, "
                                  f"{SLOTS_PER_LAYER} slots per layer, median of {repeats}")
    for name, (cpu_s, hits) in found.items():
        table.add_row(name, f"{num_uses:,}", f"{hits:,}", f"{cpu_s:.4f}", f"{num_uses / cpu_s:,.0f}",
                      f"{cpu_s / base_s:.2f}x")
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
