# Copyright Contributors to the pyro_rb project.
# SPDX-License-Identifier: Apache-2.0

import importlib
import importlib.util
import os
import pkgutil
import re
import sys
from pathlib import Path

import pypandoc

sys.path.insert(0, os.path.abspath("../.."))

import pyro_rb  # noqa: E402

# nbsphinx looks for pandoc on the path; the package pypandoc_binary carries it.
os.environ["PATH"] += os.pathsep + str(Path(pypandoc.get_pandoc_path()).parent)
# Read by the notebooks' kernels: a printed progress bar is all that a page can show.
os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"
# Notebooks show their figures whatever the surroundings ask for.
os.environ.pop("MPLBACKEND", None)

project = "pyro_rb"
author = "Contributors to the pyro_rb project"
copyright = author
version = release = pyro_rb.__version__

extensions = [
    "nbsphinx",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.doctest",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
]
templates_path = ["_templates"]
# What is copied from an example is its code, without prompts and results.
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
copybutton_selector = "div.highlight pre"

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
# MathJax lies beside the pages, so that formulas need no network. Of the package only the files are used: as an
# extension it does not allow for parallel builds.
html_static_path = ["_static", str(Path(importlib.util.find_spec("sphinx-mathjax-offline").origin).parent / "static")]
mathjax_path = "mathjax/tex-chtml.js"
html_css_files = ["custom.css"]
# Light or dark as the reader's system says, or by the button on top of each page. custom.css uses
# the variables that are set here.
html_theme_options = {
    "light_css_variables": {"figure-card": "transparent", "figure-filter": "none"},
    # Figures are drawn on white; on a dark page they lie on a light card.
    "dark_css_variables": {"figure-card": "white", "figure-filter": "brightness(0.88)"},
}
# Both pass .ci/check_contrast.py.
pygments_style = "default"
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
    (r"py:class", r"(callable|Trace|queue\.LifoQueue|tqdm\..*)"),
    # Type variables.
    (r"py:class", r"pyro_rb\..*\.(Key|T)"),
]


def setup(app):
    app.connect("env-before-read-docs", spread_notebooks)
    app.connect("env-updated", without_aliases)
    app.connect("missing-reference", resolve)
    app.connect("html-page-context", without_back_links)


def spread_notebooks(app, env, docnames):
    """A build with several processes gives neighbours to one of them, and notebooks are what takes time."""
    notebooks = [name for name in docnames if Path(env.doc2path(name)).suffix == ".ipynb"]
    others = [name for name in docnames if name not in notebooks]
    for number, name in enumerate(notebooks):
        others.insert(number * len(docnames) // len(notebooks), name)
    docnames[:] = others


def without_aliases(app, env):
    """Each object has its public name only: some of the others cannot be looked up, as a function hides a package."""
    objects = env.domains["py"].objects
    for name in [name for name, entry in objects.items() if entry.aliased]:
        del objects[name]


def without_back_links(app, pagename, templatename, context, doctree):
    """On pages of source code: viewcode makes them for one public module a file, and some files serve two."""
    if pagename.startswith("_modules/"):
        context["body"] = re.sub(r'<a class="viewcode-back".*?</a>', "", context["body"], flags=re.S)


def resolve(app, env, node, contnode):
    """
    Docstrings name what stands in their module. The reference has it under its public name; what is internal is
    shown without a link. Names that do not exist stay missing.
    """
    if node.get("refdomain") != "py":
        return None
    domain, name = env.domains["py"], node["reftarget"]
    found = find(name, node.get("py:module"), node.get("py:class"))
    if found is None:
        return None
    public = public_names(domain).get(id(found))
    if public is None:
        return contnode
    kind = domain.objects[public].objtype
    return domain.resolve_xref(env, node["refdoc"], app.builder, domain.role_for_objtype(kind), public, node, contnode)


def find(name, *scopes):
    """The object of a name: as it stands, within one of the scopes, or within any of our modules."""
    modules = [m for key, m in sorted(sys.modules.items()) if key.split(".")[0] == "pyro_rb"]
    tried = [name, *(f"{scope}.{name}" for scope in scopes if scope)]
    for path in tried:
        try:
            return pkgutil.resolve_name(path)
        except (ImportError, AttributeError, ValueError):
            pass
    for module in modules:
        value = module
        for part in name.split("."):
            value = getattr(value, part, None)
        if value is not None and getattr(value, "__module__", "").split(".")[0] == "pyro_rb":
            return value
    return None


def public_names(domain):
    """By identity of the object: the name that it is documented under."""
    names = {}
    for name, entry in domain.objects.items():
        if name.startswith("pyro_rb"):
            try:
                names[id(pkgutil.resolve_name(name))] = name
            except (ImportError, AttributeError):
                pass  # an attribute of instances
    return names


for _module in pkgutil.walk_packages(pyro_rb.__path__, "pyro_rb."):
    if not _module.name.endswith("__main__"):
        importlib.import_module(_module.name)
