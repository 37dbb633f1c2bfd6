"""Checkpoints: saving, verification and restore.

Each step has a directory under `<workdir>/checkpoints`. It holds `arrays/`, which orbax writes in
the background and can read without this project (nested dictionaries of arrays), and
`manifest.json`, written last: step, data position and fingerprint, resolved configuration,
parameter count, the shape and dtype of every array and the size and CRC-32 of every file. While a
directory is being written or deleted it holds a file `incomplete`, which distinguishes an
interrupted save from a damaged checkpoint.

This is the only module that uses orbax.
"""

import concurrent.futures
import errno
import logging
import os
import shutil
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from mor_jax.checkpoint import manifest
from mor_jax.checkpoint.partial_restore import PartialRestore
from mor_jax.config import CheckpointConfig

DIRECTORY = "checkpoints"

INCOMPLETE = "incomplete"
"""A file in the directory of a step that is being written or deleted."""

HUNG = 1200.0
"""Seconds after which an unfinished save counts as failed."""

_LARGE = 1 << 26
_NONE, _DAMAGED = -1, -2
_log = logging.getLogger(__name__)


class WriteFailed(RuntimeError):
    """A checkpoint could not be written; the message gives the cause and the last complete one."""


class DiskFull(WriteFailed):
    """A checkpoint could not be written because the disk is full."""


class Restored(NamedTuple):
    """The content of a checkpoint. `state` has the requested structure and sharding."""

    state: dict[str, Any]
    position: int
    config: dict[str, Any]
    step: int
    extra: dict[str, Any]


def any_complete(workdir: epath.PathLike) -> bool:
    """Whether `workdir` has a completed checkpoint, valid or damaged."""
    return bool(complete_steps(workdir))


def step_directory(workdir: epath.PathLike, step: int) -> epath.Path:
    """The directory of the checkpoint of a step, whether it exists or not."""
    return epath.Path(workdir) / DIRECTORY / f"{step:08d}"


def complete_steps(workdir: epath.PathLike) -> list[int]:
    """Steps of the completed checkpoints in `workdir`, ascending, valid or damaged."""
    root = epath.Path(workdir) / DIRECTORY
    steps = [path for path in root.iterdir() if path.name.isdigit()] if root.exists() else []
    return sorted(int(path.name) for path in steps if not (path / INCOMPLETE).exists())


