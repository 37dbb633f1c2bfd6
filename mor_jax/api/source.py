"""Where weights come from: a run directory, or an export that is read as one."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mor_jax.checkpoint.run_dir import CONFIG_FILE
from mor_jax.config.parsing import check


def check_path(name: str, value: object) -> None:
    """Raises `ValueError` unless `value` is a path that is not empty."""
    ok = isinstance(value, str | os.PathLike) and bool(os.fspath(value))
    check(ok, name, value, "must be the path of a directory or a file", "Write it like 'runs/mor'")


@contextlib.contextmanager
def run_directory(source: str | os.PathLike[str]) -> Iterator[str]:
    """The run directory `source`, or a temporary one with the weights of an export.

    source: a run directory; a directory in the format of Hugging Face, such as `mor convert export`
    writes; or a GGUF file. A temporary directory holds the weights in float32.

    Raises:
        ValueError: there is nothing there, or it is not a model that can be read.
    """
    check_path("source", source)
    given = os.fspath(source)
    path = Path(given).expanduser()
    if "://" in given or not _is_export(path):
        yield given
        return
    # Reading foreign weights takes libraries that nothing else here needs.
    from mor_jax.convert.imports import ImportOptions, import_run

    origin = "gguf" if path.is_file() else "hf"
    with tempfile.TemporaryDirectory(prefix="mor_jax-") as directory:
        workdir = Path(directory) / path.stem
        import_run(origin, str(path), ImportOptions(workdir=workdir))
        yield str(workdir)


def _is_export(path: Path) -> bool:
    check(path.exists(), "source", str(path), "does not exist", "Give a run directory or an export")
    if path.is_file():
        rule = "neither a directory nor a GGUF file"
        check(path.suffix == ".gguf", "source", str(path), rule, "Give a run or an export")
        return True
    file = path / CONFIG_FILE
    if not file.is_file():
        return False
    try:
        return "model_type" in json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        # Whoever reads the run says what is wrong with it.
        return False
