"""vLLM's own policy table, map builder and routing simulator, with our plug-in in them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from engines.engine_folder import need, run_engine_code
from export_worlds import MODEL, PLAN, tiny_trace

import moesim
from moesim.export.engines import export

pytestmark = pytest.mark.engines

PLUGIN = Path(moesim.__file__).parent.parent / "integrations" / "vllm-moesim"

POLICY = '''
import ast, os, torch
from typing import Literal
source, plan = sys.argv[1:3]
eplb = source + "/vllm/distributed/eplb"
stub("vllm.config.parallel", EPLBPolicyOption=Literal["default"])
stub("vllm.distributed.eplb.policy")
sys.modules["vllm.distributed.eplb.policy"].__path__ = [eplb + "/policy"]
names = vars(sys.modules["vllm.distributed.eplb.policy"])
names["__package__"] = "vllm.distributed.eplb.policy"
exec(compile(open(eplb + "/policy/__init__.py").read(), "policy", "exec"), names)
state = ast.parse(open(eplb + "/eplb_state.py").read())
body = [node for node in state.body if getattr(node, "name", "") == "compute_logical_maps"]
exec(compile(ast.Module(body, []), "eplb_state", "exec"), globals())
os.environ["MOESIM_EPLB_PLAN"] = plan
import vllm_moesim
vllm_moesim.register()
policy = names["EPLB_POLICIES"]["default"]
assert issubclass(policy, names["AbstractEplbPolicy"])
answer = policy.rebalance_experts(torch.rand(3, 4), 6, 1, 1, 2, torch.zeros(3, 6, dtype=torch.long))
copies, counts = compute_logical_maps(answer, 4)
print(json.dumps({"slots": answer.tolist(), "copies": copies.tolist(), "counts": counts.tolist()}))
'''

ROUTING = '''
import logging, os, torch
from enum import Enum
source, trace = sys.argv[1:3]
name = "vllm.model_executor.layers.fused_moe.router."
class Logger(logging.Logger):
    warning_once = logging.Logger.warning
class BaseRouter:  # what the real one does besides, it does to the ids after they have been computed
    def __init__(self, top_k, global_num_experts, eplb_state=None):
        self.top_k, self.global_num_experts = top_k, global_num_experts
stub("vllm.envs", VLLM_MOE_ROUTING_SIMULATION_STRATEGY="moesim")
sys.modules["vllm"].envs = sys.modules["vllm.envs"]
stub("vllm.logger", init_logger=Logger)
stub("vllm.distributed.eplb.eplb_state", EplbLayerState=object)
stub("vllm.distributed", get_dp_group=lambda: SimpleNamespace(rank_in_group=0, world_size=1))
stub("vllm.model_executor.layers.fused_moe.config", RoutingMethodType=Enum("RoutingMethodType", "Simulated TopK"))
stub(name + "base_router", BaseRouter=BaseRouter)
simulator = load(name + "routing_simulator_router", source + "/" + (name + "routing_simulator_router").replace(".", "/") + ".py")
os.environ["MOESIM_ROUTING"] = trace
import vllm_moesim
vllm_moesim.register()
layers = [simulator.RoutingSimulatorRouter(2, 4, simulator.RoutingMethodType.TopK) for _ in range(3)]
assert not layers[0].supports_monolithic_kernels
found = [[layer._compute_routing(torch.zeros(tokens, 16), torch.rand(tokens, 4), torch.int32)[1].tolist() for layer in layers]
         for tokens in (5, 7)]
print(json.dumps(found))
'''


def test_the_policy_table_answers_with_the_plan(tmp_path: Path) -> None:
    """Through vLLM's table and map builder: slots, copies and their numbers are the plan's."""
    source = need("vllm", "vllm", "distributed", "eplb").parent.parent.parent
    path = export(PLAN, MODEL, "vllm", tmp_path / "plan.json").path
    found = run_engine_code(POLICY, source, path, python_path=(PLUGIN,))
    assert found["slots"] == PLAN.physical_to_logical.tolist()
    assert found["counts"] == PLAN.replica_count.tolist()
    assert found["copies"] == PLAN.logical_to_physical.tolist()


def test_the_routing_simulator_replays_the_trace(tmp_path: Path) -> None:
    """vLLM's simulating routers, one per layer, hand out the rows of two passes in order."""
    source = need("vllm", "vllm", "model_executor").parent.parent
    trace = tiny_trace()
    path = export(trace, None, "vllm-routing", tmp_path / "r.safetensors").path
    found = run_engine_code(ROUTING, source, path, python_path=(PLUGIN,))
    for rows, one_pass in zip((slice(0, 5), slice(5, 12)), found, strict=True):
        assert np.array_equal(np.array(one_pass).transpose(1, 0, 2), trace.expert_ids[rows])
