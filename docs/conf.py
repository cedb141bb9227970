"""How Sphinx builds these pages: `make docs`."""

from __future__ import annotations

import importlib.metadata
import json
import re

project = "torch-lab"
author = "The torch-lab authors"
copyright = "2026, the torch-lab authors"
release = version = importlib.metadata.version("torch-lab")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown", ".ipynb": "markdown"}
exclude_patterns = ["_build", "**/.ipynb_checkpoints"]
default_role = "code"  # Docstrings write `name`, as Markdown does.

html_theme = "furo"
html_title = f"torch-lab {version}"
html_show_sphinx = False

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_inherit_docstrings = False  # Lightning's own docstrings are not ours to render.
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False

_FENCE = re.compile(r"^```")


def _fences_as_literal_blocks(_app, _what, _name, _obj, _options, lines: list[str]) -> None:
    """Turn each fenced block of a docstring into one that reStructuredText knows."""
    inside = False
    for number, line in enumerate(lines):
        if _FENCE.match(line.lstrip()):
            inside = not inside
            lines[number] = "::\n" if inside else ""
        elif inside:
            lines[number] = f"    {line}"
    lines[:] = "\n".join(lines).splitlines()


def _notebooks_as_markdown(app, docname: str, source: list[str]) -> None:
    """Turn a notebook into the Markdown that it is, with fences around what is code and output."""
    if not str(app.env.doc2path(docname)).endswith(".ipynb"):
        return
    blocks = []
    for cell in json.loads(source[0])["cells"]:
        text = "".join(cell["source"])
        blocks.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        texts = ["".join(output["text"]).rstrip() for output in cell.get("outputs", ())]
        blocks += [f"```text\n{text}\n```" for text in texts]
    source[0] = "\n\n".join(blocks)


def setup(app) -> None:
    """Prepare docstrings before napoleon reads them, and notebooks before MyST does."""
    app.connect("autodoc-process-docstring", _fences_as_literal_blocks, priority=1)
    app.connect("source-read", _notebooks_as_markdown)
