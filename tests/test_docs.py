# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Whoever reads of a class or function in the API finds an example, which pytest runs."""

import dataclasses
import doctest
import inspect
import pkgutil
import re
from pathlib import Path

import pyro.infer
import pytest

import pyro_rb
import pyro_rb.compiled
import pyro_rb.diagnostics
import pyro_rb.infer

SOURCE = Path(__file__).resolve().parents[1] / "docs" / "source"
API = SOURCE / "reference" / "index.rst"
NAMES = re.findall(r"^   (pyro_rb\.\S+)$", API.read_text(encoding="utf-8"), re.M)


def resolve(name):
    """As a user writes it: an import of the package, and attributes."""
    value = pyro_rb
    for part in name.split(".")[1:]:
        value = getattr(value, part) if hasattr(value, part) else pkgutil.resolve_name(f"{value.__name__}.{part}")
    return value


def is_shown_elsewhere(value):
    """Exceptions and records are in the example of what raises or returns them."""
    is_record = dataclasses.is_dataclass(value) or hasattr(value, "_fields")
    return inspect.isclass(value) and (is_record or issubclass(value, BaseException))


def documented(value):
    """The class or function itself; of a module, what Sphinx shows: public, with a docstring, defined there."""
    if not inspect.ismodule(value):
        yield value.__name__, value
        return
    for name, member in vars(value).items():
        if name.startswith("_") or getattr(member, "__module__", None) != value.__name__:
            continue
        if (inspect.isclass(member) or inspect.isfunction(member)) and inspect.getdoc(member):
            yield name, member


@pytest.mark.parametrize("name", NAMES)
def test_each_name_of_the_api_has_an_example(name):
    lacking = [
        key
        for key, value in documented(resolve(name))
        if not is_shown_elsewhere(value)
        and not any(test.examples for test in doctest.DocTestFinder().find(value, key))
    ]
    assert not lacking, f"no example in the docstring of {', '.join(lacking)}"


@pytest.mark.parametrize("package", [pyro_rb, pyro_rb.diagnostics])
def test_all_that_is_exported_is_in_the_api(package):
    found = set(map(id, map(resolve, NAMES)))
    assert not [name for name in package.__all__ if id(getattr(package, name)) not in found]


def rows(page):
    """The cells of the first table of a page, row by row, without its heading."""
    table = page[page.index(".. list-table::") :].split("\n\n")[1]
    cells = re.split(r"^   (\* -|  -)", table, flags=re.M)[1:]
    row = []
    for mark, text in zip(cells[::2], cells[1::2]):
        if mark == "* -" and row:
            yield row
            row = []
        row.append(" ".join(text.split()))
    yield row


MIGRATION = (SOURCE / "howto" / "from_pyro.rst").read_text(encoding="utf-8")
WRITE = [re.findall(r"``(.+?)``", row[1])[0] for row in list(rows(MIGRATION))[1:] if "``" in row[1]]


@pytest.mark.parametrize("line", WRITE)
def test_what_is_to_be_written_can_be_made(line):
    loss = eval(line, {**vars(pyro.infer), **vars(pyro_rb.infer), "pyro_rb": pyro_rb})
    assert isinstance(loss, pyro.infer.ELBO)
