"""A policy of the user's own: the file of the docs, named on the command line, beside the built-in ones."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from command_line import call_json

from moesim.cache.policy import POLICIES
from moesim.errors import InputError
from moesim.scenario.plugins import FAMILIES, load_plugins

DOCS = Path(__file__).parents[1] / "docs" / "policies.md"
SCENARIO = """
schema: moesim.scenario/1
name: own
model: olmoe-1b-7b
trace: builtin:tiny-olmoe
trace_stands_in: true
studies:
  - kind: offload
    name: mine
    hardware: {name: rtx-4090}
    workload: {batch_size: 1, max_steps: 24}
    points: [{policy: [lru, mru], slots_per_layer: 12}]
"""


@pytest.fixture(autouse=True)
def registries_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    for registry in FAMILIES.values():
        registry.names()  # third parties' entries belong to what is restored
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))


def documented_file() -> str:
    """The plug-in file as the docs print it."""
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    return next(block for block in blocks if "POLICIES = {" in block)


def test_the_documented_policy_runs_beside_the_published_ones(tmp_path: Path) -> None:
    """The docs' file of about twenty lines runs from the command line, and misses more often than LRU does here."""
    text = documented_file()
    assert len([line for line in text.splitlines() if line.strip()]) <= 20
    (tmp_path / "mine.py").write_text(text)
    (tmp_path / "own.yaml").write_text(SCENARIO)
    outcome = call_json("run", str(tmp_path / "own.yaml"), "--plugin", str(tmp_path / "mine.py"),
                        "--output", str(tmp_path / "out"))
    rows = {row["policy"]: row for row in outcome["studies"][0]["rows"]}
    assert rows["mru"]["hit_rate"] < rows["lru"]["hit_rate"]
    assert rows["mru"]["tpot_bound_s"] == rows["lru"]["tpot_bound_s"]


def plugin(tmp_path: Path, text: str) -> list[str]:
    """Load a file of this text."""
    path = tmp_path / "mine.py"
    path.write_text(text)
    return load_plugins([path])


@pytest.mark.parametrize(("text", "message"), [
    ("x = 1", "defines none of POLICIES"),
    ("def broken(:", r"mine.py:1: SyntaxError"),
    ("\n\nimport nonsense_that_is_not_there", r"mine.py:3: ModuleNotFoundError"),
    ("POLICIES = [1]", "must be a dict"),
    ("class A: pass\nPOLICIES = {'a-new-one': A}", "must declare `information`"),
    ("class A: information = 'I1'\nPOLICIES = {'lru': A}", "'lru' exists already"),
])
def test_a_file_that_is_no_plugin_is_refused(tmp_path: Path, text: str, message: str) -> None:
    """One line: the file, its line where there is one, and what is wrong."""
    with pytest.raises(InputError, match=message):
        plugin(tmp_path, text)


def test_a_missing_file_and_a_file_of_another_kind_are_refused(tmp_path: Path) -> None:
    """Only a Python file that is there is run."""
    for name in ("none.py", "mine.txt"):
        with pytest.raises(InputError, match="needs a Python file"):
            load_plugins([tmp_path / name])


def test_names_are_registered_once(tmp_path: Path) -> None:
    """A name of one's own is found in the registry afterwards."""
    text = "class A:\n    information = 'I1'\nPOLICIES = {'only-in-this-test': A}"
    assert plugin(tmp_path, text) == ["only-in-this-test"]
    assert "only-in-this-test" in POLICIES.names()
    with pytest.raises(InputError, match="exists already"):
        plugin(tmp_path, text)