class Checkpointer:
    """The checkpoints of one run. Every process of the run creates one and makes the same calls.

    Saves run in the background, one at a time; the next call of `save`, `wait` or `close` raises
    their failure. Retention: the newest `cfg.max_to_keep` complete steps, multiples of
    `cfg.keep_period` and the steps in `cfg.keep_steps`. An old checkpoint is deleted only after a
    newer one is complete.
    """

    def __init__(self, workdir: epath.PathLike, cfg: CheckpointConfig, *, merged: bool = True):
        """merged: store all arrays in few files (OCDBT) instead of at least one file per array."""
        self._workdir, self._root = workdir, epath.Path(workdir) / DIRECTORY
        self._cfg = cfg
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: concurrent.futures.Future[None] | None = None
        self._current: int | None = None
        self._merged = merged
        # Import orbax in the background, while the training step compiles.
        self._thread.submit(_orbax)

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def save(
        self,
        step: int,
        state: dict[str, Any],
        position: int,
        config: dict[str, Any],
        extra: dict[str, Any] | None = None,
    ) -> None:
        """Starts writing `state`; returns once the arrays may be donated or overwritten.

        state: nested dictionaries of arrays with the parameters under `params`.
        position: index of the next sequence of the data. config: the resolved configuration.
        extra: further JSON values, such as those that `resume.py` needs.
        Does nothing for the step saved or restored last. Raises `WriteFailed` if this save cannot
        start or the previous one failed.
        """
        self.wait()
        if step == self._current:
            return
        facts = {
            "step": int(step),
            "position": int(position),
            "parameters": manifest.count_parameters(state["params"]),
            "bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(state)),
            "config": config,
            "extra": extra or {},
            "arrays": manifest.describe(state),
        }
        try:
            self._begin(step)
            with _context(self._merged):
                response = _orbax().save_async(self._path(step) / "arrays", state)
        except Exception as error:
            raise self._failed(facts, error) from error
        self._current = step
        self._pending = self._thread.submit(self._finish, response, facts)

    def wait(self) -> None:
        """Blocks until the pending save is done. Raises `WriteFailed` if it failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            try:
                pending.result(HUNG)
            except concurrent.futures.TimeoutError as error:
                place = f"{self._path(self._current or 0)}: writing failed"
                raise WriteFailed(f"{place}: not done after {HUNG:.0f} s") from error

    def close(self) -> None:
        """`wait`, then ends the background thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def latest_valid(self, before: int | None = None, *, sums: bool = True) -> int | None:
        """The newest step whose files are all undamaged; None if no checkpoint exists.

        before: considers only earlier steps. sums: compare CRC-32 sums; otherwise file sizes only,
        which reads no data. Logs a warning for each damaged checkpoint that it skips.
        Raises `ValueError` if checkpoints exist and all are damaged, so that a run never silently
        restarts from step 0.
        """
        self.wait()
        newest = self._newest(before, sums) if jax.process_index() == 0 else _NONE
        if jax.process_count() > 1:
            newest = int(multihost_utils.broadcast_one_to_all(np.int32(newest)))
        if newest == _DAMAGED:
            raise ValueError(
                f"{self._root}: every checkpoint is damaged (the log says how). "
                "Restore the files, or delete this directory to start the run over"
            )
        return None if newest == _NONE else newest

    def restore(self, abstract_state: Any, step: int | None = None) -> Restored:
        """Restores a checkpoint, by default the newest valid one; bitwise identical to the save.

        abstract_state: a tree of `jax.ShapeDtypeStruct`; arrays get its shardings, whatever
        devices wrote the checkpoint. Raises `ValueError` if there is no checkpoint, if the
        requested step is damaged, or if its arrays differ from `abstract_state` (the message lists
        each difference).
        """
        facts = self.facts(step)
        path = self._path(facts["step"])
        manifest.check_arrays(facts, abstract_state, path)
        with _context(self._merged):
            state = _orbax().load(path / "arrays", jax.tree.map(_placed, abstract_state))
        self._current = facts["step"]
        return Restored(state, facts["position"], facts["config"], facts["step"], facts["extra"])

    def facts(self, step: int | None = None, *, sums: bool = True) -> dict[str, Any]:
        """The manifest of a checkpoint, by default the newest valid one, after verifying its files.

        sums: as for `latest_valid`. Raises `ValueError` if there is no checkpoint, or if the
        requested step is damaged.
        """
        if step is None:
            step = self.latest_valid(sums=sums)
        elif problem := self._problem(step, sums):
            raise ValueError(f"{self._path(step)}: {problem}. Complete steps: {self._steps()}")
        if step is None:
            raise ValueError(f"{self._root}: holds no checkpoint. Train with this workdir first")
        return manifest.read(self._path(step))

    def parameters(self, abstract: Any, step: int) -> Any:
        """All or some parameters, without the rest of the state; bitwise identical to the save.

        abstract: the parameter tree, or a part of it, as `jax.ShapeDtypeStruct`s; arrays get its
        shardings. Does not verify the files: call `facts` once before any number of these calls.
        Raises `ValueError` if the parameters of the checkpoint differ from `abstract`.
        """
        path = self._path(step)
        manifest.check_parameters(manifest.read(path), abstract, path)
        context = _context(self._merged)
        context.pytree.loading.partial_load = True
        with context:
            requested = {"params": jax.tree.map(_placed, abstract)}
            return _orbax().load(path / "arrays", requested)["params"]

    def partial_restore(self, step: int) -> PartialRestore:
        """Reads parameters layer by layer. Does not verify the files, as for `parameters`."""
        return PartialRestore(self._path(step) / "arrays")

    def _path(self, step: int) -> epath.Path:
        return step_directory(self._workdir, step)

    def _all_steps(self) -> list[int]:
        # Every step that has a directory, complete or not, oldest first.
        names = [path.name for path in self._root.iterdir()] if self._root.exists() else []
        return sorted(int(name) for name in names if name.isdigit())

    def _steps(self) -> list[int]:
        return complete_steps(self._workdir)

    def _newest(self, before: int | None, sums: bool) -> int:
        steps = [step for step in self._steps() if before is None or step < before]
        for step in reversed(steps):
            problem = self._problem(step, sums)
            if problem is None:
                return step
            _log.warning("CHECKPOINT DAMAGED, PASSED OVER: %s: %s", self._path(step), problem)
        return _DAMAGED if steps else _NONE

    def _problem(self, step: int, sums: bool = True) -> str | None:
        # None if the checkpoint is valid, otherwise what is wrong with it.
        path = self._path(step)
        if step not in self._steps():
            return "there is no complete checkpoint of this step"
        try:
            manifest.verify(manifest.read(path), path / "arrays", sums=sums)
        except manifest.Damaged as error:
            return str(error)
        return None

    def _begin(self, step: int) -> None:
        # Anything left at this step is an interrupted save or was skipped as damaged.
        if jax.process_index() == 0:
            self._delete(step)
            self._path(step).mkdir(parents=True)
            (self._path(step) / INCOMPLETE).write_text("")
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"checkpoint {step}")

    def _finish(self, response: Any, facts: dict[str, Any]) -> None:
        path = self._path(facts["step"])
        try:
            response.result()
            if jax.process_index() == 0:
                manifest.write(path, facts, path / "arrays")
                (path / INCOMPLETE).unlink()
                self._prune(facts["step"])
        except Exception as error:
            raise self._failed(facts, error) from error

    def _failed(self, facts: dict[str, Any], error: Exception) -> WriteFailed:
        step = facts["step"]
        if jax.process_index() == 0:
            self._delete(step)
        steps = self._steps()
        last = (
            f"The last complete checkpoint, step {steps[-1]}, is intact"
            if steps
            else "There is no earlier checkpoint"
        )
        kind = WriteFailed
        cause, fix = f"{type(error).__name__}: {error}", "Run the same command again to resume"
        if _disk_full(error):
            kind = DiskFull
            free = shutil.disk_usage(self._root).free
            sizes = f"{facts['bytes'] / 2**20:.1f} MiB to write, {free / 2**20:.1f} MiB free"
            cause = f"no space left on the disk ({sizes})"
            fix = "Free space or lower checkpoint.max_to_keep, then run the same command again"
        return kind(f"{self._path(step)}: writing failed: {cause}. {last}. {fix}")

    def _prune(self, newest: int) -> None:
        complete = self._steps()
        latest = [step for step in complete if step <= newest][-self._cfg.max_to_keep :]
        period, keep_steps = self._cfg.keep_period, self._cfg.keep_steps
        for step in self._all_steps():
            if step > newest:
                # The run resumed from an earlier step, so this checkpoint is not of its history.
                _log.warning("removing %s: the run resumed from an earlier step", self._path(step))
            elif step in latest or (
                step in complete and (step in keep_steps or (period and step % period == 0))
            ):
                continue
            self._delete(step)

    def _delete(self, step: int) -> None:
        path = self._path(step)
        if path.exists():
            (path / INCOMPLETE).touch()
            path.rmtree()


