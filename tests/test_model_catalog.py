"""The catalog's models have the sizes that their authors published, and bad files are refused."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest

from moesim.errors import InputError
from moesim.model import ModelSpec, load_model, model_names, published_params
from moesim.model.catalog import catalog_model, read_model_file
from moesim.units import GIB, MIB

# Published total parameters (billions): tolerance, at most 1.5 % unless only whole billions are published;
# "head" where the published count leaves out the input embedding.
TOTALS: dict[str, tuple[float, str] | None] = {
    "dbrx": (0.005, "all"),
    "deepseek-v4-flash": (0.005, "all"),
    "deepseek-v4-pro": (0.03, "all"),  # 1.6T +- 0.05T; the config gives 1.573T
    "glm-4.5": (0.01, "all"),
    "glm-5": (0.001, "all"),
    "hunyuan-a13b": (0.015, "all"),
    "jamba-v0.1": (0.015, "all"),
    "kimi-k3": None,  # nothing published to compare with
    "llada2.0-flash": (0.03, "all"),  # published as 100B; the config gives 102.9B
    "llama-4-maverick": (0.005, "all"),
    "llama-4-scout": (0.015, "all"),  # the published count has the vision tower in it
    "minimax-m2.5": (0.01, "all"),
    "nllb-moe-54b": (0.001, "all"),
    "qwen3.5-35b-a3b": (0.015, "all"),  # 35 +- 0.5
    "switch-base-128": None,  # the paper's model of this name has another width
    "deepseek-v2": (0.005, "all"),
    "deepseek-v2-lite": (0.005, "all"),
    "deepseek-v3": (0.001, "all"),
    "glm-4.5-air": (0.015, "all"),
    "gpt-oss-120b": (0.001, "all"),
    "gpt-oss-20b": (0.001, "all"),
    "kimi-k2": (0.015, "all"),  # 1.04T is published; the config gives 1.026T
    "llada-moe-7b-a1b": (0.015, "head"),  # 7.36e9 with the input embedding, published as 7B
    "llada2.0-mini": (0.02, "all"),  # published as a whole number of billions: 16 +- 0.5 is 3 %
    "mixtral-8x22b": (0.005, "all"),
    "mixtral-8x7b": (0.001, "all"),
    "olmoe-1b-7b": (0.005, "all"),
    "phi-3.5-moe": (0.005, "all"),
    "qwen1.5-moe-a2.7b": (0.005, "all"),
    "qwen2-57b-a14b": (0.015, "all"),
    "qwen3-235b-a22b": (0.001, "all"),
    "qwen3-30b-a3b": (0.002, "all"),
    "qwen3-coder-480b-a35b": (0.001, "all"),
}

# Active parameters: published counts differ in whether embeddings are active. "head": without the input
# embedding (the gpt-oss card says so; for LLaDA-MoE and V2-Lite only this reading fits); "none": without
# either (only this reading fits). Tolerances are 1 to 2 %, or half a unit of the last published digit.
ACTIVES: dict[str, tuple[float, str] | None] = {
    "dbrx": (0.015, "all"),  # 36 +- 0.5
    "deepseek-v4-flash": (0.03, "head"),  # 13 +- 0.5
    "deepseek-v4-pro": (0.01, "head"),
    "glm-4.5": (0.01, "none"),
    "glm-5": (0.01, "none"),
    "hunyuan-a13b": (0.03, "all"),  # 13 +- 0.5
    "jamba-v0.1": (0.015, "all"),
    "kimi-k3": None,
    "llada2.0-flash": (0.01, "all"),  # 6.1 +- 0.05
    "llama-4-maverick": (0.015, "all"),
    "llama-4-scout": (0.015, "all"),
    "minimax-m2.5": (0.025, "none"),
    "nllb-moe-54b": None,
    "qwen3.5-35b-a3b": (0.02, "head"),
    "switch-base-128": None,
    "deepseek-v2": (0.02, "all"),  # 21 +- 0.5
    "deepseek-v2-lite": (0.025, "head"),  # 2.4 +- 0.05
    "deepseek-v3": (0.015, "all"),  # 37 +- 0.5
    "glm-4.5-air": (0.02, "none"),
    "gpt-oss-120b": (0.001, "head"),
    "gpt-oss-20b": (0.001, "head"),
    "kimi-k2": (0.01, "all"),
    "llada-moe-7b-a1b": (0.005, "head"),
    "llada2.0-mini": (0.03, "all"),  # 1.4 +- 0.05
    "mixtral-8x22b": (0.005, "all"),
    "mixtral-8x7b": (0.005, "all"),
    "olmoe-1b-7b": (0.015, "all"),
    "phi-3.5-moe": (0.01, "all"),
    "qwen1.5-moe-a2.7b": (0.005, "all"),
    "qwen2-57b-a14b": (0.02, "all"),  # 14 +- 0.5
    "qwen3-235b-a22b": (0.01, "all"),
    "qwen3-30b-a3b": (0.02, "all"),  # 3.35 from the config, published as 3.3
    "qwen3-coder-480b-a35b": (0.015, "all"),
}

# MiB of one expert in bf16: 3 * hidden * width * 2 bytes, as the configs' table in the literature has it.
EXPERT_MIB = {
    "dbrx": 378,
    "glm-4.5": 45,
    "glm-5": 72,
    "hunyuan-a13b": 72,
    "jamba-v0.1": 336,
    "llada2.0-flash": 24,
    "llama-4-maverick": 240,
    "llama-4-scout": 240,
    "qwen3.5-35b-a3b": 6,
    "mixtral-8x7b": 336,
    "mixtral-8x22b": 576,
    "qwen1.5-moe-a2.7b": 16.5,
    "qwen2-57b-a14b": 52.5,
    "qwen3-30b-a3b": 9,
    "qwen3-235b-a22b": 36,
    "qwen3-coder-480b-a35b": 90,
    "deepseek-v2-lite": 16.5,
    "deepseek-v2": 45,
    "olmoe-1b-7b": 12,
    "phi-3.5-moe": 150,
    "llada2.0-mini": 6,
    "llada-moe-7b-a1b": 12,
    "glm-4.5-air": 33,
}

# layers, MoE layers, experts, top-k
SHAPES = {
    "dbrx": (40, 40, 16, 4),
    "deepseek-v4-flash": (43, 43, 256, 6),
    "deepseek-v4-pro": (61, 61, 384, 6),
    "glm-4.5": (92, 89, 160, 8),
    "glm-5": (78, 75, 256, 8),
    "hunyuan-a13b": (32, 32, 64, 8),
    "jamba-v0.1": (32, 16, 16, 2),
    "kimi-k3": (93, 92, 896, 16),
    "llada2.0-flash": (32, 31, 256, 8),
    "llama-4-maverick": (48, 24, 128, 1),
    "llama-4-scout": (48, 48, 16, 1),
    "minimax-m2.5": (62, 62, 256, 8),
    "nllb-moe-54b": (48, 12, 128, 2),
    "qwen3.5-35b-a3b": (40, 40, 256, 8),
    "switch-base-128": (24, 12, 128, 1),
    "mixtral-8x7b": (32, 32, 8, 2),
    "mixtral-8x22b": (56, 56, 8, 2),
    "qwen1.5-moe-a2.7b": (24, 24, 60, 4),
    "qwen2-57b-a14b": (28, 28, 64, 8),
    "qwen3-30b-a3b": (48, 48, 128, 8),
    "qwen3-235b-a22b": (94, 94, 128, 8),
    "qwen3-coder-480b-a35b": (62, 62, 160, 8),
    "deepseek-v2-lite": (27, 26, 64, 6),
    "deepseek-v2": (60, 59, 160, 6),
    "deepseek-v3": (61, 58, 256, 8),
    "kimi-k2": (61, 60, 384, 8),
    "olmoe-1b-7b": (16, 16, 64, 8),
    "phi-3.5-moe": (32, 32, 16, 2),
    "gpt-oss-20b": (24, 24, 32, 4),
    "gpt-oss-120b": (36, 36, 128, 4),
    "llada2.0-mini": (20, 19, 256, 8),
    "llada-moe-7b-a1b": (16, 16, 64, 8),
    "glm-4.5-air": (46, 45, 128, 8),
}


@functools.cache
def shipped(name: str) -> ModelSpec:
    """Return a catalog model, read once."""
    return load_model(name)


def left_out(name: str, counted: str) -> int:
    """Return the embedding weights that a published count leaves out."""
    return {"all": 0, "head": 1, "none": 2}[counted] * shipped(name).embedding_params // 2


def test_tables_cover_the_catalog() -> None:
    """Every model of the catalog is compared with its published sizes, and every name is a file's name."""
    assert set(model_names()) == set(TOTALS) == set(ACTIVES) == set(SHAPES)
    assert model_names() == sorted(model_names())
    assert all(catalog_model(name).name == name for name in model_names())


