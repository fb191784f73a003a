"""The vLLM plug-in without vLLM: its files, its policy and its replay, and that it goes in where vLLM looks."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from export_worlds import MODEL, PLAN, tiny_trace

import moesim
from moesim.export.engines import export
from moesim.traces.trace import RoutingTrace

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

PLUGIN = Path(moesim.__file__).parent.parent / "integrations" / "vllm-moesim"
POLICY_MODULE = "vllm.distributed.eplb.policy"
ROUTER_MODULE = "vllm.model_executor.layers.fused_moe.router.routing_simulator_router"


class Base:
    """Stands for a class of vLLM that the plug-in builds on."""


class Registry:
    """Stands for vLLM's routing simulator: keeps what is registered."""

    strategies: dict[str, Any]

    @classmethod
    def register_strategy(cls, name: str, strategy: Any) -> None:
        """Keep a strategy."""
        cls.strategies[name] = strategy


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The plug-in, with the modules of vLLM that it asks for in place."""
    monkeypatch.syspath_prepend(str(PLUGIN))
    for name in [name for name in sys.modules if name.split(".")[0] in ("vllm", "vllm_moesim")]:
        monkeypatch.delitem(sys.modules, name)
    for name in (POLICY_MODULE, ROUTER_MODULE):
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(".".join(parts[:end])))
    sys.modules[POLICY_MODULE].EPLB_POLICIES = {"default": Base}  # type: ignore[attr-defined]
    Registry.strategies = {}
    sys.modules[ROUTER_MODULE].RoutingSimulator = Registry  # type: ignore[attr-defined]
    sys.modules[ROUTER_MODULE].RoutingStrategy = Base  # type: ignore[attr-defined]
    groups = ModuleType("vllm.distributed")
    groups.get_dp_group = lambda: type("Group", (), {"rank_in_group": 1, "world_size": 2})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm.distributed", groups)
    spec = importlib.util.find_spec("vllm_moesim")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "vllm_moesim", module)
    spec.loader.exec_module(module)
    return module


def ask(policy: Any, *, layers: int = 3, experts: int = 4, slots: int = 6, ranks: int = 2) -> Any:
    """Call a policy as vLLM does."""
    return policy.rebalance_experts(torch.ones(layers, experts), slots, 1, 1, ranks, torch.zeros(layers, slots))


def test_policy_answers_with_the_plan(plugin: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Registered by its variable, the policy returns int64[MoE layer, slot], a new tensor at each call."""
    path = export(PLAN, MODEL, "vllm", tmp_path / "plan.json").path
    monkeypatch.setenv("MOESIM_EPLB_PLAN", str(path))
    plugin.register()
    policy = sys.modules[POLICY_MODULE].EPLB_POLICIES["default"]  # type: ignore[attr-defined]
    assert issubclass(policy, Base)
    answer = ask(policy)
    assert answer.dtype == torch.int64
    assert answer.tolist() == PLAN.physical_to_logical.tolist()
    answer.zero_()  # what vLLM does to its copy does not reach the plan
    assert ask(policy).tolist() == PLAN.physical_to_logical.tolist()


