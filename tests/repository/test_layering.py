"""The rules of the code that a machine can check: import order, sizes, docstrings."""

import ast
import functools
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

from support.import_graph import (
    LEVEL,
    between_folders,
    circles,
    folder_of,
    graph_of,
    wrong_imports,
)

ROOT = Path(__file__).parents[2]
LEVELS_IN = "tests/support/import_graph.py"
GRAPH = graph_of(ROOT)
CODE = sorted(
    path for folder in ("mor_jax", "configs", "launch") for path in (ROOT / folder).rglob("*.py")
)
IDS = [str(path.relative_to(ROOT)) for path in CODE]

# Copied into every export and run there: it has to hold everything, its imports are those of that
# place, and the library that calls it decides on its arguments.
EXPORTED = ROOT / "mor_jax" / "convert" / "hf" / "modeling_mor.py"

# These need packages that nothing else does, so nothing else may import them at its top.
SERVER = ROOT / "mor_jax" / "inference" / "server"
HARNESS = ROOT / "mor_jax" / "evaluation" / "lm_eval"

OWN = {"mor_jax", "configs", "launch"}
MAX_FILE, MAX_FUNCTION = 400, 60


def each_module(check: Callable[[Path], None]) -> Callable[[], None]:
    """The test that `check` holds for every file, naming all where it does not."""

    def test() -> None:
        broken = []
        for path in CODE:
            try:
                check(path)
            except AssertionError as error:
                broken.append(f"{path.relative_to(ROOT)}: {error}")
        assert not broken, "\n".join(broken)

    test.__name__ = test.__qualname__ = check.__name__
    return test


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def module_of(path: Path) -> str:
    """mor_jax/models/block.py -> mor_jax.models.block"""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def imports(path: Path) -> frozenset[str]:
    """Absolute dotted names that a file imports anywhere, `from a import b` as a and a.b."""
    package = module_of(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    found = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            found |= {source} | {f"{source}.{alias.name}" for alias in node.names}
    return frozenset(found)


def part(module: str) -> str | None:
    """The second name of `mor_jax.X...`, None for anything else."""
    names = module.split(".")
    return names[1] if names[0] == "mor_jax" and len(names) > 1 else None


def test_there_is_code_to_check():
    assert {"mor_jax/config/train.py", "configs/common.py"} <= set(IDS)


def test_every_folder_has_a_level():
    folders = {folder_of(name, frozenset(LEVEL)) for name in GRAPH}
    assert folders <= set(LEVEL), f"give {sorted(folders - set(LEVEL))} a level in {LEVELS_IN}"


def test_only_these_files_lie_at_the_root():
    files = {path.name for path in (ROOT / "mor_jax").glob("*.py")}
    wanted = {"__init__.py", "__main__.py", "types.py", "files.py"}
    assert files == wanted, "give a new file a folder"


def test_no_import_points_upwards_or_across():
    up, across = wrong_imports(GRAPH)
    assert not [f"{module} -> {other}" for module, other in up + across]


def test_there_are_no_circles():
    assert not circles(GRAPH)
    assert not circles(between_folders(GRAPH))


@each_module
def test_the_package_imports_nothing_above_it(path):
    if path.is_relative_to(ROOT / "mor_jax"):
        wrong = {m for m in imports(path) if m.split(".")[0] in ("launch", "tests")}
        assert not wrong, f"mor_jax must not import {sorted(wrong)}"


@each_module
def test_only_its_command_imports_the_http_server(path):
    if not path.is_relative_to(SERVER) and path != ROOT / "mor_jax" / "cli" / "serve.py":
        assert not {m for m in imports(path) if m.startswith("mor_jax.inference.server")}


def test_lm_eval_is_imported_only_where_tasks_are_asked_for():
    for path in CODE:
        if not path.is_relative_to(HARNESS):
            top = [node.module or "" for node in tree_of(path).body if type(node) is ast.ImportFrom]
            assert not [name for name in top if name.startswith("mor_jax.evaluation.lm_eval")], path


@each_module
def test_models_know_only_the_models_config(path):
    """`models` never sees the root config, the optimiser or the data."""
    if part(module_of(path)) == "models":
        forbidden = {f"mor_jax.config.train.{n}Config" for n in ("Train", "Optim", "Data", "Eval")}
        assert not imports(path) & forbidden


@each_module
def test_nnx_stays_in_models(path):
    users = {m for m in imports(path) if m.startswith("flax")}
    if part(module_of(path)) != "models":
        assert not users, f"{path} imports {sorted(users)}; only models/ may"


@each_module
def test_no_private_jax(path):
    assert not {m for m in imports(path) if "jax._src" in m or "jaxlib" in m}


@each_module
def test_files_and_names(path):
    lines = len(path.read_text().splitlines())
    assert lines <= MAX_FILE or path == EXPORTED, f"{lines} lines: split it (hard limit {MAX_FILE})"
    assert path.stem not in ("utils", "util", "helpers", "misc"), "name it after what it owns"
    assert not (set(path.relative_to(ROOT).parts[:-1]) & {"common", "utils"})


@each_module
def test_modules_and_public_functions_have_docstrings(path):
    tree = tree_of(path)
    assert ast.get_docstring(tree), "the module docstring says what the module owns"
    public = [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    ]
    missing = [node.name for node in public if not ast.get_docstring(node) and node.name != "main"]
    assert not missing, f"no docstring: {missing}"


@each_module
def test_functions_fit_on_a_screen(path):
    for node in ast.walk(tree_of(path)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        length = node.end_lineno - node.lineno + 1
        assert length <= MAX_FUNCTION, f"{node.name} has {length} lines (limit {MAX_FUNCTION})"


def package(name: str) -> str:
    """Package of an import name or of a requirement line: `grain>=0.2` -> grain."""
    for stop in "[<>=!~; ":
        name = name.split(stop)[0]
    special = {"absl": "absl-py", "orbax": "orbax-checkpoint", "yaml": "pyyaml", "PIL": "pillow"}
    return special.get(name, name).lower().replace("_", "-")


def required(path: Path) -> set[str]:
    """What a module may import at its top. Those of the HTTP server and of lm-eval's harness,
    which nothing else imports at its top, have requirements of their own."""
    names = ["requirements.txt"]
    if path.is_relative_to(SERVER):
        names.append("requirements-serve.txt")
    if path.is_relative_to(HARNESS):
        names.append("requirements-eval.txt")
    lines = [line for name in names for line in (ROOT / name).read_text().splitlines()]
    lines = [line.split("#")[0].strip() for line in lines]
    return {package(line) for line in lines if line}


def optional() -> set[str]:
    """Packages of every extra; each extra is a requirements file."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["dynamic"]
    files = [name for extra in project["optional-dependencies"].values() for name in extra["file"]]
    lines = [line for name in files for line in (ROOT / name).read_text().splitlines()]
    return {package(line.split("#")[0].strip()) for line in lines} - {""}


def test_every_requirements_file_is_an_extra():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["dynamic"]
    extras = {extra["file"][0] for extra in project["optional-dependencies"].values()}
    files = {path.name for path in ROOT.glob("requirements*.txt")} - {"requirements.txt"}
    assert extras == files


def third_party(nodes) -> set[str]:
    """Packages that import statements among `nodes` need."""
    tops = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            tops |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            tops.add(node.module.split(".")[0])
    return {package(t) for t in tops if t not in sys.stdlib_module_names | OWN}


@each_module
def test_third_party_imports_are_declared(path):
    """Imports at the top of a module in requirements.txt, those inside functions there or as an
    extra in pyproject.toml."""
    tree = tree_of(path)
    top = third_party(tree.body)
    assert path == EXPORTED or not top - required(path), (
        f"add to requirements.txt: {sorted(top - required(path))}"
    )
    missing = third_party(ast.walk(tree)) - required(path) - optional()
    assert not missing, f"add to an extra in pyproject.toml: {sorted(missing)}"
