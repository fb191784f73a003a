"""The shape of the package: imports point one way, heavy packages load late, units convert in one place."""

from __future__ import annotations

import ast
import io
import json
import os
import statistics
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

import moesim

PACKAGE = Path(moesim.__file__).parent
ORDER = (
    "errors", "units", "artifacts", "registry", "model", "traces", "hardware", "calibrate", "placement",
    "cache", "lowering", "simulate", "validate", "export", "report", "scenario", "cli")
HEAVY = ("torch", "transformers", "matplotlib", "numba")
KERNELS = "/kernels/"  # compiled loops import numba at the top, and are imported inside functions only
MAX_CODE_LINES, MAX_FILE_LINES = 40, 400
UNIT_LITERALS = {"1e9", "1e-9", "1e6", "1e-6", "1_000_000_000", "1000000000"}


def module_files() -> list[Path]:
    """Every module of the package."""
    return sorted(PACKAGE.rglob("*.py"))


def part_of(module: str) -> str:
    """``moesim.cli_trace`` -> ``cli``; ``moesim.hardware.spec`` -> ``hardware``; ``moesim`` -> ````."""
    name = module.split(".")[1] if "." in module else ""
    return "cli" if name.startswith("cli_") else name


def module_name(file: Path) -> str:
    """The dotted name of a file of the package."""
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield (line, module) of every import below a node."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            if node.module == "moesim":  # `from moesim import x` names the part in the alias
                yield from ((node.lineno, f"moesim.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, str(node.module)


def upward_imports(source: str, module: str) -> list[str]:
    """Return the imports of a module's source that do not point to the left (or into its own folder)."""
    own = part_of(module)
    wrong = []
    for line, name in imported(ast.parse(source)):
        part = part_of(name)
        if name.split(".")[0] != "moesim" or part in ("", "__version__", own):
            continue
        if ORDER.index(part) > ORDER.index(own):
            wrong.append(f"{module}:{line}: {own} imports {name}")
    return wrong


def test_imports_point_left() -> None:
    """No module imports from a folder to its right, inside functions or out."""
    wrong = [text for file in module_files() if module_name(file) != "moesim"
             for text in upward_imports(file.read_text(), module_name(file))]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("source", [
    "from moesim.simulate.run import simulate",  # at the top
    "def f():\n    import moesim.report.tables",  # inside a function
    "from moesim import cli",  # the part is the imported name
])
def test_the_import_rule_finds_offenders(source: str) -> None:
    """The check itself sees an import to the right wherever it stands."""
    assert len(upward_imports(source, "moesim.model.spec")) == 1


def test_every_folder_has_a_place_in_the_order() -> None:
    """A new folder or module must be put into the order before it can be used."""
    parts = {part_of(module_name(file)) for file in module_files()} - {""}
    assert parts <= set(ORDER)


def module_level_imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield the imports that run when the module is imported (not in functions or under TYPE_CHECKING)."""
    stack: list[ast.AST] = list(tree.body)
    while stack:
        node = stack.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from imported(node)
        stack.extend(ast.iter_child_nodes(node))


def test_heavy_packages_load_late() -> None:
    """torch, transformers and matplotlib are imported only inside functions."""
    wrong = [f"{file.relative_to(PACKAGE)}:{line}: {name}" for file in module_files()
             for line, name in module_level_imports(ast.parse(file.read_text()))
             if (name.split(".")[0] in HEAVY and not (name.split(".")[0] == "numba" and KERNELS in file.as_posix()))
             or (".kernels." in name and KERNELS not in file.as_posix())]
    assert not wrong, "\n".join(wrong)


def unit_literals(source: str) -> list[tuple[int, str]]:
    """Return (line, text) of number literals that look like a unit conversion."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return [(token.start[0], token.string) for token in tokens
            if token.type == tokenize.NUMBER and token.string.lower() in UNIT_LITERALS]


# a tolerance or a floor is not a conversion; each is named here with what it is
NOT_CONVERSIONS = {
    ("placement/balance_result.py", "1e-9"): "the rounding within which a plan meets its bound",
    ("traces/synth.py", "1e-9"): "the floor that keeps every expert drawable",
    ("traces/stats.py", "1e-6"): "the size of a tie-break",
}


def test_units_convert_in_one_place() -> None:
    """`1e9` and its kin stand in units.py only."""
    wrong = []
    for file in module_files():
        name = file.relative_to(PACKAGE).as_posix()
        wrong += [f"{name}:{line}: {text}" for line, text in unit_literals(file.read_text())
                  if name != "units.py" and (name, text) not in NOT_CONVERSIONS]
    assert not wrong, "\n".join(wrong)


def test_the_unit_rule_reads_numbers_only() -> None:
    """A unit in a comment or text is fine, in code it is found."""
    assert unit_literals("x = 5  # 1e9\ny = '1e9'\n") == []
    assert unit_literals("x = 3 * 1e-6\n") == [(1, "1e-6")]


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return a function's lines without its docstring."""
    length = function.end_lineno - function.lineno + 1  # type: ignore[operator]
    first = function.body[0]
    if ast.get_docstring(function) is not None:
        length -= first.end_lineno - first.lineno + 1  # type: ignore[operator]
    return length


def test_functions_and_files_stay_small() -> None:
    """No function is over 40 lines, no file over 400, and the median function is at most 8."""
    lengths, wrong = [], []
    for file in module_files():
        text = file.read_text()
        if text.count("\n") > MAX_FILE_LINES:
            wrong.append(f"{file.relative_to(PACKAGE)}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lengths.append(code_lines(node))
                if lengths[-1] > MAX_CODE_LINES:
                    wrong.append(f"{file.relative_to(PACKAGE)}:{node.lineno}: {node.name}, {lengths[-1]} lines")
    assert not wrong, "\n".join(wrong)
    assert statistics.median(lengths) <= 8


def modules_after(code: str) -> list[str]:
    """Return the top-level modules that are loaded after `code` ran in a fresh interpreter."""
    script = f"{code}\nimport json, sys\nprint(json.dumps(sorted({{m.split('.')[0] for m in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True,
                          cwd=PACKAGE.parent)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("code", [
    "import moesim",
    "import moesim.cli",
    "from typer.testing import CliRunner\nfrom moesim.cli import app\n"
    "assert 'simulate' in CliRunner().invoke(app, ['--help']).stdout",
])
def test_start_loads_nothing_heavy(code: str) -> None:
    """Importing moesim, and its help, load neither torch nor pandas nor a solver."""
    heavy = {*HEAVY, "pandas", "ortools", "pyarrow", "scipy", "numpy"}
    assert heavy.isdisjoint(modules_after(code))


def test_import_is_quick() -> None:
    """`import moesim` takes less than a second of CPU time."""
    script = "import time; t = time.process_time(); import moesim; print(time.process_time() - t)"
    times = [float(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True,
                                  cwd=PACKAGE.parent).stdout) for _ in range(3)]
    assert statistics.median(times) < 1.0


def test_help_is_quick() -> None:
    """`moesim --help` takes less than two seconds of CPU time (half of one on a quiet machine)."""
    times = []
    for _ in range(3):
        before = os.times()
        subprocess.run([sys.executable, "-m", "moesim.cli", "--help"], check=True, capture_output=True,
                       cwd=PACKAGE.parent)
        after = os.times()
        times.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert 0 < statistics.median(times) < 2.0


def test_verification_shares_nothing_with_what_it_checks() -> None:
    """The checkers import neither solvers, kernels nor bounds, nor what those build on."""
    allowed = {"certificate", "plan", "problem", "verify", "objectives"}
    wrong = [f"{file.name}:{line}: {name}" for file in (PACKAGE / "placement/verify").glob("*.py")
             for line, name in imported(ast.parse(file.read_text()))
             if name.startswith("moesim.") and name != "moesim.errors"
             and not (name.startswith("moesim.placement.") and name.split(".")[2] in allowed)]
    assert not wrong, "\n".join(wrong)
