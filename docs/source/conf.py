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
    "sphinx_design",
]

# Notebooks are committed without their results and run whenever the pages are built.
nbsphinx_execute = "always"
nbsphinx_timeout = 300
nbsphinx_prompt_width = "0"
# There are no widgets that would need it.
nbsphinx_requirejs_path = ""
exclude_patterns = ["**.ipynb_checkpoints"]

numfig = True

html_theme = "furo"
html_title = f"pyro_rb {release}"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
# Light or dark as the reader's system says, or by the button on top of each page. custom.css uses
# the variables that are set here.
html_theme_options = {
    "light_css_variables": {"figure-card": "transparent", "figure-filter": "none"},
    # Figures are drawn on white; on a dark page they lie on a light card.
    "dark_css_variables": {"figure-card": "white", "figure-filter": "brightness(0.88)"},
}
pygments_style = "tango"
pygments_dark_style = "monokai"
# In the list of contents of the API, method names alone are enough.
toc_object_entries_show_parents = "hide"

autodoc_default_options = {"members": True, "member-order": "bysource", "show-inheritance": True}
# The signature shows the types; the text of a docstring names shapes and units.
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True

# Only the blocks of the pages that say so; pytest runs the examples of the docstrings.
doctest_test_doctest_blocks = ""
doctest_global_setup = """
import pyro
import pyro.distributions as dist
import torch

pyro.clear_param_store()
pyro.set_rng_seed(0)
"""

# The build is offline, so there is no intersphinx: names of other projects are
# shown, not linked. Our own names must all resolve.
nitpick_ignore_regex = [
    (r"py:.*", r"(pyro|torch|numpy|matplotlib)\..*"),
    (r"py:.*", r"(collections|contextlib|functools|json|math|pathlib|random|typing)(\..*)?"),
    # Python has no class of that name: it is anything that can be called.
    (r"py:class", r"(callable|Trace|Cost|TopK|queue\.LifoQueue|tqdm\..*)"),
    # Type variables.
    (r"py:class", r"pyro_rb\..*\.(Key|T)"),
]
