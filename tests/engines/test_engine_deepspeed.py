"""DeepSpeed's own checkpoint loader, on a checkpoint renumbered as our layout says, gives each rank the plan's experts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from engines.engine_folder import need, run_engine_code
from export_worlds import MODEL, SINGLE

from moesim.export.engines import export

pytestmark = pytest.mark.engines

# a checkpoint is a dict here: file name -> keys and tensors; an expert's tensor holds its old number
LOADER = '''
import ast, os, torch
engine, layout = sys.argv[1:3]
rows = json.load(open(layout))["old_expert_of_new_id"]
ranks = json.load(open(layout))["inference_config"]["moe"]["ep_size"]
body = [node for node in ast.walk(ast.parse(open(engine).read()))
        if getattr(node, "name", "") in ("load_moe_state_dict", "_get_expert_ckpt_name")]
stub("deepspeed.module_inject.auto_ep_layer", AutoEPMoELayer=type(None))
class TorchCheckpointEngine:
    def load(self, path, map_location):
        return dict(files[path])
class MoE:
    expert_group_name = "ep"
    num_local_experts = len(rows[0]) // ranks
class groups:
    _get_expert_parallel_rank = staticmethod(lambda name: rank)
loader = ast.Module([ast.ClassDef("DeepSpeedEngine", [], [], body, [])], [])
exec(compile(ast.fix_missing_locations(loader), "engine", "exec"), globals())
files = {}
def key(layer, expert):
    return f"layers.{layer}.mlp.deepspeed_moe.experts.deepspeed_experts.{expert}.weight"
for layer, row in enumerate(rows):
    for new, old in enumerate(row):
        files[DeepSpeedEngine._get_expert_ckpt_name("c", layer, new, "t")] = {key(layer, new): torch.tensor(old)}
model = SimpleNamespace(named_modules=lambda: [(str(layer), MoE()) for layer in range(len(rows))])
found = []
for rank in range(ranks):
    state = {}
    DeepSpeedEngine.load_moe_state_dict("c", "t", state, False, model=model)
    found.append([[state[key(layer, local)].item() for local in range(MoE.num_local_experts)] for layer in range(len(rows))])
print(json.dumps({"held": found, "names": sorted(files)[:1]}))
'''

CONFIG = '''
source, layout = sys.argv[1:3]
stub("deepspeed.utils", logger=None)
sys.modules["deepspeed"].DeepSpeedConfig = None
load("deepspeed.runtime.config_utils", source + "/deepspeed/runtime/config_utils.py")
from pydantic import BaseModel
stub("deepspeed.runtime.zero.config", DeepSpeedZeroConfig=type("DeepSpeedZeroConfig", (BaseModel,), {}))
config = load("deepspeed.inference.config", source + "/deepspeed/inference/config.py")
moe = config.DeepSpeedMoEConfig(**json.load(open(layout))["inference_config"]["moe"])
print(json.dumps([moe.enabled, moe.ep_size, moe.moe_experts]))
'''


def test_ranks_hold_the_plans_experts(tmp_path: Path) -> None:
    """Through the loader's own names and renumbering of keys: rank r's local expert i is the plan's."""
    engine = need("deepspeed", "deepspeed", "runtime", "engine.py")
    path = export(SINGLE, MODEL, "deepspeed", tmp_path / "d.json").path
    found = run_engine_code(LOADER, engine, path)
    slots = SINGLE.physical_to_logical.reshape(3, 2, 2)
    assert found["held"] == [slots[:, rank].tolist() for rank in range(2)]
    assert found["names"] == ["c/t/layer_0_expert_0_mp_rank_00_model_states.pt"]


def test_the_inference_section_is_taken(tmp_path: Path) -> None:
    """DeepSpeed's strict configuration class accepts the section and reads the same sizes."""
    source = need("deepspeed", "deepspeed", "inference", "config.py").parent.parent.parent
    path = export(SINGLE, MODEL, "deepspeed", tmp_path / "d.json").path
    moe = json.loads(path.read_text())["inference_config"]["moe"]
    assert run_engine_code(CONFIG, source, path) == [moe["enabled"], moe["ep_size"], moe["moe_experts"]]