@pytest.mark.parametrize("name", sorted(TOTALS))
def test_total_params(name: str) -> None:
    """The derived total agrees with the published one within the stated tolerance."""
    if TOTALS[name] is None:
        assert published_params(name)[0] is None
        return
    tolerance, counted = TOTALS[name]
    derived = shipped(name).total_params - left_out(name, counted)
    assert derived / 1e9 == pytest.approx(published_params(name)[0], rel=tolerance)


@pytest.mark.parametrize("name", sorted(ACTIVES))
def test_active_params(name: str) -> None:
    """The derived active parameters agree with the published ones, counting the same embeddings."""
    if ACTIVES[name] is None:
        assert published_params(name)[1] is None
        return
    tolerance, counted = ACTIVES[name]
    derived = shipped(name).active_params - left_out(name, counted)
    assert derived / 1e9 == pytest.approx(published_params(name)[1], rel=tolerance)


def test_published_non_embedding_counts() -> None:
    """Published counts without embeddings agree too: Qwen3 (29.9B, 234B) and LLaDA2.0-mini's active 789M."""
    qwen, large, llada = (shipped(name) for name in ("qwen3-30b-a3b", "qwen3-235b-a22b", "llada2.0-mini"))
    assert (qwen.total_params - qwen.embedding_params) / 1e9 == pytest.approx(29.9, abs=0.05)
    assert (large.total_params - large.embedding_params) / 1e9 == pytest.approx(234, abs=0.5)
    assert (llada.active_params - llada.embedding_params) / 1e6 == pytest.approx(789, abs=0.5)


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_shapes(name: str) -> None:
    """Layers, MoE layers, experts and top-k are those of the model's paper."""
    spec = shipped(name)
    assert (spec.num_layers, spec.num_moe_layers, spec.num_experts, spec.top_k) == SHAPES[name]