@pytest.mark.parametrize("sizes", [{"layers": 1}, {"experts": 5}, {"slots": 8}, {"ranks": 3}])
def test_policy_refuses_other_sizes(sizes: dict[str, int], plugin: ModuleType, tmp_path: Path,
                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """A draft model, another model, other redundancy, other ranks: the error names both sides."""
    monkeypatch.setenv("MOESIM_EPLB_PLAN", str(export(PLAN, MODEL, "vllm", tmp_path / "plan.json").path))
    plugin.register()
    with pytest.raises(ValueError, match=r"the plan is for \{'MoE layers': 3, .*vLLM asks for"):
        ask(sys.modules[POLICY_MODULE].EPLB_POLICIES["default"], **sizes)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("document", "text"), [
    ({"physical_to_logical_map": [[0, 1]]}, "expected a 'moesim.vllm-eplb/1' file"),  # SGLang's file
    ({"schema": "moesim.vllm-eplb/1", "num_experts": 3, "num_ranks": 1, "physical_to_logical_map": [[0, 1]]},
     "an expert has no slot"),
    ({"schema": "moesim.vllm-eplb/1", "num_experts": 2, "num_ranks": 3, "physical_to_logical_map": [[0, 1]]},
     "slots do not divide"),
])
def test_other_plan_files_are_refused(document: dict[str, Any], text: str, plugin: ModuleType, tmp_path: Path,
                                      monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM does not start with a file that the policy could not answer from."""
    (tmp_path / "x.json").write_text(json.dumps(document))
    monkeypatch.setenv("MOESIM_EPLB_PLAN", str(tmp_path / "x.json"))
    with pytest.raises(ValueError, match=text):
        plugin.register()


def strategy(plugin: ModuleType, trace: RoutingTrace, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The strategy that the plug-in registers for a trace."""
    path = export(trace, None, "vllm-routing", folder / "r.safetensors").path
    monkeypatch.setenv("MOESIM_ROUTING", str(path))
    plugin.register()
    return Registry.strategies["moesim"]


def route(replay: Any, tokens: int, *, experts: int = 4, top_k: int = 2, dtype: Any = None) -> tuple[Any, Any]:
    """Call a strategy as vLLM's router does."""
    return replay.route_tokens(torch.zeros(tokens, 16), torch.zeros(tokens, experts), top_k, dtype)


def test_replay_gives_every_layer_the_same_tokens(plugin: ModuleType, tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes of 5, 4 and 20 tokens get the rows in order, wrapping round; rank 1 of 2 starts half-way."""
    trace = tiny_trace()
    replay = strategy(plugin, trace, tmp_path, monkeypatch)
    row = trace.num_tokens // 2
    for tokens in (5, 4, 20):
        rows = np.arange(row, row + tokens) % trace.num_tokens
        for layer in range(3):
            weights, ids = route(replay, tokens)
            assert ids.dtype == torch.long
            assert np.array_equal(ids, trace.expert_ids[rows, layer])
            assert np.array_equal(weights, np.asarray(trace.gate_weights)[rows, layer])
        row += tokens


def test_replay_gives_the_type_that_the_kernel_asks_for(plugin: ModuleType, tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids in the kernel's integer type; without recorded weights every expert weighs 1 / k."""
    trace = dataclasses.replace(tiny_trace(), gate_weights=None)
    weights, ids = route(strategy(plugin, trace, tmp_path, monkeypatch), 3, dtype=torch.int32)
    assert (ids.dtype, weights.dtype) == (torch.int32, torch.float32)
    assert torch.unique(weights).tolist() == [0.5]


def test_replay_stops_when_the_calls_are_out_of_step(plugin: ModuleType, tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """Another number of tokens in the middle of a pass, or another model: an error, not wrong routing."""
    replay = strategy(plugin, tiny_trace(), tmp_path, monkeypatch)
    route(replay, 5)
    with pytest.raises(RuntimeError, match="layer 1 is asked for 4 tokens, layer 0 was for 5"):
        route(replay, 4)
    for sizes in ({"experts": 8}, {"top_k": 1}):
        with pytest.raises(ValueError, match="the trace has 4 experts, top-2"):
            route(replay, 5, **sizes)


def test_nothing_happens_without_the_variables(plugin: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed but not asked for, the plug-in leaves vLLM as it is."""
    for name in ("MOESIM_EPLB_PLAN", "MOESIM_ROUTING"):
        monkeypatch.delenv(name, raising=False)
    plugin.register()
    assert {"default": Base} == sys.modules[POLICY_MODULE].EPLB_POLICIES  # type: ignore[attr-defined]
    assert Registry.strategies == {}


def test_the_package_points_to_the_function_that_vllm_calls() -> None:
    """The entry point of the group that vLLM loads names `register`; the plug-in does not import moesim."""
    project = tomllib.loads((PLUGIN / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["vllm.general_plugins"] == {"moesim": "vllm_moesim:register"}
    code = ("import sys; sys.path.insert(0, sys.argv[1]); import vllm_moesim.policy, vllm_moesim.routing; "
            "print('moesim' in sys.modules, callable(vllm_moesim.register))")
    done = subprocess.run([sys.executable, "-c", code, str(PLUGIN)], capture_output=True, text=True, check=True,
                          cwd=PLUGIN.parent)
    assert done.stdout.split() == ["False", "True"]
