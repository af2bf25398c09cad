"""Sphinx: `sphinx-build -W -b html docs build/docs`, with the extras `docs` and `servers`. Warnings are errors."""

from __future__ import annotations

import os
import re
from typing import Any

# Its functions are Python, and show their arguments; those of the native engine are the same.
os.environ["LINGERX_ENGINE"] = "portable"

from sphinx.application import Sphinx
from sphinx.util.inspect import signature, stringify_signature

import lingerx

project = "lingerx"
author = "lingerx contributors"
release = version = lingerx.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc"]
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3
smartquotes = False  # options begin with two dashes
html_theme = "furo"
html_title = f"lingerx {version}"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True}
autodoc_inherit_docstrings = False  # those of servers are written in other markup

# "Closer" in an annotation is the one of lingerx, except in lingerx.gevent: so Sphinx links it, too, but not silently.
suppress_warnings = ["ref.python"]

ARGUMENT = re.compile(r"([a-z_]+(?:, [a-z_]+)*): ")


def as_markup(app: object, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """Docstrings are written to be read as they are; this makes markup of how they are laid out.

    An indented paragraph is code. One that begins with names and a colon tells of arguments, each on a line of its own
    that may go on below. What stands in `backquotes` is code. Of a module, the first paragraph is for its users.
    """
    found: list[str] = []
    paragraphs = re.split(r"\n\s*\n", "\n".join(lines).strip("\n"))
    for paragraph in paragraphs[:1] if what == "module" else paragraphs:
        if paragraph.startswith("    "):
            found += ["::", "", *paragraph.split("\n"), ""]
            continue
        paragraph = re.sub(r"(?<!`)`([^`]+)`(?!`)", r"``\1``", paragraph).replace("*", r"\*")
        if not ARGUMENT.match(paragraph):
            found += [*paragraph.split("\n"), ""]
            continue
        for line in paragraph.split("\n"):
            argument = ARGUMENT.match(line)
            found.append(f"- **{argument[1]}**: {line[argument.end() :]}" if argument else f"  {line.strip()}")
        found.append("")
    lines[:] = found


def of_init(
    app: object, what: str, name: str, thing: Any, options: object, given: str | None, returned: str | None
) -> tuple[str, str | None] | None:
    """The arguments of a class whose `__new__` is only there to forbid something."""
    if what != "class" or not (given or "").startswith("(*args") or "__init__" not in vars(thing):
        return None
    arguments = signature(thing.__init__, bound_method=True)
    return stringify_signature(arguments.replace(return_annotation=arguments.empty)), returned


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-docstring", as_markup)
    app.connect("autodoc-process-signature", of_init)