def _orbax() -> Any:
    # Imported late: it takes a third of a second, which overlaps with compilation.
    import orbax.checkpoint.experimental.v1 as ocp

    logger = logging.getLogger("absl")
    if _not_orbax_error not in logger.filters:
        logger.addFilter(_not_orbax_error)
    return ocp


def _not_orbax_error(record: logging.LogRecord) -> bool:
    # Orbax logs the errors of its threads at length and raises them as well.
    return record.levelno < logging.ERROR or "orbax" not in record.pathname


def _context(merged: bool) -> Any:
    context = _orbax().Context()
    context.array.saving.use_ocdbt = merged
    # Compressing trained float32 weights saves 8% of the space and takes four times as long.
    context.array.saving.use_compression = False
    context.array.saving.scoped_storage_options_creator = _chunk_by_layer
    # Orbax's timeout uses the wall clock, so a clock change could fail a save; `wait` has our own.
    context.async_options.timeout_secs = 10**6
    context.async_options.create_directories_asynchronously = False
    return context


def _chunk_by_layer(_: Any, leaf: Any) -> Any:
    """Stores large stacked arrays in one chunk per layer.

    Reading one layer then reads only its bytes (`PartialRestore`).
    """
    if leaf.ndim < 3 or leaf.nbytes <= _LARGE:
        return None
    options = _orbax().options.ArrayOptions.Saving.StorageOptions
    return options(chunk_byte_size=_LARGE, shard_axes=(0,))


def _placed(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _disk_full(error: BaseException | None) -> bool:
    # The storage library reports the system's error as text, without its number.
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    texts = [os.strerror(number) for number in numbers]
    while error is not None:
        in_message = any(text in str(error) for text in texts)
        if getattr(error, "errno", None) in numbers or in_message:
            return True
        error = error.__cause__ or error.__context__
    return False
