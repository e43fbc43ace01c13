"""How the pages are built. Nothing is fetched: no fonts, no scripts, no inventories of other projects."""

from __future__ import annotations

import importlib.metadata

project = "sisa"
author = "The sisa authors"
copyright = "The sisa authors, Apache License 2.0"
release = version = importlib.metadata.version("sisa")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "description"
napoleon_google_docstring = True
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = f"sisa {release}"
html_copy_source = False
html_show_sphinx = False
