"""Models: their sizes, read from Hugging Face configs or from the catalog."""

from moesim.model.catalog import load_model, model_names, published_params
from moesim.model.config import read_config, spec_from_config
from moesim.model.spec import AttentionSpec, ModelSpec

__all__ = [
    "AttentionSpec",
    "ModelSpec",
    "load_model",
    "model_names",
    "published_params",
    "read_config",
    "spec_from_config",
]