@pytest.mark.parametrize("name", sorted(EXPERT_MIB))
def test_expert_bytes_bf16(name: str) -> None:
    """A bf16 expert has exactly the known bytes."""
    assert shipped(name).expert_bytes == EXPERT_MIB[name] * MIB


def test_expert_bytes_quantized() -> None:
    """fp8 experts (V3, K2) take 42 MiB, 84 in bf16; an mxfp4 GPT-OSS expert takes its 4.25 bits a weight."""
    for name in ("deepseek-v3", "kimi-k2"):
        assert shipped(name).expert_bytes == 42 * MIB
        assert shipped(name).replace(weight_bytes=2.0).expert_bytes == 84 * MIB
    # 3 * 2880 * 2880 weights and 3 * 2880 biases at 4.25 / 8 bytes
    assert load_model("gpt-oss-20b").expert_bytes == (3 * 2880 * 2880 + 3 * 2880) * 17 // 32


def test_expert_bytes_without_three_bf16_matrices() -> None:
    """Two fp32 matrices (Switch, NLLB), fp4 experts (V4, K3 in its latent width) and fp8 ones have their bytes."""
    names = ("switch-base-128", "nllb-moe-54b", "minimax-m2.5", "deepseek-v4-flash", "deepseek-v4-pro", "kimi-k3")
    plain = [shipped(name).replace(weight_bytes=2.0).expert_bytes / MIB for name in names]
    assert plain == [9, 64, 27, 48, 126, 63]  # K3: 3 * 3584 * 3072
    stored = [shipped(name).expert_bytes for name in names]
    assert stored == [18 * MIB, 128 * MIB, 27 * MIB // 2, *(size * MIB * 17 // 64 for size in (48, 126, 63))]


def test_deepseek_v4_checkpoint_sizes() -> None:
    """The stored bytes of V4 are near its downloads' (about 160 GB and 865 GB, as reported at its release)."""
    assert shipped("deepseek-v4-flash").total_bytes / 1e9 == pytest.approx(160, rel=0.03)
    assert shipped("deepseek-v4-pro").total_bytes / 1e9 == pytest.approx(865, rel=0.03)


def test_expert_bytes_tide() -> None:
    """LLaDA2.0-mini's expert has the 6,291,456 bytes that TIDE (arXiv 2605.20179) moves."""
    assert load_model("llada2.0-mini").expert_bytes == 6_291_456


@pytest.mark.parametrize(("name", "gib"), [("gpt-oss-120b", 60.8), ("gpt-oss-20b", 12.8)])
def test_checkpoint_size(name: str, gib: float) -> None:
    """The whole model's bytes are the checkpoint size of the gpt-oss model card (table 1)."""
    assert shipped(name).total_bytes / GIB == pytest.approx(gib, rel=0.005)


def test_deepseek_kv_cache() -> None:
    """DeepSeek-V3 caches 576 values a token and layer: 61 layers in bf16 are the known 70,272 bytes."""
    spec = load_model("deepseek-v3")
    assert spec.num_layers * spec.kv_bytes_per_token_layer == 70_272


def test_groups() -> None:
    """DeepSeek-V3 routes to 4 of 8 groups, DeepSeek-V2 to 3 of 8, V2-Lite and Kimi-K2 have no limit."""
    names = ("deepseek-v3", "deepseek-v2", "deepseek-v2-lite", "kimi-k2", "llada2.0-mini")
    groups = [(shipped(name).num_groups, shipped(name).groups_per_token) for name in names]
    assert groups == [(8, 4), (8, 3), (1, 1), (1, 1), (8, 4)]


def test_every_entry_has_references() -> None:
    """Each model says which repository, paper and publication its numbers come from."""
    for name in model_names():
        model = catalog_model(name)
        assert "/" in model.repository
        assert "arXiv" in model.paper or "20" in model.paper
        assert len(model.published_reference) > 20
        assert shipped(name).source == f"{model.repository} {model.reference}"


def test_load_by_path(tmp_path: Path) -> None:
    """A config.json, its folder and a model YAML file load like the catalog's own entry."""
    model = catalog_model("olmoe-1b-7b")
    folder = tmp_path / "olmoe-1b-7b"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(model.config))
    by_name = load_model("olmoe-1b-7b")
    for path in (folder, folder / "config.json", str(folder)):
        assert load_model(path).replace(source=by_name.source) == by_name
    copy = tmp_path / "copy.yaml"
    copy.write_text(json.dumps(vars(model)))  # JSON is YAML
    assert load_model(copy) == by_name


