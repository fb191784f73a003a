"""The catalog of models: one YAML file each, with the config values, their references and published sizes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from moesim.artifacts import catalog_folder, read_bytes
from moesim.errors import InputError, did_you_mean, unknown
from moesim.model.config import read_config, spec_from_config
from moesim.model.config_keys import CONFIG_KEYS
from moesim.model.gguf_spec import read_gguf_spec
from moesim.model.spec import ModelSpec

_TEXT_KEYS = ("name", "repository", "reference", "paper", "published_reference")
_COUNT_KEYS = ("published_params_total", "published_params_active")
_KEYS = (*_TEXT_KEYS, *_COUNT_KEYS, "config")


@dataclass(frozen=True)
class CatalogModel:
    """One model file, checked: the config values, what they rest on, and the advertised sizes.

    `published_params_total` and `published_params_active` are in billions, as in `published_reference`;
    None where nothing is published.
    """

    name: str
    repository: str
    reference: str
    paper: str
    published_reference: str
    published_params_total: float | None
    published_params_active: float | None
    config: dict[str, Any]

    def spec(self) -> ModelSpec:
        """Return the sizes; raises InputError as `spec_from_config` does."""
        return spec_from_config(self.config, self.name, source=f"{self.repository} {self.reference}")


def model_names() -> list[str]:
    """Return the names of the models that ship with moesim, sorted."""
    return sorted(file.stem for file in catalog_folder("models").glob("*.yaml"))


def load_model(name_or_path: str | os.PathLike[str]) -> ModelSpec:
    """Return a model by its catalog name, or from a config.json, a folder with one, a GGUF or a model YAML file.

    Raises:
        InputError: an unknown name (with the closest known one), or a file that cannot be read as a model.
    """
    name = os.fspath(name_or_path)
    if name in model_names():
        return _spec_from_file(catalog_folder("models") / f"{name}.yaml")
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        return _spec_from_file(path)
    if path.suffix == ".gguf":
        return read_gguf_spec(path)
    if path.suffix == ".json" or len(path.parts) > 1 or (name and path.is_dir()):
        return read_config(path)
    raise unknown("model", name, model_names())


def published_params(name: str) -> tuple[float | None, float | None]:
    """Return the advertised total and active parameters of a catalog model, in billions.

    Raises:
        InputError: unknown name.
    """
    model = catalog_model(name)
    return model.published_params_total, model.published_params_active


def catalog_model(name: str) -> CatalogModel:
    """Return the whole entry of a catalog model, with its references.

    Raises:
        InputError: unknown name.
    """
    if name not in model_names():
        raise unknown("model", name, model_names())
    return read_model_file(catalog_folder("models") / f"{name}.yaml")


def read_model_file(path: str | os.PathLike[str]) -> CatalogModel:
    """Read one model YAML file (YAML 1.2; unknown, missing and repeated keys are errors).

    Raises:
        InputError: no such file, not YAML, or a wrong key or value; names file, key and what was expected.
    """
    document = _parse(path)
    _check_keys(path, document, _KEYS, required=True)
    for key in _TEXT_KEYS:
        if not isinstance(document[key], str) or not document[key].strip():
            raise InputError(f"{path}: {key} must be a text, got {document[key]!r}")
    if not isinstance(document["config"], dict):
        raise InputError(f"{path}: config must be a mapping of config.json keys, got {document['config']!r}")
    _check_keys(path, document["config"], tuple(CONFIG_KEYS), prefix="config.")
    for key in _COUNT_KEYS:
        _check_billions(path, key, document[key])
    return CatalogModel(**document)


def _spec_from_file(path: Path) -> ModelSpec:
    model = read_model_file(path)
    try:
        return model.spec()
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _parse(path: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        document = YAML(typ="safe", pure=True).load(read_bytes(path).decode("utf-8"))
    except MarkedYAMLError as error:
        mark = error.problem_mark
        place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise InputError(f"{path}{place}: not valid YAML: {error.problem}") from None
    except (YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(document, dict):
        raise InputError(f"{path}: expected a mapping with the keys {', '.join(_KEYS)}")
    return document


def _check_keys(
    path: str | os.PathLike[str],
    mapping: dict[str, Any],
    known: tuple[str, ...],
    *,
    required: bool = False,
    prefix: str = "",
) -> None:
    for key in mapping:
        if key not in known:
            raise InputError(f"{path}: unknown key '{prefix}{key}'.{did_you_mean(str(key), known)}")
    absent = [key for key in known if key not in mapping] if required else []
    if absent:
        raise InputError(f"{path}: missing key {', '.join(repr(prefix + key) for key in absent)}")


def _check_billions(path: str | os.PathLike[str], key: str, value: object) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is not None and not (number and 0 < value < float("inf")):  # type: ignore[operator]
        raise InputError(f"{path}: {key} must be a number of billions above 0, or null, got {value!r}")
