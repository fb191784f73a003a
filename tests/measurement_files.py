"""Small measurements of every source that moesim imports, written by hand from the formats' descriptions.

Not a test module: test files import it by its name. Nothing here uses the readers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

GPU = "testgpu"
ENGINE = {"framework": "Eng", "version": "1.0", "device": "Test GPU 80GB"}
SYSTEM_YAML = """\
data_dir: data/testgpu
gpu:
  mem_bw: 1000000000000  # bytes per second
misc:
  nccl_version: '2.1'
"""

LLAMA_TESTS: list[dict[str, Any]] = [
    {"build_commit": "abc", "model_type": "qwen3moe 30B.A3B Q4_K - Medium", "backends": "CUDA", "gpu_info": "Test GPU",
     "n_gpu_layers": 99, "n_cpu_moe": 8, "n_threads": 16, "n_batch": 2048, "n_ubatch": 512, "type_k": "f16", "type_v": "f16",
     "n_prompt": 512, "n_gen": 0, "n_depth": 0, "test_time": "2026-11-01T10:00:00Z",
     "avg_ns": 400_000_000, "samples_ns": [390_000_000, 400_000_000, 420_000_000], "samples_ts": [1312.8, 1280.0, 1219.0]},
    {"build_commit": "abc", "model_type": "qwen3moe 30B.A3B Q4_K - Medium", "backends": "CUDA", "gpu_info": "Test GPU",
     "n_gpu_layers": 99, "n_cpu_moe": 8, "n_threads": 16, "n_batch": 2048, "n_ubatch": 512, "type_k": "f16", "type_v": "f16",
     "n_prompt": 0, "n_gen": 128, "n_depth": 4096, "avg_ns": 2_560_000_000, "avg_ts": 50.0},
    {"build_commit": "abc", "model_type": "qwen3moe 30B.A3B Q4_K - Medium", "backends": "CUDA", "n_prompt": 512, "n_gen": 128,
     "avg_ns": 3_000_000_000},
]

NVBANDWIDTH_TEXT = """\
nvbandwidth Version: v0.8
Built from Git version: v0.8

CUDA Runtime Version: 12080
Driver Version: 570.1

Device 0: Test GPU (00000000:01:00)
Device 1: Test GPU (00000000:02:00)

Running host_to_device_memcpy_ce.
memcpy CE CPU(row) -> GPU(column) bandwidth (GB/s)
           0         1
 0     50.00     40.00

SUM host_to_device_memcpy_ce 90.00

Running device_to_host_memcpy_ce.
memcpy CE CPU(row) <- GPU(column) bandwidth (GB/s)
           0         1
 0     25.00     25.00

SUM device_to_host_memcpy_ce 50.00

Running host_to_device_bidirectional_memcpy_ce.
memcpy CE CPU(row) <-> GPU(column) bandwidth (GB/s)
           0         1
 0     20.00     20.00

SUM host_to_device_bidirectional_memcpy_ce 40.00

Running device_to_device_memcpy_write_ce.
memcpy CE GPU(row) <- GPU(column) bandwidth (GB/s)
           0         1
 0       N/A    200.00
 1    250.00      0.00

SUM device_to_device_memcpy_write_ce 450.00

Waived:
Running all_to_host_memcpy_sm.
memcpy SM CPU(row) <- GPU(column) bandwidth (GB/s)
           0         1
 0     24.00     24.00

Running host_device_latency_sm.
memory latency SM CPU(row) <-> GPU(column) (ns)
           0         1
 0    800.00    810.00
