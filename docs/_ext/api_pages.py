"""One page of the API reference for every folder of `mor_jax`, with all its modules.

The pages are written to docs/api before Sphinx reads its sources, from the files that are there, so
that a new module needs no entry anywhere.
"""

import ast
import builtins
import functools
from collections.abc import Iterator
from pathlib import Path

from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform
from sphinx.util.nodes import find_pending_xref_condition

DOCS = Path(__file__).parents[1]
ROOT = DOCS.parent
PACKAGE = ROOT / "mor_jax"


def modules(folder: Path) -> list[str]:
    """Dotted names of a folder's modules, without the commands: docs/commands.md shows those.

    Commands define their flags when they are imported, which one process can do only once.
    """
    if folder in (PACKAGE / "cli", PACKAGE / "configs"):
        return []
    skipped = ("__init__", "__main__")
    paths = sorted(path for path in folder.glob("*.py") if path.stem not in skipped)
    return [dotted(path) for path in paths]


def dotted(path: Path) -> str:
    """mor_jax/models/block.py -> mor_jax.models.block; a package is named by its folder."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def folders() -> list[Path]:
    """The package and all packages inside of it, in order of their names."""
    return sorted(path.parent for path in PACKAGE.rglob("__init__.py"))


def page(folder: Path) -> str:
    """The page of one folder in reStructuredText: its docstring, then each module's."""
    name = dotted(folder / "__init__.py")
    lines = [name, "=" * len(name), "", f".. automodule:: {name}", ""]
    for module in modules(folder):
        title = module.removeprefix(f"{name}.")
        lines += [title, "-" * len(title), "", f".. automodule:: {module}", ""]
    return "\n".join(lines)


def index() -> str:
    """The page of contents: each folder with the first line of its docstring."""
    rows = []
    for folder in folders():
        name = dotted(folder / "__init__.py")
        text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
        rows += [f":doc:`{name}`", f"   {text.splitlines()[0] if text else ''}", ""]
    names = [f"   {dotted(folder / '__init__.py')}" for folder in folders()]
    toctree = [".. toctree::", "   :hidden:", "   :maxdepth: 1", "", *names]
    about = (
        "Every module and every public name, from the docstrings. The search finds functions, "
        "classes and settings by name."
    )
    return "\n".join(["API reference", "=============", "", about, "", *rows, *toctree, ""])


def write(app: Sphinx) -> None:
    """Writes pages that changed and deletes those whose folder is gone."""
    output = Path(app.srcdir) / "api"
    output.mkdir(exist_ok=True)
    pages = {f"{dotted(folder / '__init__.py')}.rst": page(folder) for folder in folders()}
    pages["index.rst"] = index()
    for path in output.glob("*.rst"):
        if path.name not in pages:
            path.unlink(missing_ok=True)
    for name, text in pages.items():
        path = output / name
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


@functools.cache
def definitions(module: str) -> dict[str, int]:
    """Qualified name -> line of every class, function and assigned name of a module."""
    path = module_path(module)
    return dict(_walk(ast.parse(path.read_text()).body, "")) if path else {}


def _walk(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, int]]:
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield prefix + node.name, node.lineno
            if isinstance(node, ast.ClassDef):
                yield from _walk(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = (target.id for target in targets if isinstance(target, ast.Name))
            yield from ((prefix + name, node.lineno) for name in names)


def module_path(module: str) -> Path | None:
    base = ROOT.joinpath(*module.split("."))
    candidates = (base.with_suffix(".py"), base / "__init__.py")
    return next((path for path in candidates if path.is_file()), None)


def source_line(module: str, name: str) -> tuple[Path, int] | None:
    """File and line that define a name, or None for names that are made at run time."""
    path, line = module_path(module), definitions(module).get(name)
    return (path, line) if path and line else None


class ExactNames(SphinxTransform):
    """A type in a signature leads to the class of exactly that name.

    Sphinx would search all modules for a name that ends so, and lead from the built-in `bytes` to
    the field `bytes` of some class.
    """

    default_priority = 5

    def apply(self, **kwargs: object) -> None:
        for node in list(self.document.findall(addnodes.pending_xref)):
            if node.get("refdomain") != "py":
                continue
            node.attributes.pop("refspecific", None)
            if hasattr(builtins, node["reftarget"]):
                shown = find_pending_xref_condition(node, "resolved")
                node.replace_self((shown or node).children)


def setup(app: Sphinx) -> dict:
    app.connect("builder-inited", write)
    app.add_transform(ExactNames)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
