"""How Sphinx builds the documentation: `./launch/docs.sh`, or `python -m sphinx docs OUTPUT`."""

import os
import sys
import tomllib
from pathlib import Path

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path[:0] = [str(ROOT), str(DOCS / "_ext")]
# The kernel of the notebook imports the package of this repository too, from its own folder.
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.getenv("PYTHONPATH")])])

import mor_jax  # noqa: E402

_metadata = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

project = "mor_jax"
author = "The mor_jax authors"
copyright = f"{author}, Apache-2.0"
version = release = mor_jax.__version__
repository = _metadata["urls"]["Repository"]

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.linkcode",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "api_pages",
    "contents",
    "docstrings",
    "repository_links",
]
exclude_patterns = ["_build", "_ext"]

# Pages read well on GitHub too: links to headings have the names that GitHub gives them.
myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath"]

# The notebook runs once and its outputs are kept until its code changes; `docs.sh --fresh` runs it
# again. An error in a cell is a warning, and so an error of the build.
nb_execution_mode = "cache"
nb_execution_in_temp = True
nb_execution_timeout = 600
nb_execution_show_tb = True
nb_merge_streams = True

autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_use_type_comments = False
autodoc_class_signature = "mixed"
python_use_unqualified_type_names = True
# One argument a line where a signature would be longer than a line of code.
maximum_signature_line_length = 100
toc_object_entries_show_parents = "hide"
napoleon_use_rtype = False

html_theme = "sphinx_book_theme"
html_title = "mor_jax"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {
    "repository_url": repository,
    "repository_branch": "main",
    "path_to_docs": "docs",
    "use_repository_button": True,
    "use_source_button": True,
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "home_page_in_toc": False,
}
html_copy_source = False
html_show_sourcelink = False


def linkcode_resolve(domain: str, info: dict) -> str | None:
    """The line of the repository that defines an object of the API reference."""
    from api_pages import source_line

    place = source_line(info["module"], info["fullname"]) if domain == "py" else None
    if place is None:
        return None
    path, line = place
    return f"{repository}/blob/main/{path.relative_to(ROOT).as_posix()}#L{line}"
