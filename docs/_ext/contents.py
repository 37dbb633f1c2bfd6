"""The navigation of the site, from the headings and links of docs/index.md.

Sphinx wants `toctree` directives, which GitHub would show as code. A section of index.md that links
to pages becomes a group of the navigation, in the same order; index.md stays plain Markdown.
"""

import re

from sphinx.application import Sphinx

LINK = re.compile(r"\]\((?!\.\./|https?:)([\w./-]+)\.(?:md|rst)\)")


def toctrees(text: str) -> str:
    """A hidden `toctree` for every second-level section that links to pages of the site."""
    groups = []
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        title, _, body = section.partition("\n")
        pages = list(dict.fromkeys(LINK.findall(body)))
        if pages:
            options = f":hidden:\n:maxdepth: 1\n:caption: {title.strip()}"
            groups.append("\n".join(["```{toctree}", options, "", *pages, "```"]))
    return "\n\n".join(groups)


def append(app: Sphinx, docname: str, source: list[str]) -> None:
    if docname == app.config.root_doc:
        # The API reference has no file in the repository that index.md could link to.
        text = source[0].replace("| API reference |", "| [API reference](api/index.rst) |")
        source[0] = f"{text}\n\n{toctrees(text)}\n"


def setup(app: Sphinx) -> dict:
    app.connect("source-read", append)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
