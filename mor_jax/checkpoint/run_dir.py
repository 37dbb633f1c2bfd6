"""The directory of a run: whose it is, who works in it, what may change when the run goes on.

`config.json` in it holds the resolved configuration. A command with another one is refused before
anything is written, because weights, optimiser and data position would not belong together. A
second job on the same directory is refused too: `hold` keeps it for one. A directory that a
conversion made, with weights to start from (`initial.py`), has a configuration before its first
run: until there is a checkpoint, only what those weights and their tokens mean stands firm in it.
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
from mor_jax.config.parsing import check, fail, flat
from mor_jax.files import LockHeld, lock, this_process, write_atomic

CONFIG_FILE = "config.json"
LOCK_FILE = "lock"

BRANCH_FILE = "branch.json"
"""Says which run a branch comes from, see `branch.py`."""

_log = logging.getLogger(__name__)

# What a run may leave in a directory before it has recorded its configuration there.
_EARLY = {LOCK_FILE, f"{CONFIG_FILE}.draft", "compilation_cache", "hosts", BRANCH_FILE}

# What a run may change between two starts: how long it runs, what it reports and keeps, and how
# the same numbers are computed on the hardware at hand. A trailing dot stands for a whole group.
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

# What decides on the meaning of weights that were imported, and what of it is only about training.
_MEANING = ("model", "data.tokenizer")
_RECIPE = (
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

# What the shapes of the weights follow from.
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

# Settings that older versions did not have. Their runs did what the defaults say.
_LATER = ("model.rope_scaling", _MULTIPLE)


def resolved_path(directory: epath.PathLike) -> epath.Path:
    """The absolute path of a local directory; that of an object store as it is."""
    text, fix = str(directory), "Give a directory, such as runs/mor"
    check(bool(text) and "\0" not in text, "workdir", text, "is no name of a directory", fix)
    try:
        if "://" in text:
            path = epath.Path(directory)
            path.exists()
            return path
        local = Path(text).expanduser().resolve()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            local.stat()
    except (OSError, ImportError, RuntimeError) as error:
        # A name that is too long, of an unknown user, or of a store that needs something installed.
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
    """None: `workdir` is free. Else what of `cfg` differs from the run there, all of it allowed.

    allow: settings (`optim.lr`) or groups of them (`optim`) that may differ, beside those that
    every run may change; only these are returned. Writes nothing. Raises `ValueError` when
    `workdir` is a file, a directory of something else, not writable, or the directory of a run
    whose configuration differs in more; the message lists every such setting with both values.
    """
    path = epath.Path(workdir)
    _check_names(allow, cfg)
    _check_writable(path)
    if not path.exists():
        return None
    if not path.is_dir():
        raise ValueError(f"workdir={path}: is a file, a run needs a directory. Choose another")
    if {entry.name for entry in path.iterdir()} <= _EARLY:
        return None
    differing = _differences(_read(path), to_plain(cfg))
    if unused := pretrained.present(path) and not checkpointer.any_complete(path):
        differing = [change for change in differing if _is_meaning(change.setting)]
    refused = [change for change in differing if not is_within(change.setting, allow)]
    if refused:
        raise _refusal(path, refused, unused)
    return differing


def read_values(workdir: epath.PathLike) -> dict[str, Any] | None:
    """What `config.json` in a directory says, older settings as they were; None without one.

    Raises `ValueError` if it is damaged or another program's.
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


def _is_meaning(setting: str) -> bool:
    return is_within(setting, _MEANING) and not is_within(setting, _RECIPE)


def _refusal(path: epath.Path, refused: Sequence[Change], unused: bool) -> ValueError:
    # unused: there is no run yet, only imported weights.
    held, giver = "a run of another configuration", "give the settings of that run"
    end = ", or delete the directory to start over"
    if unused:
        held, end = "imported weights of another model", ""
        giver = f"take them from there with --config=configs/from_workdir.py:{path}"
    free = [change.setting for change in refused if not is_within(change.setting, _SHAPES)]
    # Whoever allows a change of shapes is refused later, by the checkpoint.
    meant = f", name those meant in --allow_changes={','.join(free)}" if free else ""
    return ValueError(
        f"workdir={path}: holds {held}:\n"
        + "".join(f"  {key}: {old} there, {new} now\n" for key, old, new in refused)
        + f"Choose another --workdir, {giver}{meant}{end}"
    )


