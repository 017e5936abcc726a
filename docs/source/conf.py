# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

import os
import sys
from pathlib import Path

import pypandoc

sys.path.insert(0, os.path.abspath("../.."))

import pyro_rb  # noqa: E402

# nbsphinx looks for pandoc on the path; the package pypandoc_binary carries it.
os.environ["PATH"] += os.pathsep + str(Path(pypandoc.get_pandoc_path()).parent)
# Read by the notebooks' kernels: a printed progress bar is all that a page can show.
os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"

project = "pyro_rb"
author = "Contributors to the pyro_rb project"
copyright = author
version = release = pyro_rb.__version__

extensions = [
    "nbsphinx",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
]

# Notebooks are committed without their results and run whenever the pages are built.
nbsphinx_execute = "always"
nbsphinx_timeout = 300
nbsphinx_prompt_width = "0"
exclude_patterns = ["**.ipynb_checkpoints"]

numfig = True

html_theme = "sphinx_rtd_theme"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_theme_options = {"navigation_depth": 3}

autodoc_default_options = {"members": True, "member-order": "bysource", "show-inheritance": True}
# The signature shows the types; the text of a docstring names shapes and units.
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True

# Only `.. doctest::` blocks of the pages; pytest runs the examples of the docstrings.
doctest_test_doctest_blocks = ""

# The build is offline, so there is no intersphinx: names of other projects are
# shown, not linked. Our own names must all resolve.
nitpick_ignore_regex = [
    (r"py:.*", r"(pyro|torch|numpy|matplotlib)\..*"),
    (r"py:.*", r"(collections|contextlib|functools|json|math|pathlib|random|typing)(\..*)?"),
    # Python has no class of that name: it is anything that can be called.
    (r"py:class", r"callable"),
    # Type variables.
    (r"py:class", r"pyro_rb\..*\.(Key|T)"),
]
