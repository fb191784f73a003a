"""Scenario files: strict YAML 1.2, every problem named with line and column, paths relative to the file."""

from __future__ import annotations

import io
import os
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from moesim.artifacts import read_bytes
from moesim.errors import InputError, did_you_mean, unknown
from moesim.scenario.schema import GENERATED, STUDIES, Scenario

MAX_NODES, MAX_DEPTH = 100_000, 30
_EXPECTED = {
    "string_type": "text", "int_type": "a whole number", "float_type": "a number",
    "bool_type": "true or false", "tuple_type": "a list", "dict_type": "a mapping", "model_type": "a mapping",
    "model_attributes_type": "a mapping", "finite_number": "a finite number", "string_too_short": "not empty",
    "string_pattern_mismatch": "letters, digits, '.', '_' and '-' only, a letter or digit first"}

Location = tuple[str | int, ...]


class Problem(NamedTuple):
    """Where in the file, what is wrong, and (if not `where`) the path that the message names."""

    where: Location
    what: str
    shown: Location | None = None


def load_scenario(path: str | os.PathLike[str]) -> Scenario:
    """Read a scenario file.

    Names of the catalog stay as they are. Paths of models, traces, hardware, profiles and plans become
    relative to the working directory (in the file they are relative to the file itself).

    Raises:
        InputError: no such file, not YAML, or anything wrong in it, with one line
            ``file:line:column: key: problem`` per problem.
    """
    file = Path(path)
    source = _Source(file, _parse(file))
    try:
        scenario = Scenario.model_validate(source.plain())
    except ValidationError as error:
        raise InputError("\n".join(source.lines(_problems(error)))) from None
    changes, problems = _resolve(scenario, file.parent)
    if problems:
        raise InputError("\n".join(source.lines(problems)))
    return _with_paths(scenario, changes)


def scenario_schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of a scenario file, for editors."""
    schema = Scenario.model_json_schema(by_alias=True)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "moesim scenario"}


def _parse(file: Path) -> Any:
    """Parse YAML 1.2 (``64e9`` is a number, ``on`` is text, a repeated key is an error) with positions."""
    try:
        raw = YAML(typ="rt", pure=True).load(io.BytesIO(read_bytes(file)))
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        problem = str(error.problem or error.context).split(" with value")[0]
        problem = f"{error.context}, {problem}" if problem.startswith("but ") else problem
        raise InputError(f"{file}{place}: {problem}") from None
    except (YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise InputError(f"{file}: not valid YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(raw, dict):
        raise InputError(f"{file}:1:1: expected a mapping with the keys of a scenario, found {_shown(raw)}")
    return raw


@dataclass(frozen=True)
class _Source:
    """A parsed file: its values, and where each of them stands."""

    file: Path
    raw: Any

    def plain(self) -> Any:
        """Return the values as plain dicts, lists, numbers and text.

        Raises:
            InputError: a file that repeats parts of itself (YAML aliases) without end.
        """
        budget = iter(range(MAX_NODES))
        return self._plain(self.raw, budget, 0)

    def _plain(self, value: Any, budget: Iterator[int], depth: int) -> Any:
        if next(budget, None) is None or depth > MAX_DEPTH:
            raise InputError(f"{self.file}: nested too deeply or too large for a scenario")
        if isinstance(value, dict):
            return {_scalar(key): self._plain(item, budget, depth + 1) for key, item in value.items()}
        if isinstance(value, list):
            return [self._plain(item, budget, depth + 1) for item in value]
        return _scalar(value)

    def lines(self, problems: Iterable[Problem]) -> list[str]:
        """Return one line per problem, in the order of the file."""
        rows = []
        for where, what, shown in problems:
            (line, column), there = self._find(where)
            path = _dotted(there if shown is None else shown)
            text = f"{self.file}:{line + 1}:{column + 1}: {path}{': ' if path else ''}{what}"
            rows.append((line, column, text))
        return [text for *_, text in sorted(set(rows))]

    def _find(self, where: Location) -> tuple[tuple[int, int], Location]:
        """Return line and column from 0 of the deepest part of `where` that the file has, and that part."""
        node: Any = self.raw
        position = (0, 0)
        for depth, part in enumerate(where):
            if isinstance(node, CommentedMap) and part in node:
                position = node.lc.key(part)
            elif isinstance(node, CommentedSeq) and isinstance(part, int) and part < len(node):
                position = node.lc.item(part)
            else:
                return position, where[:depth]
            node = node[part]
        return position, where


def _scalar(value: Any) -> Any:
    """Return a scalar of the round-trip loader as the plain type below it."""
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    return value


def _problems(error: ValidationError) -> list[Problem]:
    """Return each problem that pydantic found, but not the emptiness of a list whose items are wrong."""
    found: list[dict[str, Any]] = [dict(item) for item in error.errors(include_url=False)]
    places = [item["loc"] for item in found]
    return [
        _problem(item)
        for item in found
        if item["type"] != "too_short" or not any(_is_below(place, item["loc"]) for place in places)
    ]


def _is_below(place: Sequence[str | int], above: Sequence[str | int]) -> bool:
    return len(place) > len(above) and place[: len(above)] == above


def _problem(item: dict[str, Any]) -> Problem:
    where, kind, context = _in_file(item["loc"]), str(item["type"]), item.get("ctx", {})
    if kind == "extra_forbidden":
        hint = did_you_mean(str(where[-1]), _keys(_model_at(item["loc"][:-1])))
        return Problem(where, f"unknown key {where[-1]!r}.{hint}", where[:-1])
    if kind == "missing":
        return Problem(where[:-1], f"missing key {where[-1]!r}")
    if kind == "union_tag_not_found":
        return Problem(where, f"missing key 'kind' ({', '.join(STUDIES)})")
    if kind == "union_tag_invalid":
        tag = context["tag"]
        return Problem((*where, "kind"), f"unknown kind {tag!r}.{did_you_mean(tag, STUDIES)}")
    if kind == "value_error":
        return Problem(where, str(context["error"]))
    if kind == "too_short":
        return Problem(where, "must not be empty")
    return Problem(where, _wrong_value(kind, item["input"], context, str(item["msg"])))


def _wrong_value(kind: str, value: Any, context: dict[str, Any], message: str) -> str:
    if kind == "literal_error":
        return f"must be {context['expected']}, got {_shown(value)}{_closest(value, context['expected'])}"
    if kind in _EXPECTED:
        return f"must be {_EXPECTED[kind]}, got {_shown(value)}"
    for start in ("Input should be ", "Input should "):
        message = message.replace(start, "must be ", 1)
    return f"{message}, got {_shown(value)}"


def _closest(value: Any, expected: str) -> str:
    options = expected.split("'")[1::2]
    hint = did_you_mean(str(value), options) if len(options) > 1 else ""
    return f".{hint}" if "mean" in hint else ""


def _in_file(location: Sequence[str | int]) -> Location:
    """Return a location without the names of study kinds that pydantic puts after the index of a union."""
    parts = list(location)
    if len(parts) > 2 and parts[0] == "studies" and parts[2] in STUDIES:
        del parts[2]
    return tuple(parts)


def _model_at(location: Sequence[str | int]) -> type[BaseModel]:
    """Return the class of the mapping at a location (its keys are the ones that may stand there)."""
    model: type[BaseModel] = Scenario
    if len(location) > 2 and location[2] in STUDIES:
        model, location = STUDIES[str(location[2])], location[3:]
    for part in location:
        if isinstance(part, int):
            continue
        field = next(info for key, info in model.model_fields.items() if (info.alias or key) == part)
        model = next(_models_in(field.annotation), model)
    return model


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in typing.get_args(annotation):
        yield from _models_in(inner)


def _keys(model: type[BaseModel]) -> list[str]:
    return [info.alias or key for key, info in model.model_fields.items()]


def _dotted(where: Location) -> str:
    """Return ``studies[0].hardware`` for a location."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where)
    return text.removeprefix(".")


