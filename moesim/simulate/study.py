"""StudyResult: several simulated points of one question side by side; written as ``*.study.json``."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from moesim.artifacts import read_json, write_json
from moesim.errors import InputError

SCHEMA = "moesim.study/1"
KINDS = ("expert_parallel", "offload", "diffusion", "validation")


@dataclass(frozen=True)
class StudyResult:
    """One row per point. The columns depend on `kind`; units are the last word of each name.

    - ``expert_parallel``: placement, redundant_experts, imbalance, imbalance_bound, imbalance_gap,
      cross_rank_fraction, cross_node_fraction, cross_rank_bytes_per_step, cross_node_bytes_per_step,
      step_time_s, step_time_bound_s, step_time_gap, tokens_per_s, tokens_per_s_bound, bound_by, objective_gap;
    - ``offload``: system, policy, prefetch, miss, allocation, precision, slots_per_layer, resident_fraction, knows,
      sees_future, requests_at_once, hit_rate, htod_bytes_per_token, ttft_s, tpot_s, tokens_per_s, stall_fraction, its parts
      stall_link_fraction, stall_cpu_fraction, stall_flash_fraction and stall_other_fraction, stall_cause,
      stall_cause_fraction, energy_j_per_token, bound_by, tpot_bound_s, tpot_gap, bound_for (``on_demand`` or ``any``),
      link_floor_s, kernel_floor_s, prefetches and what became of them, host_hit_rate; with a precision its accuracy debit;
    - ``diffusion``: policy, coreset, knows, tau, factor, slots_per_layer, resident_fraction, refreshes_per_block,
      promotions_per_step, miss_rate, unique_experts, no_locality_experts, published_experts, expert_bytes_per_layer,
      experts_step_s, moves_step_s, other_step_s, step_time_s, tokens_per_s, over_optimal_fraction,
      published_accuracy_fraction, lost_weight_share, uncovered_share, empty_share, published_source (rows
      with all experts on the GPU name a coreset, ``none`` for the routing as it is; rows of refresh policies name none);
    - ``validation``: kind, num_tasks, predicted_s, measured_s, spread, error (rows per task kind and
      one ``end to end`` row per repetition summary).

    `notes` are sentences for the reader: what was assumed, which bound is meant, where costs come from.
    """

    name: str
    kind: str
    title: str
    table: pd.DataFrame
    notes: tuple[str, ...] = ()
    provenance: dict[str, Any] = field(default_factory=dict)

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write ``*.study.json``."""
        rows = self.table.astype(object).where(self.table.notna(), None).to_dict(orient="records")
        body = {
            "name": self.name,
            "kind": self.kind,
            "title": self.title,
            "notes": list(self.notes),
            "provenance": self.provenance,
            "columns": list(self.table.columns),
            "rows": rows,
        }
        return write_json(path, SCHEMA, body)


def read_study(path: str | os.PathLike[str]) -> StudyResult:
    """Read a study; raises InputError for a file that is not one."""
    body = read_json(path, SCHEMA)
    try:
        table = pd.DataFrame(body["rows"], columns=body["columns"])
        return StudyResult(body["name"], body["kind"], body["title"], table, tuple(body["notes"]), body["provenance"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not a study: {error!r}") from None
