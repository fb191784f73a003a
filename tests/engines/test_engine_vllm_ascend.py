"""vllm-ascend's own loader reads our expert map: devices, slots, and how many experts are redundant."""

from __future__ import annotations

from pathlib import Path

import pytest
from engines.engine_folder import need, run_engine_code
from export_worlds import MODEL, PLAN

from moesim.export.engines import export

pytestmark = pytest.mark.engines

# what follows the loader there: each rank's map from expert to local slot
LOADER = '''
import torch
stub("vllm.logger", logger=None)
stub("vllm.model_executor.layers.fused_moe.expert_map_manager", determine_expert_map=None)
sys.modules.setdefault("vllm_ascend", types.ModuleType("vllm_ascend"))
utils = load("vllm_ascend.eplb.core.eplb_utils", sys.argv[1])
utils.generate_log2phy_map = lambda maps, rank, tp_size=None: SimpleNamespace(npu=lambda: None)
found = []
for layer in range(3):
    placement, slots = utils.expert_file_to_tensor(sys.argv[2], layer)
    config = SimpleNamespace(expert_map_path=sys.argv[2], dynamic_eplb=False, num_redundant_experts=0)
    maps, local, _, redundant = utils.init_eplb_config(config, layer, SimpleNamespace(num_experts=4, ep_size=2, ep_rank=1))
    found.append([placement.tolist(), slots, maps.tolist(), local.tolist(), redundant])
print(json.dumps(found))
'''


def test_devices_and_slots_are_the_plans(tmp_path: Path) -> None:
    """Every layer's placement is the plan's, and each rank's map finds every expert in the slot that holds it."""
    utils = need("vllm-ascend", "vllm_ascend", "eplb", "core", "eplb_utils.py")
    path = export(PLAN, MODEL, "vllm-ascend", tmp_path / "map.json").path
    for slots, (placement, count, maps, local, redundant) in zip(
            PLAN.physical_to_logical.reshape(3, 2, 3).tolist(), run_engine_code(LOADER, utils, path), strict=True):
        assert placement == slots
        assert (count, redundant) == (6, 2)
        assert maps == [[row.index(expert) if expert in row else -1 for expert in range(4)] for row in slots]
        assert local == maps[1]
