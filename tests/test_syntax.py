# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""What Python 3.10 cannot read, and the parser of later versions does not tell."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]


def find_bare_stars(source):
    """Lines of indices such as ``x[a, *b]``, which 3.10 reads in parentheses only."""
    lines = source.encode().splitlines()
    for node in ast.walk(ast.parse(source)):
        index = node.slice if isinstance(node, ast.Subscript) else None
        if isinstance(index, ast.Tuple) and any(isinstance(x, ast.Starred) for x in index.elts):
            if lines[index.lineno - 1][index.col_offset : index.col_offset + 1] != b"(":
                yield index.lineno


def test_stars_in_indices():
    assert list(find_bare_stars("x[(a, *b)]\ny[a,\n  *b]\n")) == [2]
    folders = [ROOT / name for name in ("pyro_rb", "tests", "examples", "docs/figures")]
    found = {path: list(find_bare_stars(path.read_text("utf-8"))) for f in folders for path in f.rglob("*.py")}
    assert len(found) > 300 and not {path: lines for path, lines in found.items() if lines}
