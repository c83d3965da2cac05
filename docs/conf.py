"""How Sphinx builds these pages: `sphinx-build -W -b html docs docs/_build`."""

import importlib.metadata
import re

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

project = "codream"
author = "the codream authors"
release = importlib.metadata.version("codream")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
html_theme = "furo"
html_math_renderer = "mathml"
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


def _mathml(as_block):
    """Equations as MathML, which browsers draw themselves: the pages need no network."""

    def visit(writer, node):
        formula = tex2mathml(node.astext(), as_block=as_block)
        writer.body.append(f'<div style="overflow-x:auto">{formula}</div>' if as_block else formula)
        raise nodes.SkipNode

    return visit, None


def setup(app):
    app.add_html_math_renderer("mathml", inline_renderers=_mathml(False), block_renderers=_mathml(True))
    app.connect("autodoc-process-docstring", _plain)
