"""Models: their sizes, read from Hugging Face configs, from GGUF files or from the catalog."""

from moesim.model.catalog import load_model, model_names, published_params
from moesim.model.config import read_config, spec_from_config
from moesim.model.gguf import Gguf, GgufTensor, read_gguf
from moesim.model.gguf_spec import GgufModel, read_gguf_model
from moesim.model.spec import AttentionSpec, ModelSpec

__all__ = [
    "AttentionSpec",
    "Gguf",
    "GgufModel",
    "GgufTensor",
    "ModelSpec",
    "load_model",
    "model_names",
    "published_params",
    "read_config",
    "read_gguf",
    "read_gguf_model",
    "spec_from_config",
]
