"""aiconfigurator's tables of exchange: NCCL's all-to-all by bytes, DeepEP's and engines' dispatch and combine by tokens.

The simulator does not read these tables (its all-to-all is a closed form over nameplate rates); they are there to be
compared with. Traffic in them is even.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from moesim.calibrate.imports.aic_files import Gpu, read_table
from moesim.calibrate.imports.base import Findings, TableKey, seconds_from_ms, seconds_from_us
from moesim.model.spec import ModelSpec

if TYPE_CHECKING:
    import pandas as pd

ELEMENT_BYTES = {"half": 2, "int8": 1}
NCCL_OPS = {"alltoall": "all_to_all", "all_gather": "all_gather", "reduce_scatter": "reduce_scatter",
            "all_reduce": "all_reduce"}
_LL = ("combine_avg_t_us", "dispatch_avg_t_us")
_NORMAL = ("dispatch_sms", "dispatch_transmit_us", "dispatch_notify_us", "combine_sms", "combine_transmit_us",
           "combine_notify_us")
_SHAPE = ("hidden_size", "num_token", "num_topk", "num_experts", "node_num")


def add_exchange(found: Findings, gpu: Gpu, model: ModelSpec, nccl_version: str | None,
                 exchange_version: str | None) -> None:
    """Add collectives (axis bytes per rank), dispatch and combine (axis tokens per rank).

    Raises:
        InputError: a damaged table, or several versions of one.
    """
    _add_nccl(found, gpu, nccl_version)
    for table in ("wideep_deepep_ll_perf", "wideep_deepep_normal_perf", "moe_a2a_perf"):
        version = exchange_version or gpu.engine_version
        path = gpu.find(table, gpu.engine, version, "exchange_version")
        if path is None:
            found.left_out[f"{table}: none of {gpu.engine} {version}"] += 1
            continue
        rows = list(_READERS[table](path, model))
        for key, tokens, seconds in rows:
            found.add(key, (tokens,), seconds, str(path))
        if rows:
            found.files.append(path)
        else:
            found.left_out[f"{table}: no rows of hidden {model.hidden_size}, top-{model.top_k} of {model.num_experts}"] += 1


def _add_nccl(found: Findings, gpu: Gpu, wanted: str | None) -> None:
    misc = gpu.system.get("misc")
    stated = misc.get("nccl_version") if isinstance(misc, dict) else None
    path = gpu.find("nccl_perf", "nccl", wanted or (str(stated) if stated else None), "nccl_version")
    if path is None:
        found.left_out[f"nccl_perf: no version {wanted or stated}"] += 1
        return
    rows = read_table(path, ("num_gpus", "message_size", "latency"), ("nccl_dtype", "op_name"))
    for op, dtype, ranks, elements, latency in rows[["op_name", "nccl_dtype", "num_gpus", "message_size", "latency"]].itertuples(
            index=False):
        if op not in NCCL_OPS or dtype not in ELEMENT_BYTES:
            found.left_out[f"nccl_perf: {op} of {dtype}"] += 1
            continue
        key = TableKey(NCCL_OPS[op], "nccl", f"ranks{int(ranks)}", dtype, ("bytes",))
        # message_size counts elements, not bytes
        found.add(key, (elements * ELEMENT_BYTES[dtype],), seconds_from_ms(latency), str(path))
    found.files.append(path)
    found.facts["nccl"] = path.parent.name


Row = tuple[TableKey, float, float]


def _low_latency(path: Path, model: ModelSpec) -> Iterator[Row]:
    rows = _of_model(read_table(path, (*_SHAPE, *_LL), ()), model)
    for row in rows.itertuples(index=False):
        shape = f"{_model_shape(model)}.nodes{int(row.node_num)}"
        for op, microseconds in (("dispatch", row.dispatch_avg_t_us), ("combine", row.combine_avg_t_us)):
            yield TableKey(op, "deepep_ll", shape, "", ("tokens",)), row.num_token, seconds_from_us(microseconds)


def _normal(path: Path, model: ModelSpec) -> Iterator[Row]:
    rows = _of_model(read_table(path, (*_SHAPE, *_NORMAL), ()), model)
    for row in rows.itertuples(index=False):
        shape = f"{_model_shape(model)}.nodes{int(row.node_num)}"
        parts = (("dispatch", row.dispatch_sms, row.dispatch_transmit_us + row.dispatch_notify_us),
                 ("combine", row.combine_sms, row.combine_transmit_us + row.combine_notify_us))
        for op, sms, microseconds in parts:
            yield TableKey(op, "deepep_normal", f"{shape}.sms{int(sms)}", "", ("tokens",)), row.num_token, seconds_from_us(
                microseconds)


def _engine(path: Path, model: ModelSpec) -> Iterator[Row]:
    numbers = ("ep_size", "node_num", "hidden_size", "topk", "num_experts", "num_tokens", "sms", "transmit_us", "notify_us")
    rows = read_table(path, numbers, ("comm_backend", "phase", "comm_dtype"))
    rows = rows.rename(columns={"topk": "num_topk"})
    for row in _of_model(rows, model).itertuples(index=False):
        shape = f"{_model_shape(model)}.ranks{int(row.ep_size)}.nodes{int(row.node_num)}.sms{int(row.sms)}"
        yield (TableKey(row.phase, row.comm_backend, shape, row.comm_dtype, ("tokens",)), row.num_tokens,
               seconds_from_us(row.transmit_us + row.notify_us))


_READERS = {"wideep_deepep_ll_perf": _low_latency, "wideep_deepep_normal_perf": _normal, "moe_a2a_perf": _engine}


def _of_model(rows: pd.DataFrame, model: ModelSpec) -> pd.DataFrame:
    return rows[(rows["hidden_size"] == model.hidden_size) & (rows["num_topk"] == model.top_k)
                & (rows["num_experts"] == model.num_experts)]


def _model_shape(model: ModelSpec) -> str:
    return f"h{model.hidden_size}.k{model.top_k}.e{model.num_experts}"
