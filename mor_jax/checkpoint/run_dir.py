"""The directory of a run: its configuration, its lock, and which settings may change on resume.

`config.json` holds the resolved configuration. A run with a different configuration is rejected
before anything is written, because weights, optimiser state and data position would not match. A
second job on the same directory is rejected too (`lock_run_dir`). A directory with imported weights
(`pretrained.py`) has a configuration before its first run: until there is a checkpoint, only the
settings that define those weights and their tokens are fixed.
"""

import contextlib
import difflib
import functools
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from etils import epath

from mor_jax.checkpoint import checkpointer, pretrained
from mor_jax.checkpoint.run_lock import RunLock, RunLocked
from mor_jax.config import TrainConfig, old_names
from mor_jax.config.parsing import check, fail, flatten_settings
from mor_jax.files import LockHeld, lock, this_process, write_atomic

CONFIG_FILE = "config.json"
LOCK_FILE = "lock"

BRANCH_FILE = "branch.json"
"""Names the run that a branch was forked from, see `mor_jax/training/fork.py`."""

_log = logging.getLogger(__name__)

# Files that a run may create in a directory before it records its configuration there.
_EARLY = {LOCK_FILE, f"{CONFIG_FILE}.draft", "compilation_cache", "hosts", BRANCH_FILE}

# Settings that may change on resume: the number of steps, reports and checkpoints, and how the same
# numbers are computed on the hardware. A trailing dot stands for a whole group.
_FREE = (
    "steps",
    "log.",
    "eval.",
    "checkpoint.",
    "mesh.",
    "sharding.",
    "hosts.",
    "profile.",
    "compilation_cache",
    "data.num_workers",
    "data.prefetch",
    "grad_accum_steps",
    "loss_chunk_size",
    "model.attention",
    "model.remat",
    "optim.max_skipped_steps",
)

# Settings that define imported weights, except those of them that only affect training.
_DEFINING = ("model", "data.tokenizer")
_TRAINING_ONLY = (
    "model.dtype",
    "model.init_std",
    "model.router.z_loss_coeff",
    "model.router.capacity_multiple",
    "model.router.capacity_warmup_steps",
    "model.router.capacity_warmup_stages",
    "model.router.aux_loss_coeff",
    "model.router.balance_loss_coeff",
    "model.router.balance_warmup_steps",
    "model.router.bias_update_rate",
)

# Settings that determine the shapes of the weights.
_SHAPES = (
    *(
        f"model.{name}"
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads")
    ),
    *(f"model.{name}" for name in ("head_dim", "intermediate_size", "sharing", "num_recursions")),
    *(f"model.{name}" for name in ("share_norms", "tie_embeddings")),
    *(f"model.router.{name}" for name in ("kind", "arch", "causal_routing")),
)

_MULTIPLE = "model.router.capacity_multiple"

# Settings that older versions did not have; their runs behaved as the defaults do.
_ADDED_LATER = ("model.rope_scaling", _MULTIPLE)


def resolved_path(directory: epath.PathLike) -> epath.Path:
    """The absolute path of a local directory; the path of an object store unchanged."""
    text, fix = str(directory), "Give a directory, such as runs/mor"
    check(bool(text) and "\0" not in text, "workdir", text, "is not a directory name", fix)
    try:
        if "://" in text:
            path = epath.Path(directory)
            path.exists()
            return path
        local = Path(text).expanduser().resolve()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            local.stat()
    except (OSError, ImportError, RuntimeError) as error:
        # The name is too long, of an unknown user, or of a store that needs another package.
        reason = str(error).partition(": '")[0].rstrip(".")
        fail("workdir", text, f"cannot be used: {reason}", "Choose another --workdir")
    return epath.Path(local)


class Change(NamedTuple):
    """A setting that differs from the run's last start, with both values as text."""

    setting: str
    old: str
    new: str


