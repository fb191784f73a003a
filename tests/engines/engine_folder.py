"""Where `install.sh` put the engines, and Python that runs their code in a process of its own. Not a test module."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(os.environ.get("MOESIM_ENGINES", "/tmp/moesim-engines"))


def need(*parts: str) -> Path:
    """Return a file or folder of an installed engine; skip the test where there is none."""
    path = FOLDER.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{path} is missing: run tests/engines/install.sh")
    return path


def run_engine_code(code: str, *arguments: object, python_path: tuple[Path, ...] = ()) -> Any:
    """Run Python that uses an engine's modules; return what it printed last, read as JSON."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, python_path))}
    done = subprocess.run([sys.executable, "-c", STUBS + code, *map(str, arguments)], capture_output=True, text=True,
                          env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


# modules that need a GPU or half of the engine are replaced by empty ones with the names that are asked for
STUBS = '''
import importlib.util, json, sys, types
from types import SimpleNamespace

def stub(name, **names):
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        sys.modules.setdefault(".".join(parts[:end]), types.ModuleType(".".join(parts[:end])))
    vars(sys.modules[name]).update(names)

def load(name, path):
    stub(name)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
'''
