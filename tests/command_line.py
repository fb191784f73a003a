"""Running the command line in tests. Not a test module: test files import it by its name."""

from __future__ import annotations

import json
from typing import Any

from typer.testing import CliRunner

from moesim.cli import app


def call(*arguments: str) -> str:
    """Run the command line; returns stdout of a run that must succeed."""
    done = CliRunner().invoke(app, list(arguments))
    assert done.exit_code == 0, done.stderr or repr(done.exception)
    return done.stdout


def call_json(*arguments: str) -> Any:
    """Run a verb with --json; its whole stdout must be one JSON document."""
    return json.loads(call(*arguments, "--json"))