def check_workdir(
    workdir: epath.PathLike, cfg: TrainConfig, allow: Sequence[str] = ()
) -> list[Change] | None:
    """Checks that `cfg` may run in `workdir`: returns None if it is new, else the allowed changes.

    allow: settings (`optim.lr`) or groups (`optim`) that may differ from the run in `workdir`, in
    addition to those that every run may change, which are not returned. Writes nothing. Raises
    `ValueError` if `workdir` is a file, not a run directory, not writable, or holds a run whose
    configuration differs in other settings; the message lists each of them with both values.
    """
    path = epath.Path(workdir)
    _check_names(allow, cfg)
    _check_writable(path)
    if not path.exists():
        return None
    if not path.is_dir():
        raise ValueError(f"workdir={path}: must be a directory, is a file. Choose another")
    if {entry.name for entry in path.iterdir()} <= _EARLY:
        return None
    differing = _differences(_read(path), to_plain(cfg))
    if unused := pretrained.present(path) and not checkpointer.any_complete(path):
        differing = [change for change in differing if _defines_weights(change.setting)]
    rejected = [change for change in differing if not is_within(change.setting, allow)]
    if rejected:
        raise _changes_error(path, rejected, unused)
    return differing


def read_values(workdir: epath.PathLike) -> dict[str, Any] | None:
    """The content of `config.json` in a directory, under current names; None if it does not exist.

    Raises `ValueError` if it is damaged or not of this project.
    """
    path = resolved_path(workdir)
    return _read(path) if (path / CONFIG_FILE).exists() else None


def read_config(workdir: epath.PathLike) -> TrainConfig:
    """The configuration of the run in `workdir`. Raises `ValueError` if there is none."""
    path = resolved_path(workdir)
    rule = f"is not the directory of a run: it has no {CONFIG_FILE}"
    fix = "Give the --workdir of a training run or of an import"
    check((path / CONFIG_FILE).exists(), "workdir", str(path), rule, fix)
    return TrainConfig.from_dict(_read(path))


def _defines_weights(setting: str) -> bool:
    return is_within(setting, _DEFINING) and not is_within(setting, _TRAINING_ONLY)


def _changes_error(path: epath.Path, rejected: Sequence[Change], unused: bool) -> ValueError:
    # unused: there is no run yet, only imported weights.
    content, same = "a run with another configuration", "use the settings of that run"
    end = ", or delete the directory to start over"
    if unused:
        content, end = "imported weights of another model", ""
        same = f"use their settings with --config=from_workdir:{path}"
    free = [change.setting for change in rejected if not is_within(change.setting, _SHAPES)]
    # Changes of shapes are not offered: the checkpoint would not load.
    allowed = f", allow the changes with --allow_changes={','.join(free)}" if free else ""
    return ValueError(
        f"workdir={path}: holds {content}:\n"
        + "".join(f"  {key}: {old} there, {new} now\n" for key, old, new in rejected)
        + f"Choose another --workdir, {same}{allowed}{end}"
    )


def claim_workdir(
    workdir: epath.PathLike, cfg: TrainConfig, allow: Sequence[str] = ()
) -> list[Change] | None:
    """`check_workdir`, then creates the directory and records `cfg` in it. Returns the same."""
    changes = check_workdir(workdir, cfg, allow)
    path = epath.Path(workdir)
    try:
        path.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            write_atomic(path / CONFIG_FILE, json.dumps(to_plain(cfg), indent=2) + "\n")
    except OSError as error:
        raise _not_writable(path, error) from error
    return changes


@contextlib.contextmanager
def lock_run_dir(workdir: epath.PathLike) -> Iterator[Callable[[], None]]:
    """Locks `workdir` for this job inside the block; creates it, and removes it if unclaimed.

    Yields the function that removes it, for a process that ends without leaving the block.

    The lock belongs to the process: the system releases it however the process ends. Object stores
    have no locks; a heartbeat file takes their place. Raises `ValueError`, naming host and process,
    if another job holds the directory.
    """
    path = epath.Path(workdir)
    if jax.process_index() != 0:
        yield _nothing
    elif "://" in str(path):
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(RunLock(path / LOCK_FILE, this_process()))
            except RunLocked as held:
                raise _in_use(path, str(held)) from held
            yield _nothing
    else:
        yield from _lock_local(path)


def _nothing() -> None:
    pass


def _lock_local(path: epath.Path) -> Iterator[Callable[[], None]]:
    local = Path(path)
    folders = (local / "compilation_cache", local, *local.parents)
    created = [folder for folder in folders if not folder.exists()]
    try:
        local.mkdir(parents=True, exist_ok=True)
        file = (local / LOCK_FILE).open("a+")
    except OSError as error:
        raise _not_writable(path, error) from error
    with contextlib.ExitStack() as stack:
        stack.enter_context(file)
        try:
            stack.enter_context(lock(file, this_process()))
        except LockHeld as held:
            raise _in_use(path, str(held)) from held
        except OSError as error:
            _log.warning("%s: cannot be locked (%s): a second job may write to it", path, error)
        undo = functools.partial(_remove_unclaimed, local, created)
        try:
            yield undo
        finally:
            undo()


