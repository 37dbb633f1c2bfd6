"""The imports of mor_jax as a graph: folders, their order, imports against it, circles.

    python tests/support/import_graph.py [ROOT]

prints the figures of a checkout (default: this one). In one without these folders every module is
placed by `earlier_layout.tsv`, which says where each module of version 0.1.0's first layout went.
"""

import ast
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = "mor_jax"

# Lowest first. A module imports from its own folder and from folders of lower levels; two folders
# of one level do not import each other. `types` and `files` are the modules at the root.
LEVELS = (
    ("types",),
    ("config",),
    ("files",),
    ("data.tokenizers", "data.sources"),
    ("data.streams",),
    ("data.shards",),
    ("data",),
    ("runtime", "observability"),
    ("distributed", "plotting"),
    ("models.layers",),
    ("models.attention_kernels", "models.routing"),
    ("models",),
    ("models.decode",),
    ("checkpoint",),
    ("training", "inference"),
    ("inference.engine",),
    ("inference.server", "inference.cli"),
    ("convert.sources", "convert.hf"),
    ("convert.tokenizers",),
    ("convert", "planning.hlo", "analysis"),
    ("convert.parity", "planning", "evaluation.lm_eval"),
    ("evaluation", "scaling.study"),
    ("scaling.runs",),
    ("scaling.fit",),
    ("scaling.report",),
    ("calibration",),
    ("api",),
    ("configs",),
    ("cli",),
    ("__main__",),
)
LEVEL = {folder: level for level, folders in enumerate(LEVELS) for folder in folders}

Graph = Mapping[str, frozenset[str]]
"""Module -> the modules that it imports, both without the package's name."""


def modules(root: Path) -> dict[str, Path]:
    """Every module of the package but `__init__` files that hold no code of their own."""
    found = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root / PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        code = ast.parse(path.read_text()).body[1:]
        if name and code and "modeling_mor" not in name:
            found[name] = path
    return found


def imported(path: Path, known: Mapping[str, Path]) -> Iterator[str]:
    """The modules of the package that a file imports, at its top or inside of functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            both = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if _short(name) in known else node.module or "" for name in both]
        else:
            continue
        for name in map(_short, names):
            if name in known:
                yield name


def _short(name: str) -> str:
    return name.removeprefix(f"{PACKAGE}.")


def graph_of(root: Path) -> Graph:
    """The whole graph of a checkout."""
    known = modules(root)
    return {name: frozenset(imported(path, known)) - {name} for name, path in known.items()}


def folder_of(module: str, folders: frozenset[str]) -> str:
    """`training.loop` -> `training`; a package itself and modules at the root are their own."""
    return module if module in folders else module.rpartition(".")[0] or module


def wrong_imports(graph: Graph) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Imports of a folder of a higher level, and of another folder of the same level."""
    folders, up, across = frozenset(LEVEL), [], []
    for module, others in sorted(graph.items()):
        here = folder_of(module, folders)
        for other in sorted(others):
            there = folder_of(other, folders)
            if LEVEL[there] > LEVEL[here]:
                up.append((module, other))
            elif LEVEL[there] == LEVEL[here] and there != here:
                across.append((module, other))
    return up, across


def circles(graph: Mapping[str, frozenset[str]]) -> list[list[str]]:
    """Groups of nodes that import each other, directly or through others (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph.get(node, ()):
            if other not in index:
                visit(other)
            if other in stack:
                low[node] = min(low[node], low[other])
        if low[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(sorted(group))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def between_folders(graph: Graph) -> dict[str, frozenset[str]]:
    """The same graph with folders as nodes."""
    folders, edges = frozenset(LEVEL), defaultdict(set)
    for module, others in graph.items():
        here = folder_of(module, folders)
        edges[here] |= {folder_of(other, folders) for other in others} - {here}
    return {here: frozenset(there) for here, there in edges.items()}


def moved(graph: Graph, places: Mapping[str, str]) -> Graph:
    """`graph` with its modules under other names; packages without a new name keep theirs."""
    return {
        places.get(module, module): frozenset(places.get(other, other) for other in others)
        for module, others in graph.items()
    }


def main(root: Path) -> None:
    """Prints the figures of a checkout."""
    graph = graph_of(root)
    at_root = sorted(name for name in graph if "." not in name and _is_file(root, name))
    print(f"modules: {len(graph)}; at the root of {PACKAGE}/: {len(at_root)}")
    folders = {path.parent for path in modules(root).values()}
    print(f"folders: {len(folders)}")
    if unknown := {folder_of(module, frozenset(LEVEL)) for module in graph} - set(LEVEL):
        table = Path(__file__).with_name("earlier_layout.tsv")
        lines = [line.split("\t") for line in table.read_text().splitlines()]
        graph = moved(graph, {old: new for old, new in lines})
        graph = {
            module: frozenset(other for other in others if _placed(other))
            for module, others in graph.items()
            if _placed(module)
        }
        print(f"no place in the order: {len(unknown)} folders; modules counted where they went")
    up, across = wrong_imports(graph)
    print(f"imports upwards: {len(up)}; across a level: {len(across)}")
    print(f"circles of modules: {len(circles(graph))}, {sum(map(len, circles(graph)))} modules")
    rooms = circles(between_folders(graph))
    print(f"circles of folders: {len(rooms)}, {sum(map(len, rooms))} folders")
    for name, pairs in (("up", up), ("across", across)):
        for module, other in pairs:
            print(f"  {name}: {module} -> {other}")
    for group in circles(graph):
        print("  circle:", " ".join(group))


def _is_file(root: Path, name: str) -> bool:
    return (root / PACKAGE / f"{name}.py").is_file()


def _placed(module: str) -> bool:
    return folder_of(module, frozenset(LEVEL)) in LEVEL


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
