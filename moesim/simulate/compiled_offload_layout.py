"""State of the compiled offload engine: one int64 array, `m`, and the names of what lies where in it.

A record (of a key, a copy, a place in a queue, a wire) is named by the address of its first cell: ``m[f + F_SLOT]`` is a
field of record `f`, and -1 is no record. With one array instead of thirty, compiled functions are cheap to call and quick
to compile. The head of `m` holds the numbers of the run, where it stands, and where each region begins.
"""

from __future__ import annotations

NEVER_NS = 1 << 62  # later than any instant
PROTECTED = (1 << 63) - 1  # rank of a slot that is free or may not be taken now

# Policies and what to do with a miss.
LRU, LFU, LFU_RESIDENT, BELADY, BELADY_BYPASS, STATIC = range(6)
LOAD_MISSES, CPU_MISSES, FASTER_MISSES = range(3)
LOAD, ADMIT, PREFETCH = range(3)  # kinds of copies; also their classes in the queues
COMPUTE, CPU, FIRST_WIRE = 0, 1, 2  # resources

# ---------------------------------------------------------------- the head of `m`
# Numbers that do not change. HORIZON is above every access index, NEVER above every worth of a key that is used again.
NUMBERS = (
    "num_layers", "num_experts", "num_chunks", "num_hops", "num_wires", "send_wire", "receive_wire", "policy", "miss",
    "admit", "shared", "pool_slots", "num_slots", "key_bits", "horizon", "never", "has_shared_expert", "has_prefetch",
    "num_sizes", "emit")
(NUM_LAYERS, NUM_EXPERTS, NUM_CHUNKS, NUM_HOPS, NUM_WIRES, SEND_WIRE, RECEIVE_WIRE, POLICY, MISS,
 ADMITTING, SHARED, POOL_SLOTS, NUM_SLOTS, KEY_BITS, HORIZON, NEVER, HAS_SHARED_EXPERT, HAS_PREFETCH,
 NUM_SIZES, EMIT) = range(20)
# Where the run stands. CLOCK: end of the last task that everything waits for; INSTANT: the last one that was handled.
(CLOCK, INSTANT, NEXT_TASK, LAST_TASK, COMPUTE_FREE, CPU_FREE, CHAIN_END, WAITING, TURN, CANCELLED, FREE_FETCH, ROUTER,
 ACCESS, LABEL, LAYER, NUM_AHEAD, NUM_LATE, NUM_MISSES, NUM_STAGED, NUM_CHAINS, NUM_AWAITED, NUM_USERS, CPU_FIRST,
 CPU_LAST, STAGE_FIRST, STAGE_LAST, CAPACITY) = range(20, 47)
# Where regions begin (KEYS ... RECEIVES are addresses of the first record or number).
REGIONS = (
    "keys", "ranks", "free_slots", "num_free", "slot_fetch", "use_end", "bounds", "uses", "fetches", "wires", "route",
    "hop_ns", "hop_source", "chunk_bytes", "copies", "counts", "wanted", "ahead", "ahead_list", "late", "misses", "staged",
    "chains", "cpu_queue", "stage_queue", "awaited", "users", "works", "on_cpu", "cpu_done", "asked", "layers", "kinds")
(KEYS, RANKS, FREE_SLOTS, NUM_FREE, SLOT_FETCH, USE_END, BOUNDS, USES, FETCHES, WIRES, ROUTE,
 HOP_NS, HOP_SOURCE, CHUNK_BYTES, COPIES, COUNTS, WANTED, AHEAD, AHEAD_LIST, LATE, MISSES, STAGED,
 CHAINS, CPU_QUEUE, STAGE_QUEUE, AWAITED, USERS, WORKS, ON_CPU, CPU_DONE, ASKED, LAYERS, KINDS) = range(47, 80)
HEAD_CELLS = 80

# ---------------------------------------------------------------- records
# A key: its slot or -1, its rank, its copy under way or -1, and the count of its uses (LFU), the address of its next use
# (Belady) or whether it may enter (static).
K_SLOT, K_RANK, K_FETCH, K_USES, KEY_CELLS = range(5)

# A place in a queue: ready time, task, neighbours, whose it is (a copy or a chain), and over which hop of the copy
# (SENDING, RECEIVING for a chain). A copy's first hop has one for all its chunks, every later hop one per chunk.
N_READY, N_TASK, N_NEXT, N_PREV, N_OWNER, N_HOP, NODE_CELLS = range(7)
SENDING, RECEIVING = -1, -2

# A copy of one expert. F_NEXT: the copy into a staging slot that waits for this one's expert; the next free record. From
# F_HOPS on, per hop, the chunks that started and that ended; then its places in queues.
(F_KEY, F_SLOT, F_FIRST, F_KIND, F_CLASS, F_DEAD, F_LINKED, F_UNMET, F_RUNNING, F_TOKENS, F_EXPERT, F_NEXT,
 F_HOPS) = range(13)

# A wire: what runs or -1, when it is or was free, the copy that waits for what runs, and three queues.
W_RUN, W_END, W_WAITER, W_HEAD, W_TAIL, WIRE_CELLS = 0, 1, 2, 3, 6, 9

# An expert on the CPU: its tokens, the first of its three tasks, its places in the queues of the two wires.
H_TOKENS, H_TASK, H_SEND, H_RECEIVE, CHAIN_CELLS = 0, 1, 2, 2 + NODE_CELLS, 2 + 2 * NODE_CELLS

# Work by what and tokens (NUM_SIZES of them).
ROUTER_WORK, DENSE_WORK, SHARED_WORK, HEAD_WORK, EXPERT_WORK, CPU_WORK, SEND_WORK, RECEIVE_WORK, NUM_WORKS = range(9)
WORK_NS, WORK_BYTES, WORK_SOURCE, WORK_CELLS = range(4)

# ---------------------------------------------------------------- other arrays
# `steps` [step, column]: its attention, its sizes, its label; `out` [step, column].
STEP_NS, STEP_BYTES, STEP_SOURCE, STEP_CONTEXT, STEP_TOKENS, STEP_HEAD, STEP_LABEL, STEP_COLUMNS = range(8)
OUT_FIRST, OUT_LAST, OUT_END = range(3)

# `table`: columns of CAPACITY rows each, one after the other, then the dependencies; C_DEPS: where a task's end there.
(C_KIND, C_RESOURCE, C_NS, C_PRIORITY, C_SOURCE, C_STATE, C_READY, C_START, C_END, C_STEP, C_LAYER, C_EXPERT, C_SLOT,
 C_CHUNK, C_TOKENS, C_CONTEXT, C_BYTES, C_DEPS, TABLE_COLUMNS) = range(19)

# Counts per layer, in the order of `lowering.offload.CACHE_COLUMNS`.
(ACCESSES, HITS, LATE_HITS, MISSED, CPU_MISSED, LOADS, ADMITS, PREFETCHES, USEFUL, LATE_PREFETCHES, USELESS,
 CANCELLED_PREFETCHES, NUM_COUNTS) = range(13)