"""

NVBANDWIDTH_JSON = {"nvbandwidth": {
    "CUDA Runtime Version": 12080, "Driver Version": "570.1", "git_version": "v0.8",
    "GPU Device list": ["0: Test GPU", "1: Test GPU"],
    "testcases": [
        {"name": "host_to_device_memcpy_ce", "status": "Passed", "bandwidth_matrix": [["50.00", "40.00"]], "sum": 90.0},
        {"name": "device_to_host_memcpy_ce", "status": "Passed", "bandwidth_matrix": [["25.00", "25.00"]], "sum": 50.0},
        {"name": "host_to_device_bidirectional_memcpy_ce", "status": "Passed", "bandwidth_matrix": [["20.00", "20.00"]]},
        {"name": "device_to_device_memcpy_write_ce", "status": "Passed",
         "bandwidth_matrix": [["N/A", "200.00"], ["250.00", "0.00"]]},
        {"name": "all_to_host_memcpy_sm", "status": "Passed", "bandwidth_matrix": [["24.00", "24.00"]]},
        {"name": "device_to_device_memcpy_read_ce", "status": "Waived"}]}}


def event(name: str, category: str, start: float, duration: float, tid: int = 1, **args: Any) -> dict[str, Any]:
    """Return one complete event of a Chrome trace."""
    return {"ph": "X", "cat": category, "name": name, "pid": 1, "tid": tid, "ts": start, "dur": duration, "args": args}


# Two ranges, one inside the other; kernels 1 and 2 overlap by 5 us on two streams; kernel 3 belongs to the inner range;
# kernel 4 is launched outside of both. Two pinned copies of different sizes, one of pageable memory, one all-to-all.
KINETO_EVENTS: list[dict[str, Any]] = [
    {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "python"}},
    event("moesim grouped_ffn h64.ff96.m3.w2 bf16 tokens=16 groups=4 largest_group=7", "user_annotation", 100, 100),
    event("moesim router h64.e8 bf16 tokens=16", "user_annotation", 150, 20),
    event("ProfilerStep#1", "user_annotation", 0, 1000),
    event("cudaLaunchKernel", "cuda_runtime", 110, 5, correlation=1),
    event("cudaLaunchKernel", "cuda_runtime", 120, 5, correlation=2),
    event("cuLaunchKernel", "cuda_driver", 160, 5, correlation=3),
    event("cudaLaunchKernel", "cuda_runtime", 300, 5, correlation=4),
    event("cudaLaunchKernel", "cuda_runtime", 130, 5, tid=9, correlation=5),
    event("fused_moe_kernel", "kernel", 200, 30, tid=7, correlation=1, stream=7),
    event("silu_and_mul", "kernel", 225, 15, tid=8, correlation=2, stream=8),
    event("topkGatingSoftmax", "kernel", 260, 10, tid=7, correlation=3),
    event("my_own_kernel", "kernel", 400, 20, tid=7, correlation=4),
    event("flash_fwd_kernel", "kernel", 430, 5, tid=7, correlation=5),
    event("Memcpy HtoD (Pinned -> Device)", "gpu_memcpy", 500, 10, tid=7, bytes=1_000_000),
    event("Memcpy HtoD (Pinned -> Device)", "gpu_memcpy", 520, 12, tid=7, bytes=1_000_000),
    event("Memcpy HtoD (Pinned -> Device)", "gpu_memcpy", 540, 40, tid=7, bytes=4_000_000),
    event("Memcpy HtoD (Pageable -> Device)", "gpu_memcpy", 600, 90, tid=7, bytes=1_000_000),
    event("Memcpy HtoD (Pageable -> Device)", "gpu_memcpy", 700, 350, tid=7, bytes=4_000_000),
    event("Memcpy DtoH (Device -> Pinned)", "gpu_memcpy", 1100, 10, tid=7, bytes=1_000_000),
    event("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", "kernel", 1200, 8, tid=9,
          **{"Collective name": "all_to_allv", "In msg nelems": 1024, "Out msg nelems": 1024, "Group size": 8,
             "dtype": "BFloat16"}),
]


def kineto_document(events: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """Return a trace as torch.profiler writes it."""
    return {"schemaVersion": 1, "deviceProperties": [{"id": 0, "name": "Test GPU 80GB", "numSms": 8}],
            "traceEvents": KINETO_EVENTS if events is None else events, "displayTimeUnit": "ms", "traceName": "t.json"}


def moe_row(tokens: int, latency_ms: float, *, distribution: str = "balanced", ep: int = 1, **changes: Any) -> dict[str, Any]:
    """Return one row of moe_perf: top-2 of 8 experts, 64 x 96."""
    return {**ENGINE, "op_name": "moe", "kernel_source": "eng_moe", "moe_dtype": "bfloat16", "num_tokens": tokens,
            "hidden_size": 64, "inter_size": 96, "topk": 2, "num_experts": 8, "moe_tp_size": 1, "moe_ep_size": ep,
            "distribution": distribution, "latency": latency_ms, **changes}


MOE_ROWS = [moe_row(1, 0.010), moe_row(2, 0.020), moe_row(8, 0.040), moe_row(16, 0.050), moe_row(8, 0.025, ep=2),
            moe_row(8, 0.099, distribution="power_law_1.2"), moe_row(8, 0.5, hidden_size=128)]
GEMM_ROWS = [{**ENGINE, "op_name": "gemm", "kernel_source": "eng_linear", "gemm_dtype": dtype, "m": m, "n": n, "k": k,
              "latency": m * 0.001 + n * 1e-5}
             for dtype in ("bfloat16", "fp8") for m in (1, 2, 4) for n, k in ((128, 64), (64, 64))]
ATTENTION_ROWS = [{**ENGINE, "op_name": "generation_attention", "kernel_source": "fa9", "batch_size": batch, "isl": 1,
                   "num_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "beam_width": 1, "attn_dtype": "bfloat16",
                   "kv_cache_dtype": cache, "step": step, "window_size": 0, "latency": 0.002 + batch * (step + 1) * 1e-5}
                  for cache in ("bfloat16", "fp8") for batch in (1, 4, 8) for step in (1, 63)]
NCCL_ROWS = [{"nccl_dtype": dtype, "num_gpus": 8, "message_size": size, "kernel_source": "NCCL", "op_name": op, "latency": 0.01 * size}
             for dtype, op in (("half", "alltoall"), ("int8", "alltoall"), ("half", "all_reduce")) for size in (256, 1024)]
LL_ROWS = [{**ENGINE, "op_name": "ll", "kernel_source": "deepep", "node_num": 1, "hidden_size": 64, "num_token": tokens,
            "num_topk": 2, "num_experts": 8, "combine_avg_t_us": 20.0 + tokens, "combine_bandwidth_gbps": 1.0,
            "dispatch_avg_t_us": 10.0 + tokens, "dispatch_bandwidth_gbps": 1.0} for tokens in (1, 8)]
A2A_ROWS = [{**ENGINE, "op_name": "moe_a2a", "kernel_source": "deepep", "comm_backend": "eng_ll", "phase": "dispatch",
             "comm_dtype": "fp8", "ep_size": 4, "node_num": 1, "hidden_size": 64, "topk": 2, "num_experts": 8,
             "num_tokens": tokens, "sms": 0, "transmit_us": 30.0, "notify_us": 2.0 * tokens, "latency": 0.0} for tokens in (1, 8)]
TABLES = {"moe/eng/1.0/moe_perf": MOE_ROWS, "gemm/eng/1.0/gemm_perf": GEMM_ROWS,
          "attention/eng/1.0/generation_attention_perf": ATTENTION_ROWS, "comm/nccl/2.1/nccl_perf": NCCL_ROWS,
          "comm/eng/1.0/wideep_deepep_ll_perf": LL_ROWS, "comm/eng/1.0/moe_a2a_perf": A2A_ROWS}


def write_gpu(root: Path, tables: dict[str, list[dict[str, Any]]] | None = None, system: str = SYSTEM_YAML) -> Path:
    """Write ``systems/`` of one GPU below `root`; returns the GPU's folder."""
    folder = root / "systems" / "data" / GPU
    for name, rows in (TABLES if tables is None else tables).items():
        file = folder / f"{name}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), file)
    folder.mkdir(parents=True, exist_ok=True)
    (root / "systems" / f"{GPU}.yaml").write_text(system)
    return folder


def write_files(root: Path) -> dict[str, tuple[list[Path], dict[str, Any]]]:
    """Write one sample per source that reads files; returns its paths and options by source."""
    files = {"kineto.json": json.dumps(kineto_document()), "bench.json": json.dumps(LLAMA_TESTS),
             "bw.txt": NVBANDWIDTH_TEXT, "bw.json": json.dumps(NVBANDWIDTH_JSON)}
    for name, text in files.items():
        (root / name).write_text(text)
    return {"torch-profiler": ([root / "kineto.json"], {}), "llama-bench": ([root / "bench.json"], {}),
            "nvbandwidth": ([root / "bw.txt", root / "bw.json"], {"buffer_mib": "512,1"})}
