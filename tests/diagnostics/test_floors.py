# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""cli -> show -> {compare, fit} -> {check, guard, noise} -> run -> stats: imports run to the right only."""

import ast
from pathlib import Path

import pytest

import pyro_rb.diagnostics as diagnostics

ROOT = Path(diagnostics.__file__).parent
FLOORS = [["stats"], ["run"], ["check", "guard", "noise"], ["compare", "fit"], ["show"], ["cli"]]
HEIGHT = {name: height for height, names in enumerate(FLOORS) for name in names}
FILES = sorted(path for path in ROOT.rglob("*.py") if path.parent != ROOT)


def imported(path):
    """Full names of what a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_down(path):
    floor = path.relative_to(ROOT).parts[0]
    prefix = diagnostics.__name__ + "."
    inside = [name[len(prefix) :].split(".")[0] for name in imported(path) if name.startswith(prefix)]
    upward = {other for other in inside if other != floor and HEIGHT.get(other, 99) >= HEIGHT[floor]}
    assert not upward, f"{path} imports from {upward}"
    if floor == "stats":
        assert not any(name.split(".")[0] == "pyro" for name in imported(path))


def test_each_floor_says_what_it_is_for():
    assert {path.name for path in ROOT.iterdir() if (path / "__init__.py").exists()} == set(HEIGHT)
    assert all(ast.get_docstring(ast.parse((ROOT / name / "__init__.py").read_text())) for name in HEIGHT)
    assert [path.name for path in ROOT.glob("*.py")] == ["__init__.py"]
