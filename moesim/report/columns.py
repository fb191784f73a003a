"""The columns of each kind of study: heading, what is better, and which ones the text table leaves out."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Column:
    """How one column of a study is shown. `better` is ``low``, ``high``, ``zero`` (nearest) or nothing.

    A column that is `wide` is left out of the text table (110 columns) but is in the report's. One that is
    `quiet` becomes a line below the text table where it says the same in every row.
    """

    key: str
    heading: str
    better: str = ""
    wide: bool = False
    quiet: bool = False


COLUMNS: dict[str, tuple[Column, ...]] = {
    "expert_parallel": (
        Column("placement", "placement"), Column("redundant_experts", "extra\nslots"),
        Column("imbalance", "imbal-\nance", "low"), Column("imbalance_bound", "bound"),
        Column("imbalance_gap", "gap", "low", wide=True),
        Column("cross_rank_fraction", "cross-\nrank", "low", wide=True),
        Column("cross_rank_bytes_per_step", "cross-\nrank", "low"),
        Column("cross_node_fraction", "cross-\nnode", "low", wide=True),
        Column("cross_node_bytes_per_step", "cross-\nnode", "low"),
        Column("step_time_s", "step\ntime", "low"), Column("step_time_bound_s", "bound"),
        Column("step_time_gap", "gap", "low"), Column("tokens_per_s", "tokens\nper s", "high"),
        Column("tokens_per_s_bound", "bound", wide=True), Column("bound_by", "limited by"),
        Column("objective_gap", "solver\ngap", "low")),
    "offload": (
        Column("system", "system", quiet=True),
        Column("policy", "policy"), Column("prefetch", "prefetch", quiet=True), Column("miss", "on a\nmiss"),
        Column("allocation", "slots\ndivided", quiet=True), Column("precision", "widths", wide=True),
        Column("requests_at_once", "at\nonce", quiet=True),
        Column("slots_per_layer", "slots/\nlayer"), Column("resident_fraction", "resident", wide=True),
        Column("hit_rate", "hit\nrate", "high"), Column("htod_bytes_per_token", "HtoD per\ntoken", "low"),
        Column("stall_fraction", "stalled", "low"),
        Column("stall_link_fraction", "waits for\nthe link", "low", wide=True),
        Column("stall_cpu_fraction", "waits for\nthe CPU", "low", wide=True),
        Column("stall_flash_fraction", "waits for\nflash", "low", wide=True),
        Column("stall_other_fraction", "waits for\nthe rest", "low", wide=True),
        Column("stall_cause", "waits most\nfor", wide=True), Column("stall_cause_fraction", "that wait", wide=True),
        Column("ttft_s", "time to\nfirst token", "low", wide=True), Column("tpot_s", "time per\ntoken", "low"),
        Column("tpot_bound_s", "bound"), Column("tpot_gap", "gap", "low"), Column("bound_for", "bound\nfor", wide=True),
        Column("link_floor_s", "link's\nfloor", wide=True), Column("kernel_floor_s", "kernels'\nfloor", wide=True),
        Column("tokens_per_s", "tokens\nper s", "high"), Column("bound_by", "limited by"),
        Column("prefetches", "prefetches", wide=True), Column("useful_prefetch_fraction", "in time", "high", wide=True),
        Column("late_prefetch_fraction", "late", wide=True), Column("useless_prefetch_fraction", "useless", "low", wide=True),
        Column("host_hit_rate", "host\nhit rate", "high", quiet=True),
        Column("debit_mean_bits", "mean\nbits", "high", quiet=True), Column("debit_skipped_share", "skip-\nped", "low", quiet=True),
        Column("debit_by_bits", "weight\nby width", wide=True), Column("debit_widest_share", "at full\nwidth", "high", wide=True),
        Column("debit_source", "widths\nchosen by", wide=True), Column("debit_published", "published\naccuracy", wide=True),
        Column("energy_j_per_token", "joules\nper token", "low", wide=True),
        Column("knows", "knows", wide=True), Column("sees_future", "sees the\nfuture", wide=True)),
    "diffusion": (
        Column("policy", "policy"), Column("coreset", "coreset", wide=True), Column("knows", "knows", quiet=True),
        Column("tau", "tau"), Column("factor", "factor", wide=True), Column("slots_per_layer", "slots/\nlayer", quiet=True),
        Column("resident_fraction", "resident", wide=True),
        Column("refreshes_per_block", "refresh/\nblock"), Column("promotions_per_step", "moved\nper pass", wide=True),
        Column("miss_rate", "misses", "low", wide=True),
        Column("unique_experts", "experts\nused", quiet=True), Column("no_locality_experts", "without\nlocality", wide=True),
        Column("published_experts", "distinct\n(published)", wide=True),
        Column("expert_bytes_per_layer", "weights\nper layer", wide=True),
        Column("experts_step_s", "experts\nper pass", "low"), Column("moves_step_s", "moves\nper pass", wide=True),
        Column("other_step_s", "rest of\na pass", wide=True),
        Column("step_time_s", "time per\npass", "low"), Column("tokens_per_s", "tokens\nper s", "high"),
        Column("over_optimal_fraction", "over\noptimal", "low"),
        Column("published_accuracy_fraction", "published\naccuracy", "high"),
        Column("lost_weight_share", "weight\nlost", "low"), Column("uncovered_share", "tokens\nleft out", wide=True),
        Column("empty_share", "places\nleft empty", wide=True), Column("published_source", "published in", wide=True)),
    "validation": (
        Column("kind", "task kind"), Column("num_tasks", "tasks"), Column("predicted_s", "predicted"),
        Column("measured_s", "measured"), Column("spread", "spread"), Column("error", "error", "zero"),
        Column("error_share", "share of\nthe error")),
}

REQUIRED = {"expert_parallel": ("placement", "step_time_s"),
            "offload": ("policy", "prefetch", "miss", "slots_per_layer", "tokens_per_s"),
            "diffusion": ("policy", "slots_per_layer", "step_time_s", "tokens_per_s"),
            "validation": ("kind", "predicted_s", "measured_s")}
