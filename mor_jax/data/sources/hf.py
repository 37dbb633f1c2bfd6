"""Documents of Hugging Face `datasets`: from a local directory, or by name from the hub."""

import contextlib
import functools
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

from mor_jax.config.optional_import import require_package
from mor_jax.config.parsing import check, fail
from mor_jax.data.sources.records import Field
from mor_jax.data.sources.skipped_records import SkippedRecords

FORMS = "hf:DIR[:SPLIT], hf:NAME[:SPLIT] or hf:NAME:CONFIG:SPLIT"
_SAVED = ("dataset_dict.json", "state.json")
_ROWS = 1000
"""Rows read at once."""

Part = tuple[Any, int, int]
"""A dataset, its first requested row, and the row after the last."""


def open_rows(
    rest: str, field: Field, setting: str, spec: str
) -> tuple[str, int, Callable[[int, SkippedRecords], Iterator[str]]]:
    """Identity, bytes of the text and reader of `DIR[:SPLIT]`, `NAME[:SPLIT]`, `NAME:CONFIG:SPLIT`.

    DIR was written by `save_to_disk`; a directory takes precedence over a name on the hub. The
    split may be a slice or a sum, such as `train[:10%]`; by default it is the only one, or `train`.
    Raises `ValueError` if the source does not exist or the hub cannot be reached.
    """
    library = require_package("datasets", setting, spec)
    name, *more = _names(rest, setting, spec)
    folder = os.path.expanduser(name)
    if os.path.isdir(folder):
        check(len(more) < 2, setting, spec, "a directory has no configuration", f"Write {FORMS}")
        splits = _saved(library, folder, setting, spec)
    else:
        splits = _of_hub(library, name, more[0] if len(more) == 2 else None, setting, spec)
    if not isinstance(splits, dict):
        splits = {str(splits.split or "train"): splits}
    split = more[-1] if more else "train" if len(splits) > 1 else next(iter(splits))
    parts = _parts(library, splits, split, setting, spec)
    for data, _, _ in parts:
        field.require(data.column_names, spec)
    files = [file["filename"] for data, _, _ in parts for file in data.cache_files]
    sizes = [(os.path.basename(file), os.path.getsize(file)) for file in files]
    identity = repr(("hf", sizes, [(len(data), first, stop) for data, first, stop in parts]))
    size = sum(data.data.column(field.name).nbytes for data, _, _ in parts)
    reader = functools.partial(_read, parts, field, spec)
    return hashlib.sha256(identity.encode()).hexdigest()[:32], size, reader


def _names(rest: str, setting: str, spec: str) -> list[str]:
    """Directory or name on the hub, then what follows: nothing, a split, or both with a
    configuration between. A colon between brackets belongs to a part of a split."""
    if os.path.isdir(os.path.expanduser(rest)):
        return [rest]
    names = re.split(r":(?![^\[]*\])", rest)
    while len(names) > 1 and os.path.isdir(os.path.expanduser(":".join(names[:2]))):
        names[:2] = [":".join(names[:2])]
    ok = len(names) <= 3 and all(names) and "://" not in rest
    check(ok, setting, spec, "is not the name of a dataset", f"Write {FORMS}")
    return names


def _saved(library: Any, folder: str, setting: str, spec: str) -> Any:
    rule = f"{folder} was not written by save_to_disk: it has none of {', '.join(_SAVED)}"
    fix = "Give the directory that save_to_disk wrote; for files use 'parquet:GLOB'"
    ok = any(os.path.isfile(os.path.join(folder, name)) for name in _SAVED)
    check(ok, setting, spec, rule, fix)
    try:
        return library.load_from_disk(folder)
    # Raised by the library on missing, damaged or differently formatted files.
    except (OSError, ValueError, KeyError, TypeError) as error:
        rule = f"cannot be loaded ({_line(error)})"
        fail(setting, spec, rule, "Copy it again, or save it again with save_to_disk")


def _of_hub(library: Any, name: str, config: str | None, setting: str, spec: str) -> Any:
    ok = name[0] not in "./~" and name.count("/") <= 1
    rule = f"{name} is neither a directory (current directory: {os.getcwd()}) nor a name on the hub"
    check(ok, setting, spec, rule, f"Check the path, or write {FORMS}")
    try:
        with _quiet():
            return library.load_dataset(name, config)
    except ConnectionError as error:
        rule = f"is not a local directory, and the hub cannot be reached ({_line(error)})"
        fix = "Save it on a machine with network access: load_dataset(...).save_to_disk(DIR)"
        fail(setting, spec, rule, f"{fix}. Then give that directory")
    # Unknown name, missing or unknown configuration, datasets that need a script.
    except (OSError, ValueError, RuntimeError) as error:
        rule = f"cannot be loaded from the hub ({_line(error)})"
        fail(setting, spec, rule, f"Check the name; write {FORMS}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides the log lines of the hub's retries; the error reports their cause."""
    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _parts(library: Any, splits: Any, split: str, setting: str, spec: str) -> list[Part]:
    sizes = {name: len(data) for name, data in splits.items()}
    try:
        instructions = library.ReadInstruction.from_spec(split).to_absolute(sizes)
    # The library checks part of the syntax by assertions.
    except (ValueError, AssertionError) as error:
        fix = f"Choose one of {sorted(sizes)}, or a part such as {next(iter(sizes))}[:10%]"
        fail(setting, spec, f"has no split {split!r} ({_line(error)})", fix)
    parts = [(splits[part.splitname], part.from_, part.to) for part in instructions]
    rows = sum(stop - first for _, first, stop in parts)
    check(rows > 0, setting, spec, f"split {split!r} has no rows", f"Rows per split: {sizes}")
    return parts


def _read(
    parts: list[Part], field: Field, spec: str, start: int, skipped_records: SkippedRecords
) -> Iterator[str]:
    number = start
    for data, first, stop in parts:
        skipped = min(start, stop - first)
        start -= skipped
        texts = data.select_columns([field.name]).with_format(None)
        for at in range(first + skipped, stop, _ROWS):
            for value in texts[at : min(at + _ROWS, stop)][field.name]:
                yield field.text(value, f"{spec}, row {number}", skipped_records)
                number += 1
