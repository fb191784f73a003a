"""What was routed: RoutingTrace, its file, where it comes from and what it says."""

from __future__ import annotations

from moesim.traces.arrivals import Arrivals, read_arrivals, write_arrivals
from moesim.traces.counts import CountTrace, read_counts, write_counts
from moesim.traces.importers import import_any, import_trace
from moesim.traces.reductions import Reductions, reduce_trace
from moesim.traces.split import first_requests, select_phase, shuffle_tokens, split_requests
from moesim.traces.stats import TraceStats, co_activation, load_counts, trace_stats, transition_counts
from moesim.traces.steps import Step, closed_loop_steps
from moesim.traces.store import iter_trace, read_trace, resolve_trace, trace_info, write_trace
from moesim.traces.synth import synthetic_trace
from moesim.traces.trace import DECODE, DENOISE, PAD, PHASES, PREFILL, RoutingTrace
from moesim.traces.writer import TraceWriter

__all__ = [
    "DECODE", "DENOISE", "PAD", "PHASES", "PREFILL", "Arrivals", "CountTrace", "Reductions", "RoutingTrace",
    "Step", "TraceStats", "TraceWriter", "closed_loop_steps", "co_activation", "first_requests", "import_any",
    "import_trace", "iter_trace", "load_counts", "read_arrivals", "read_counts", "read_trace", "reduce_trace",
    "resolve_trace", "select_phase", "shuffle_tokens", "split_requests", "synthetic_trace", "trace_info",
    "trace_stats", "transition_counts", "write_arrivals", "write_counts", "write_trace",
]
