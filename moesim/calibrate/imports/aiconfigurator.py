"""NVIDIA's measured operator tables, from the user's own installation of aiconfigurator-core (Apache-2.0, PyPI).

One model at a time: its experts (`aic_moe`), projections and decode attention (`aic_dense`), and exchanges
(`aic_comm`), of one GPU, one engine and one version of it. Nothing of the package is copied into moesim.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from moesim.calibrate.imports.aic_comm import add_exchange
from moesim.calibrate.imports.aic_dense import add_dense
from moesim.calibrate.imports.aic_files import PACKAGE, open_gpu, system_file
from moesim.calibrate.imports.aic_moe import add_experts
from moesim.calibrate.imports.base import Findings, Importer
from moesim.errors import InputError
from moesim.model.catalog import load_model
from moesim.model.spec import ModelSpec


def read_aiconfigurator(names: Sequence[str], model: ModelSpec | str | os.PathLike[str] | None = None, *,
                        engine: str | None = None, version: str | float | None = None, moe_dtype: str | None = None,
                        kernel: str | None = None, expert_parallel: str = "rank0", moe_tp: int = 1,
                        nccl_version: str | float | None = None,
                        exchange_version: str | float | None = None) -> Findings:
    """Read the tables of one GPU for one model.

    Args:
        names: one name of a GPU in the installed package (``h200_sxm``), or its folder.
        model: a catalog name, a config.json or a spec.
        engine: whose tables: ``sglang``, ``trtllm``, ``vllm``; needed where there are several.
        version: of the engine; needed where there are several.
        moe_dtype: the table's dtype of the experts; by default the one of the model's bytes per weight.
        kernel: the table's kernel_source of the experts; needed where there are several.
        expert_parallel: ``rank0``: rows of several ranks too, read as the rank with the first experts; ``off``: without.
        moe_tp: over how many ranks each expert is cut; the shape is that of one part.
        nccl_version: by default the one that the package names for the GPU.
        exchange_version: the engine's version in the tables of dispatch and combine; by default `version`.

    Raises:
        InputError: as `aic_files.open_gpu`, `aic_moe.add_experts`, and for no model or more than one name.
    """
    if len(names) != 1:
        raise InputError(f"{PACKAGE}: name one GPU or one folder, got {len(names)}")
    if model is None:
        raise InputError(f"{PACKAGE}: name the model whose kernels are wanted (--model)")
    if isinstance(moe_tp, bool) or not isinstance(moe_tp, int):
        raise InputError(f"moe_tp must be a whole number, got {moe_tp!r}")
    spec = model if isinstance(model, ModelSpec) else load_model(model)
    gpu = open_gpu(names[0], engine, None if version is None else str(version))
    found = Findings(f"{spec.name} {gpu.folder.absolute().name} {gpu.engine} {gpu.engine_version}")
    found.facts |= {"package": PACKAGE, "package_version": gpu.package_version, "model": spec.name}
    found.files.append(system_file(gpu.folder.absolute()))
    add_experts(found, gpu, spec, moe_dtype=moe_dtype, kernel=kernel, expert_parallel=expert_parallel, moe_tp=moe_tp)
    add_dense(found, gpu, spec)
    add_exchange(found, gpu, spec, *(None if one is None else str(one) for one in (nccl_version, exchange_version)))
    return found


AICONFIGURATOR = {"aiconfigurator": Importer(
    read_aiconfigurator, "tables of an installed aiconfigurator-core: MoE, attention, GEMM, exchange, of a GPU and a model")}