def test_published_may_be_unknown(tmp_path: Path) -> None:
    """A model without published sizes has null there, read as None."""
    file = tmp_path / "own.yaml"
    entry = {**vars(catalog_model("olmoe-1b-7b")), "published_params_active": None}
    file.write_text(json.dumps(entry))
    assert read_model_file(file).published_params_active is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mixtral-8x7", "unknown model 'mixtral-8x7'. Did you mean 'mixtral-8x7b'"),
        ("zzz", "unknown model 'zzz'. Known: dbrx, deepseek-v2, deepseek-v2-lite"),
        ("", "unknown model ''"),
        ("no/such/config.json", "no/such/config.json: no such file"),
        ("no/such.yaml", "no/such.yaml: no such file"),
    ],
)
def test_unknown_models(name: str, message: str) -> None:
    """An unknown name or path is refused with the closest known name or the path."""
    with pytest.raises(InputError, match=message):
        load_model(name)


def test_unknown_published() -> None:
    """Published sizes of an unknown model are refused with the closest name."""
    with pytest.raises(InputError, match="Did you mean 'deepseek-v3'"):
        published_params("deepseek-v3x")


def change(text: str, old: str, new: str) -> str:
    """Return `text` with one line's content replaced, which must be there."""
    assert old in text
    return text.replace(old, new)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("repository:", "repo:", r"unknown key 'repo'. .*repository"),
        ("paper:", "papr:", "unknown key 'papr'. Did you mean 'paper'"),
        ("hidden_size: 2048", "hiden_size: 2048", "'config.hiden_size'. Did you mean 'hidden_size'"),
        ("hidden_size: 2048", "hidden_size: big", "bad.yaml: allenai/.*: hidden_size must be a whole number"),
        ("hidden_size: 2048", "hidden_size: 2\n  hidden_size: 4", r"\d+:3: not valid YAML: .*duplicate key"),
        ("published_params_total: 6.9", "published_params_total: 6.9B", "params_total must be a number"),
        ("published_params_total: 6.9", "published_params_total: -1", "above 0, or null, got -1"),
        ("published_params_total: 6.9", "published_params_total: .inf", "above 0, or null, got inf"),
        ("published_params_total: 6.9  # billions\n", "", "missing key 'published_params_total'"),
        ("reference: config.json", "reference: ''", "reference must be a text, got ''"),
        ("name: olmoe-1b-7b", "name: [olmoe", r"\d+:\d+: not valid YAML"),
    ],
)
def test_bad_model_files(tmp_path: Path, old: str, new: str, message: str) -> None:
    """A wrong key or value in a model file is refused with its path, key and what was expected."""
    text = (Path(__file__).parents[1] / "moesim/catalog/models/olmoe-1b-7b.yaml").read_text()
    file = tmp_path / "bad.yaml"
    file.write_text(change(text, old, new))
    with pytest.raises(InputError, match=message):
        load_model(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected a mapping with the keys name"),
        (b"- 1\n", "expected a mapping with the keys name"),
        (b"\xff\xfe\x00", "not valid YAML"),
        (b"a: !!python/object:os.system x\n", "not valid YAML"),
    ],
)
def test_not_a_model_file(tmp_path: Path, content: bytes, message: str) -> None:
    """A file that is no mapping, no text, or that asks for a Python object is refused."""
    file = tmp_path / "bad.yaml"
    file.write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_model(file)


def test_config_must_be_a_mapping(tmp_path: Path) -> None:
    """A model file whose config is not a mapping is refused."""
    file = tmp_path / "bad.yaml"
    file.write_text(json.dumps({**vars(catalog_model("olmoe-1b-7b")), "config": [1]}))
    with pytest.raises(InputError, match=r"config must be a mapping of config.json keys, got \[1\]"):
        load_model(file)