def _shown(value: Any) -> str:
    """Return a value as a reader wrote it; a list or mapping by its kind."""
    if isinstance(value, (list, tuple)):
        return "a list"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None or isinstance(value, (str, int, float)):
        return "nothing" if value is None else repr(value)
    return f"a {type(value).__name__}"


def _references(scenario: Scenario) -> Iterator[tuple[Location, str, Callable[[], list[str]]]]:
    """Yield (location, value, known names) of every key that names something of the catalog or a file."""
    from moesim.hardware.load import hardware_names
    from moesim.model.catalog import model_names

    yield ("model",), scenario.model, model_names
    yield ("trace",), scenario.trace, _trace_names
    for index, study in enumerate(scenario.studies):
        here: Location = ("studies", index)
        if (hardware := getattr(study, "hardware", None)) is not None:
            yield (*here, "hardware", "name"), hardware.name, hardware_names
        if (profile := getattr(study, "profile", None)) is not None:
            yield (*here, "profile"), profile, list
        for number, block in enumerate(getattr(study, "points", ())):
            if block.precision is not None and block.precision.loss is not None:
                yield (*here, "points", number, "precision", "loss"), block.precision.loss, list
        placement = getattr(study, "placement", None)
        for row, choice in enumerate(placement.plans if placement else ()):
            if choice.plan is not None:
                yield (*here, "placement", "plans", row, "plan"), choice.plan, list


def _trace_names() -> list[str]:
    from moesim.artifacts import catalog_folder
    from moesim.traces.store import BUILTIN, SUFFIX

    files = catalog_folder("traces").glob(f"*{SUFFIX}")
    return [GENERATED, *sorted(BUILTIN + file.name.removesuffix(SUFFIX) for file in files)]


def _resolve(scenario: Scenario, folder: Path) -> tuple[dict[Location, str], list[Problem]]:
    """Return the path of each value that is not a known name, and the problems of those that are neither."""
    changes: dict[Location, str] = {}
    problems: list[Problem] = []
    for where, value, names in _references(scenario):
        if value in names():
            continue
        path = folder / value
        if path.exists():
            changes[where] = str(path)
        elif names is not list and "/" not in value and not path.suffix[1:].isalpha():
            problems.append(Problem(where, str(unknown(_kind(where), value, names()))))
        else:
            problems.append(Problem(where, f"no such file: {path}"))
    return changes, problems


def _kind(where: Location) -> str:
    return "hardware" if "hardware" in where else str(where[-1])


def _with_paths(scenario: Scenario, changes: dict[Location, str]) -> Scenario:
    """Return the scenario with the values at some locations replaced."""
    document = scenario.model_dump(by_alias=True, exclude_unset=True)
    for where, path in changes.items():
        node: Any = document
        for part in where[:-1]:
            node = node[part]
        node[where[-1]] = path
    return Scenario.model_validate(document)
