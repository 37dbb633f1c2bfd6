"""Links of the pages that lead out of docs/ to files of the repository.

On GitHub `[the step](../mor_jax/training/train_step.py)` is the file. On the site a module leads to
its place in the API reference, and any other file or folder to the repository; a path that does not
exist is left to Sphinx, which warns of it.
"""

from pathlib import Path
from urllib.parse import quote, unquote

from api_pages import DOCS, PACKAGE, ROOT, dotted
from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform


class RepositoryLinks(SphinxTransform):
    # Before the collectors of downloads and Sphinx's own resolution of references.
    default_priority = 5

    def apply(self, **kwargs: object) -> None:
        kinds = (addnodes.download_reference, addnodes.pending_xref)
        for node in list(self.document.findall(lambda node: isinstance(node, kinds))):
            if node.get("reftype") == "myst" and (path := self.outside(node["reftarget"])):
                node.replace_self(self.link(path, node))

    def outside(self, target: str) -> Path | None:
        """The file or folder of the repository that a link names, None for one inside of docs/."""
        # A Markdown file out there is named absolutely and without its ending, as a page would be.
        base = Path(self.env.doc2path(self.env.docname)).parent / unquote(target.split("#")[0])
        for path in (base.resolve(), base.with_name(f"{base.name}.md").resolve()):
            if path.exists() and path.is_relative_to(ROOT) and not path.is_relative_to(DOCS):
                return path
        return None

    def link(self, path: Path, node: nodes.Element) -> nodes.Element:
        text = node.children
        if path.suffix == ".py" and path.is_relative_to(PACKAGE):
            link = addnodes.pending_xref(
                "", refdomain="py", reftype="mod", reftarget=dotted(path), refwarn=True
            )
            link["refdoc"], link["refexplicit"] = self.env.docname, True
        else:
            kind = "tree" if path.is_dir() else "blob"
            place = quote(path.relative_to(ROOT).as_posix())
            uri = f"{self.config.repository}/{kind}/main/{place}"
            link = nodes.reference("", "", refuri=uri, internal=False)
        link += [child.deepcopy() for child in text]
        return link


def setup(app: Sphinx) -> dict:
    app.add_config_value("repository", "", "env")
    app.add_transform(RepositoryLinks)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
