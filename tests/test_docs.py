# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

"""Whoever reads of a class or function in the API finds an example, which pytest runs."""

import dataclasses
import doctest
import importlib
import inspect
import re
from pathlib import Path

import pytest

import pyro_rb

API = Path(__file__).resolve().parents[1] / "docs" / "source" / "reference" / "index.rst"
MODULES = re.findall(r"^\.\. automodule:: (\S+)$", API.read_text(encoding="utf-8"), re.M)


def is_shown_elsewhere(value):
    """Exceptions and records are in the example of what raises or returns them."""
    is_record = dataclasses.is_dataclass(value) or hasattr(value, "_fields")
    return inspect.isclass(value) and (is_record or issubclass(value, BaseException))


def documented(module):
    """Classes and functions that Sphinx shows: public, with a docstring, defined there."""
    for name, value in vars(module).items():
        if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
            continue
        if (inspect.isclass(value) or inspect.isfunction(value)) and inspect.getdoc(value):
            yield name, value


@pytest.mark.parametrize("name", MODULES)
def test_each_name_of_the_api_has_an_example(name):
    module = importlib.import_module(name)
    lacking = [
        key
        for key, value in documented(module)
        if not is_shown_elsewhere(value)
        and not any(test.examples for test in doctest.DocTestFinder().find(value, key))
    ]
    assert not lacking, f"no example in the docstring of {', '.join(lacking)}"


def test_all_that_is_exported_is_in_the_api():
    exported = [getattr(pyro_rb, name) for name in pyro_rb.__all__]
    text = API.read_text(encoding="utf-8")
    lacking = [v.__name__ for v in exported if v.__module__ not in MODULES and v.__name__ not in text]
    assert not lacking