def claim_workdir(
    workdir: epath.PathLike, cfg: TrainConfig, allow: Sequence[str] = ()
) -> list[Change] | None:
    """`check_workdir`, then makes the directory and records `cfg` in it. Returns the same."""
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
    """Keeps `workdir` for this job inside the block; makes it, and takes it back if unclaimed.

    Gives what takes it back, for a process that ends without leaving the block.

    The lock belongs to the process: the system drops it however the process ends. In an object
    store, which knows no locks, signs of life take its place. Raises `ValueError`, naming host and
    process, if another job holds the directory.
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
        yield from _hold_local(path)


def _nothing() -> None:
    pass


def _hold_local(path: epath.Path) -> Iterator[Callable[[], None]]:
    local = Path(path)
    places = (local / "compilation_cache", local, *local.parents)
    made = [part for part in places if not part.exists()]
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
            _log.warning("%s: no locks there (%s): nothing keeps a second job away", path, error)
        undo = functools.partial(_take_back, local, made)
        try:
            yield undo
        finally:
            undo()


def _in_use(path: epath.Path, owner: str) -> ValueError:
    return ValueError(
        f"workdir={path}: {owner} is training in it. Wait for that run or "
        "stop it, or choose another --workdir"
    )


def _take_back(path: Path, made: list[Path]) -> None:
    # A start that was refused leaves things as they were.
    if (path / CONFIG_FILE).exists():
        return
    with contextlib.suppress(OSError):
        (path / LOCK_FILE).unlink()
        cache = path / "compilation_cache"
        # One that was there before is somebody's.
        for entry in cache.iterdir() if cache in made and cache.exists() else ():
            entry.unlink()
        for part in made:
            if part != cache or cache.exists():
                part.rmdir()


def _check_writable(path: epath.Path) -> None:
    if "://" in str(path):
        return
    there = next(part for part in (path, *path.parents) if part.exists())
    if there.is_dir() and not os.access(there, os.W_OK | os.X_OK, effective_ids=True):
        raise _not_writable(path, f"no permission to write in {there}, or it is read-only")


def _not_writable(path: epath.Path, why: object) -> ValueError:
    return ValueError(f"workdir={path}: cannot be written: {why}. Choose another --workdir")


def to_plain(cfg: TrainConfig) -> dict[str, Any]:
    """The configuration as JSON gives it back: tuples become lists."""
    return json.loads(json.dumps(cfg.to_dict()))


def _read(path: epath.Path) -> dict[str, Any]:
    file = path / CONFIG_FILE
    rule = "is not empty and not the directory of a run"
    fix = "Choose an empty or a new directory; nothing in it was changed"
    if not file.exists():
        raise ValueError(f"workdir={path}: {rule} (no {CONFIG_FILE}). {fix}")
    try:
        config = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"workdir={path}: {CONFIG_FILE} is damaged ({error}). {fix}") from error
    if not isinstance(config, dict) or not {"model", "optim", "data"} <= config.keys():
        raise ValueError(f"workdir={path}: {rule} ({CONFIG_FILE} is another program's). {fix}")
    return old_names.translated(config)


def differences(old: TrainConfig, new: TrainConfig) -> list[Change]:
    """What of `new` differs from `old`, but for what every run may change."""
    return _differences(to_plain(old), to_plain(new))


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[Change]:
    before, after = flat(old), flat(new)
    defaults = flat(to_plain(TrainConfig()))
    before = {key: value for key, value in defaults.items() if is_within(key, _LATER)} | before
    for side in (before, after):
        # Where nobody wrote it out, capacities were not rounded.
        side[_MULTIPLE] = side.get(_MULTIPLE) or 1
    found = []
    for key in sorted(before.keys() | after.keys()):
        pair = [repr(side[key]) if key in side else "absent" for side in (before, after)]
        if pair[0] != pair[1] and not is_free(key):
            found.append(Change(key, *pair))
    return found


def is_free(setting: str) -> bool:
    """Whether any run may change `setting` between two starts, as it does not change its result."""
    return any(setting == name or (name[-1] == "." and setting.startswith(name)) for name in _FREE)


def is_within(setting: str, names: Sequence[str]) -> bool:
    """Whether `setting` is one of `names` or in one of the groups that they name."""
    return any(setting == name or setting.startswith(f"{name}.") for name in names)


def _check_names(allow: Sequence[str], cfg: TrainConfig) -> None:
    settings = flat(to_plain(cfg))
    for name in allow:
        if not any(is_within(setting, [name]) for setting in settings):
            if told := old_names.answer(name):
                raise ValueError(f"allow_changes={name}: is no setting. {told}")
            near = difflib.get_close_matches(name, settings, n=1, cutoff=0.0)[0]
            raise ValueError(f"allow_changes={name}: is no setting. Did you mean {near}?")
