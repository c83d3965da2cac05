"""How Sphinx builds these pages: `sphinx-build -W -b html docs docs/_build`."""

import importlib.metadata
import re

project = "codream"
author = "the codream authors"
release = importlib.metadata.version("codream")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "codream"
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "separated"
autodoc_preserve_defaults = True
suppress_warnings = ["autodoc.mocked_object"]


def _plain(_app, _what, _name, _obj, _options, lines):
    """Docstrings are plain prose with `code`: nothing else in them is markup."""
    for k, line in enumerate(lines):
        pieces = re.split(r"(`[^`]*`)", line)
        lines[k] = "".join(p if p.startswith("`") else re.sub(r"([*|_\\])", r"\\\1", p) for p in pieces)


def setup(app):
    app.connect("autodoc-process-docstring", _plain)
