"""Atomic output directories and files: written under a temporary name, then renamed."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from safetensors import SafetensorError

from mor_jax import files
from mor_jax.config.parsing import check
from mor_jax.convert.output_manifest import MANIFEST, check_unmodified, write_manifest
from mor_jax.convert.sources.paths import PathLike, check_path
from mor_jax.files import draft_name, fsync, new_file, remove_stale_drafts


@contextlib.contextmanager
def fresh_directory(
    path: PathLike,
    *,
    replace: bool = False,
    sources: Sequence[PathLike] = (),
    name: str = "output",
) -> Iterator[Path]:
    """Yields an empty draft directory; when the block ends it is synced and renamed to `path`.

    If the block raises or the process is killed, `path` is unchanged; at most a directory
    `.partial-NAME-...` beside it is left, which the next conversion to `path` removes.
    replace: replaces the output of an earlier conversion once the new one is complete, but never
    one of `sources`, a directory around or inside one, or files added or changed since.
    name: the setting that gives `path`, for messages.

    Raises:
        ValueError: `path` exists and may not be replaced, or cannot be written.
    """
    check_path(name, path)
    remove_stale_drafts(
        absolute(path), partial(check_unmodified, shown=absolute(path), name="output")
    )
    target = check_target(path, replace=replace, sources=sources, name=name)
    check_replaced = partial(check_unmodified, shown=target, name=name) if replace else None
    with contextlib.ExitStack() as stack:
        try:
            draft = stack.enter_context(files.fresh_directory(target, check_replaced))
        except OSError as error:
            raise ValueError(
                f"{name}={target}: cannot be written: {error}. Choose another directory"
            ) from error
        with _as_value_error(target, name), stack.pop_all():
            yield draft
            write_manifest(draft)


@contextlib.contextmanager
def _as_value_error(target: Path, name: str) -> Iterator[None]:
    try:
        yield
    except FileExistsError as error:
        rule = "another conversion wrote it in the meantime. Choose another directory"
        raise ValueError(f"{name}={target}: {rule}") from error
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{name}={target}: writing failed: {error}. Nothing was left behind; free space or "
            "choose another directory"
        ) from error


def replace_file(target: Path, contents: bytes) -> None:
    """Replaces a file atomically.

    Raises:
        ValueError: it cannot be written; an existing file is unchanged.
    """
    remove_stale_drafts(target, partial(check_unmodified, shown=target, name="output"))
    try:
        with new_file(target, target.with_name(draft_name(target))) as draft:
            draft.write_bytes(contents)
            if target.exists():
                draft.chmod(target.stat().st_mode & 0o777)
        fsync(target.parent)
    except OSError as error:
        raise ValueError(
            f"output={target}: cannot be written: {error}. Free space, or copy the directory to "
            "a place with write permission"
        ) from error


def check_target(
    path: PathLike,
    *,
    replace: bool = False,
    sources: Sequence[PathLike] = (),
    name: str = "output",
) -> Path:
    """The absolute path of an output directory. Raises `ValueError` if it may not be written."""
    check_path(name, path)
    rule = "conversions write to local directories"
    check("://" not in str(path), name, str(path), rule, "Write here and copy the result")
    target = absolute(path)
    is_file = os.path.lexists(target) and not target.is_dir()
    check(not is_file, name, str(target), "exists and is a file", "Choose another directory")
    if target.is_dir() and any(target.iterdir()):
        rule = "exists and is not empty"
        converted = (target / MANIFEST).is_file()
        overwrite = ", or pass --overwrite to replace the earlier conversion" if converted else ""
        fix = f"Choose another directory{overwrite}"
        check(replace, name, str(target), rule, fix)
        _check_replaceable(target, [absolute(source) for source in sources], name)
    parent = next(part for part in (target.parent, *target.parents) if part.exists())
    check(parent.is_dir(), name, str(target), f"{parent} is a file", "Choose another directory")
    rule = f"no permission to write in {parent}, or it is read-only"
    writable = os.access(parent, os.W_OK | os.X_OK, effective_ids=True)
    check(writable, name, str(target), rule, "Choose another directory")
    return target


def _check_replaceable(target: Path, sources: Sequence[Path], name: str) -> None:
    # Names that are not paths (of the hub, `bytes`) cannot conflict.
    for source in filter(Path.exists, sources):
        rule = f"is {source}, which is a source of the conversion, or lies around or inside it"
        apart = target != source and target not in source.parents and source not in target.parents
        check(apart, name, str(target), rule, "Choose another directory")
    rule = "contains the checkpoints of a run, which are never replaced"
    fix = "Choose another directory, or delete this one yourself"
    check(not (target / "checkpoints").exists(), name, str(target), rule, fix)
    check_unmodified(target, target, name, quick=True)


def absolute(path: PathLike) -> Path:
    """The absolute path with links resolved and `~` expanded."""
    return Path(os.path.expanduser(path)).resolve()
