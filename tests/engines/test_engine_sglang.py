"""SGLang's own loader reads our map: every slot, and where its static dispatch sends each expert's tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engines.engine_folder import need, run_engine_code
from export_worlds import MODEL, PLAN

from moesim.export.engines import export

pytestmark = pytest.mark.engines

LOADER = '''
path, map_file = sys.argv[1:3]
experts, redundant, ranks, layers = map(int, sys.argv[3:7])
moe = SimpleNamespace(init_expert_location=map_file, ep_num_redundant_experts=redundant, ep_join_mode="", moe_a2a_backend="none",
                      ep_dispatch_algorithm="static")
stub("sglang.srt.runtime_context", get_device=lambda: SimpleNamespace(device="cpu"),
     get_exec=lambda: SimpleNamespace(moe=moe), get_resources=lambda: SimpleNamespace(expert_location_metadata=None),
     get_parallel=lambda: SimpleNamespace(ep_size=ranks, elastic_ep_initial_size=None, nnodes=1))
stub("sglang.srt.elastic_ep.elastic_ep", elastic_expanded_world_enabled=lambda: False)
location = load("sglang.srt.eplb.expert_location", path)
class Model:
    get_model_config_for_expert_location = staticmethod(
        lambda config: location.ModelConfigForExpertLocation(num_layers=layers, num_logical_experts=experts))
stub("sglang.srt.model_loader", get_model_architecture=lambda config: (Model, ""))
found = [location.compute_initial_expert_location_metadata(SimpleNamespace(hf_config=None), rank) for rank in range(ranks)]
print(json.dumps({"slots": found[0].physical_to_logical_map.tolist(), "local": found[0].num_local_physical_experts,
                  "copies": found[0].logical_to_all_physical_map.tolist(),
                  "dispatch": [one.logical_to_rank_dispatch_physical_map.tolist() for one in found]}))
'''


@pytest.fixture
def loaded(tmp_path: Path) -> dict[str, Any]:
    """What SGLang makes of the exported map on two ranks."""
    loader = need("sglang", "sglang", "srt", "eplb", "expert_location.py")
    path = export(PLAN, MODEL, "sglang", tmp_path / "map.json").path
    return run_engine_code(LOADER, loader, path, PLAN.num_experts, PLAN.num_slots - PLAN.num_experts, PLAN.num_ranks,
                           MODEL.num_layers)


def test_slots_are_the_plans(loaded: dict[str, Any]) -> None:
    """The rows of the MoE layers are the plan's; a rank owns as many slots as in the plan."""
    assert [loaded["slots"][layer] for layer in MODEL.moe_layers] == PLAN.physical_to_logical.tolist()
    assert loaded["local"] == PLAN.slots_per_rank


def test_copies_are_the_plans(loaded: dict[str, Any]) -> None:
    """SGLang's list of each expert's slots is the plan's."""
    for layer, planned in zip(MODEL.moe_layers, PLAN.logical_to_physical.tolist(), strict=True):
        found = [[slot for slot in slots if slot >= 0] for slots in loaded["copies"][layer]]
        assert found == [[slot for slot in slots if slot >= 0] for slots in planned]


def test_static_dispatch_prefers_the_senders_rank(loaded: dict[str, Any]) -> None:
    """What the note on static dispatch says: a rank that holds a copy sends its tokens there."""
    for rank, table in enumerate(loaded["dispatch"]):
        for layer, slots in zip(MODEL.moe_layers, PLAN.physical_to_logical, strict=True):
            for expert, slot in enumerate(table[layer]):
                assert slots[slot] == expert
                own = np.flatnonzero((slots == expert) & (PLAN.slot_rank == rank))
                assert not len(own) or slot in own
