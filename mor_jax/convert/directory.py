"""Directories and files that are either whole or as before: written beside, then renamed."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from safetensors import SafetensorError

from mor_jax import files
from mor_jax.config.parsing import check
from mor_jax.convert.marker import MARKER, check_ours, write_marker
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
    """Yields an empty directory beside `path`; on leaving it is made durable and renamed to `path`.

    When the block raises, or the process is killed, `path` is as before; what was written lies in
    `.partial-NAME-...` beside it at the most, and the next conversion to `path` removes it.
    replace: what an earlier conversion made there gives way, once the new one is complete; not
    what is one of `sources`, or in the way of one, and nothing that was added or changed since.
    name: of the setting that `path` is, for messages.

    Raises:
        ValueError: `path` exists and may not be replaced, or cannot be written.
    """
    check_path(name, path)
    remove_stale_drafts(absolute(path), partial(check_ours, shown=absolute(path), name="output"))
    target = check_target(path, replace=replace, sources=sources, name=name)
    check_replaced = partial(check_ours, shown=target, name=name) if replace else None
    with contextlib.ExitStack() as stack:
        try:
            draft = stack.enter_context(files.fresh_directory(target, check_replaced))
        except OSError as error:
            raise ValueError(
                f"{name}={target}: cannot be written: {error}. Choose another directory"
            ) from error
        with _explained(target, name), stack.pop_all():
            yield draft
            write_marker(draft)


@contextlib.contextmanager
def _explained(target: Path, name: str) -> Iterator[None]:
    try:
        yield
    except FileExistsError as error:
        rule = "was written by another conversion meanwhile. Choose another directory"
        raise ValueError(f"{name}={target}: {rule}") from error
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{name}={target}: writing failed: {error}. Nothing was left there; free space or "
            "choose another directory"
        ) from error


def replace_file(target: Path, contents: bytes) -> None:
    """Writes a file that is the old one, if there was one, or the new one at any time.

    Raises:
        ValueError: it cannot be written; what was there is there.
    """
    remove_stale_drafts(target, partial(check_ours, shown=target, name="output"))
    try:
        with new_file(target, target.with_name(draft_name(target))) as draft:
            draft.write_bytes(contents)
            if target.exists():
                draft.chmod(target.stat().st_mode & 0o777)
        fsync(target.parent)
    except OSError as error:
        raise ValueError(
            f"output={target}: cannot be written: {error}. Free space, or copy the directory to "
            "where it may be written"
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
    taken = os.path.lexists(target) and not target.is_dir()
    check(not taken, name, str(target), "exists and is a file", "Choose another directory")
    if target.is_dir() and any(target.iterdir()):
        rule = "exists and is not empty"
        listed = (target / MARKER).is_file()
        or_so = ", or give --overwrite to replace what a conversion made" if listed else ""
        fix = f"Choose another directory{or_so}"
        check(replace, name, str(target), rule, fix)
        _check_replaceable(target, [absolute(source) for source in sources], name)
    there = next(part for part in (target.parent, *target.parents) if part.exists())
    check(there.is_dir(), name, str(target), f"{there} is a file", "Choose another directory")
    rule = f"no permission to write in {there}, or it is read-only"
    writable = os.access(there, os.W_OK | os.X_OK, effective_ids=True)
    check(writable, name, str(target), rule, "Choose another directory")
    return target


def _check_replaceable(target: Path, sources: Sequence[Path], name: str) -> None:
    # Names that are no paths (of the hub, `bytes`) cannot be in the way.
    for source in filter(Path.exists, sources):
        rule = f"is {source}, which is read, or lies around or inside of it"
        apart = target != source and target not in source.parents and source not in target.parents
        check(apart, name, str(target), rule, "Choose another directory")
    rule = "holds the checkpoints of a run, which are not replaced"
    fix = "Choose another directory, or delete this one yourself"
    check(not (target / "checkpoints").exists(), name, str(target), rule, fix)
    check_ours(target, target, name, quick=True)


def absolute(path: PathLike) -> Path:
    """The path from the root, without links; `~` is the home directory."""
    return Path(os.path.expanduser(path)).resolve()