def _in_use(path: epath.Path, owner: str) -> ValueError:
    return ValueError(
        f"workdir={path}: {owner} is training in it. Wait for that run or "
        "stop it, or choose another --workdir"
    )


def _remove_unclaimed(path: Path, created: list[Path]) -> None:
    # A start that was rejected leaves no trace.
    if (path / CONFIG_FILE).exists():
        return
    with contextlib.suppress(OSError):
        (path / LOCK_FILE).unlink()
        cache = path / "compilation_cache"
        # A cache that existed before is not ours to delete.
        for entry in cache.iterdir() if cache in created and cache.exists() else ():
            entry.unlink()
        for folder in created:
            if folder != cache or cache.exists():
                folder.rmdir()


def _check_writable(path: epath.Path) -> None:
    if "://" in str(path):
        return
    existing = next(part for part in (path, *path.parents) if part.exists())
    if existing.is_dir() and not os.access(existing, os.W_OK | os.X_OK, effective_ids=True):
        raise _not_writable(path, f"no permission to write in {existing}, or it is read-only")


def _not_writable(path: epath.Path, reason: object) -> ValueError:
    return ValueError(f"workdir={path}: cannot be written: {reason}. Choose another --workdir")


def to_plain(cfg: TrainConfig) -> dict[str, Any]:
    """The configuration as it reads back from JSON: tuples become lists."""
    return json.loads(json.dumps(cfg.to_dict()))


def _read(path: epath.Path) -> dict[str, Any]:
    file = path / CONFIG_FILE
    rule = "is neither empty nor the directory of a run"
    fix = "Choose an empty or a new directory; nothing in it was changed"
    if not file.exists():
        raise ValueError(f"workdir={path}: {rule} (no {CONFIG_FILE}). {fix}")
    try:
        config = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"workdir={path}: {CONFIG_FILE} is damaged ({error}). {fix}") from error
    if not isinstance(config, dict) or not {"model", "optim", "data"} <= config.keys():
        raise ValueError(f"workdir={path}: {rule} ({CONFIG_FILE} is not of a run). {fix}")
    return old_names.translated(config)


def differences(old: TrainConfig, new: TrainConfig) -> list[Change]:
    """Settings of `new` that differ from `old`, except those that every run may change."""
    return _differences(to_plain(old), to_plain(new))


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[Change]:
    before, after = flatten_settings(old), flatten_settings(new)
    defaults = flatten_settings(to_plain(TrainConfig()))
    added = {key: value for key, value in defaults.items() if is_within(key, _ADDED_LATER)}
    before = added | before
    for side in (before, after):
        # Where it is not set, capacities were not rounded.
        side[_MULTIPLE] = side.get(_MULTIPLE) or 1
    changes = []
    for key in sorted(before.keys() | after.keys()):
        pair = [repr(side[key]) if key in side else "absent" for side in (before, after)]
        if pair[0] != pair[1] and not is_free(key):
            changes.append(Change(key, *pair))
    return changes


def is_free(setting: str) -> bool:
    """Whether any run may change `setting` on resume because it does not affect the result."""
    return any(setting == name or (name[-1] == "." and setting.startswith(name)) for name in _FREE)


def is_within(setting: str, names: Sequence[str]) -> bool:
    """Whether `setting` is one of `names` or belongs to one of the groups among them."""
    return any(setting == name or setting.startswith(f"{name}.") for name in names)


def _check_names(allow: Sequence[str], cfg: TrainConfig) -> None:
    settings = flatten_settings(to_plain(cfg))
    for name in allow:
        if not any(is_within(setting, [name]) for setting in settings):
            if hint := old_names.rename_hint(name):
                raise ValueError(f"allow_changes={name}: unknown setting. {hint}")
            closest = difflib.get_close_matches(name, settings, n=1, cutoff=0.0)[0]
            raise ValueError(f"allow_changes={name}: unknown setting. Did you mean {closest}?")
