"""Checkpoints: what is written, when it counts as good, and how a run finds its way back.

One directory a step under `<workdir>/checkpoints`: `arrays/`, written by orbax in the background
and readable with it alone (nested dictionaries of arrays), and `manifest.json`, written last:
step, data position and fingerprint, resolved configuration, parameter count, the shape and dtype
of every array and the size and CRC-32 of every file. While a directory is being written or
deleted it holds a file `incomplete`, so that a killed save is never taken for a damaged one.

This module is the only one that knows orbax.
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
"""Seconds after which a save that does not end counts as failed."""

_LARGE = 1 << 26
_NONE, _DAMAGED = -1, -2
_log = logging.getLogger(__name__)


class WriteFailed(RuntimeError):
    """A checkpoint could not be written; the message says why, and which one is left."""


class DiskFull(WriteFailed):
    """For want of space."""


class Restored(NamedTuple):
    """What a checkpoint gives back. `state` has the structure and placement asked for."""

    state: dict[str, Any]
    position: int
    config: dict[str, Any]
    step: int
    extra: dict[str, Any]


def any_complete(workdir: epath.PathLike) -> bool:
    """Whether a save was ever completed in `workdir`, be its files still good or not."""
    return bool(complete_steps(workdir))


def step_directory(workdir: epath.PathLike, step: int) -> epath.Path:
    """Where the checkpoint of a step is, or would be."""
    return epath.Path(workdir) / DIRECTORY / f"{step:08d}"


def complete_steps(workdir: epath.PathLike) -> list[int]:
    """Steps of the checkpoints in `workdir` that were completed, ascending, be they good or not."""
    root = epath.Path(workdir) / DIRECTORY
    steps = [path for path in root.iterdir() if path.name.isdigit()] if root.exists() else []
    return sorted(int(path.name) for path in steps if not (path / INCOMPLETE).exists())


class Checkpointer:
    """The checkpoints of one run. Every process of the run makes one and calls it alike.

    Saving goes on in the background, one step at a time; a failure there is raised by the next
    call of `save`, `wait` or `close`. Of the complete steps the newest `cfg.keep` stay, the
    multiples of `cfg.keep_every` and those in `cfg.also`; nothing is deleted before a newer one is
    complete.
    """

    def __init__(self, workdir: epath.PathLike, cfg: CheckpointConfig, *, merged: bool = True):
        """merged: few files for all arrays (OCDBT), not one or more for each."""
        self._workdir, self._root = workdir, epath.Path(workdir) / DIRECTORY
        self._cfg = cfg
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: concurrent.futures.Future[None] | None = None
        self._current: int | None = None
        self._merged = merged
        # While the step compiles there is time for it.
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
        position: number of the next row of data. config: the resolved configuration.
        extra: further JSON values, such as what `resume.py` needs.
        Does nothing for the step saved or restored last. Raises `WriteFailed` when this save
        could not start or the previous one failed.
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
        """Blocks until nothing is being written. Raises `WriteFailed` if that save failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            try:
                pending.result(HUNG)
            except concurrent.futures.TimeoutError as error:
                where = f"{self._path(self._current or 0)}: writing failed"
                raise WriteFailed(f"{where}: not done after {HUNG:.0f} s") from error

    def close(self) -> None:
        """`wait`, then ends the background thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def latest_valid(self, before: int | None = None, *, sums: bool = True) -> int | None:
        """The newest step whose files are all as they were written; None if none was ever saved.

        before: looks only at steps below it. sums: compare contents; else sizes alone, which takes
        no time. Logs a warning for each damaged step passed over.
        Raises `ValueError` when there are checkpoints and none is good: a run never starts over by
        itself.
        """
        self.wait()
        found = self._newest(before, sums) if jax.process_index() == 0 else _NONE
        if jax.process_count() > 1:
            found = int(multihost_utils.broadcast_one_to_all(np.int32(found)))
        if found == _DAMAGED:
            raise ValueError(
                f"{self._root}: every checkpoint is damaged (the log says how). "
                "Restore the files, or delete this directory to start the run over"
            )
        return None if found == _NONE else found

    def restore(self, abstract_state: Any, step: int | None = None) -> Restored:
        """Reads a checkpoint, by default the newest good one, bit for bit as it was saved.

        abstract_state: `jax.ShapeDtypeStruct`s; where they carry a sharding, arrays arrive with
        it, whatever devices the checkpoint was written from. Raises `ValueError` if there is no
        checkpoint, if the step asked for is damaged, or if its arrays are not those of
        `abstract_state` (each difference is listed).
        """
        facts = self.facts(step)
        path = self._path(facts["step"])
        manifest.check_arrays(facts, abstract_state, path)
        with _context(self._merged):
            state = _orbax().load(path / "arrays", jax.tree.map(_placed, abstract_state))
        self._current = facts["step"]
        return Restored(state, facts["position"], facts["config"], facts["step"], facts["extra"])

    def facts(self, step: int | None = None, *, sums: bool = True) -> dict[str, Any]:
        """The manifest of a checkpoint, by default the newest good one, once its files are checked.

        sums: as for `latest_valid`. Raises `ValueError` if there is no checkpoint, or if the step
        asked for is damaged.
        """
        if step is None:
            step = self.latest_valid(sums=sums)
        elif problem := self._problem(step, sums):
            raise ValueError(f"{self._path(step)}: {problem}. Complete steps: {self._steps()}")
        if step is None:
            raise ValueError(f"{self._root}: holds no checkpoint. Train with this workdir first")
        return manifest.read(self._path(step))

    def parameters(self, abstract: Any, step: int) -> Any:
        """Parameters without the rest of the state, all or some of them, bit for bit.

        abstract: the parameter tree, or a part of it, as `jax.ShapeDtypeStruct`s; where they carry
        a sharding, arrays arrive with it. Nothing else is read, so the files are not checked:
        `facts` does that, once for any number of calls. Raises `ValueError` if the checkpoint has
        other parameters than `abstract`.
        """
        path = self._path(step)
        manifest.check_parameters(manifest.read(path), abstract, path)
        context = _context(self._merged)
        context.pytree.loading.partial_load = True
        with context:
            wanted = {"params": jax.tree.map(_placed, abstract)}
            return _orbax().load(path / "arrays", wanted)["params"]

    def parts(self, step: int) -> PartialRestore:
        """Reads parameters of a checkpoint layer by layer. As with `parameters`, see `facts`."""
        return PartialRestore(self._path(step) / "arrays")

    def _path(self, step: int) -> epath.Path:
        return step_directory(self._workdir, step)

    def _found(self) -> list[int]:
        # Every step that has a directory, oldest first.
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
        # None if the checkpoint is as it was written, else what is wrong with it.
        path = self._path(step)
        if step not in self._steps():
            return "there is no complete checkpoint of this step"
        try:
            manifest.verify(manifest.read(path), path / "arrays", sums=sums)
        except manifest.Damaged as error:
            return str(error)
        return None

    def _begin(self, step: int) -> None:
        # Whatever is left at this step is of a killed save or was passed over as damaged.
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
        last = f"The last complete one, step {steps[-1]}, is untouched" if steps else "No other yet"
        kind = WriteFailed
        cause, fix = f"{type(error).__name__}: {error}", "Start the same command again to go on"
        if _disk_full(error):
            kind = DiskFull
            free = shutil.disk_usage(self._root).free
            sizes = f"{facts['bytes'] / 2**20:.1f} MiB to write, {free / 2**20:.1f} MiB free"
            cause = f"no space left on the disk ({sizes})"
            fix = "Free space or lower checkpoint.max_to_keep, then start the same command again"
        return kind(f"{self._path(step)}: writing failed: {cause}. {last}. {fix}")

    def _prune(self, newest: int) -> None:
        complete = self._steps()
        kept = [step for step in complete if step <= newest][-self._cfg.max_to_keep :]
        every, also = self._cfg.keep_period, self._cfg.keep_steps
        for step in self._found():
            if step > newest:
                # The run was taken up again before this step: it belongs to a past that is gone.
                _log.warning("removing %s: newer than the run it is in", self._path(step))
            elif step in kept or (
                step in complete and (step in also or (every and step % every == 0))
            ):
                continue
            self._delete(step)

    def _delete(self, step: int) -> None:
        path = self._path(step)
        if path.exists():
            (path / INCOMPLETE).touch()
            path.rmtree()


def _orbax() -> Any:
    # Imported late: loading it takes a third of a second, better spent while the step compiles.
    import orbax.checkpoint.experimental.v1 as ocp

    logger = logging.getLogger("absl")
    if _is_news not in logger.filters:
        logger.addFilter(_is_news)
    return ocp


def _is_news(record: logging.LogRecord) -> bool:
    # The storage library logs the errors of its threads at length and raises them as well.
    return record.levelno < logging.ERROR or "orbax" not in record.pathname


def _context(merged: bool) -> Any:
    context = _orbax().Context()
    context.array.saving.use_ocdbt = merged
    # Compressing trained float32 weights saves 8% of the space and takes four times as long.
    context.array.saving.use_compression = False
    context.array.saving.scoped_storage_options_creator = _cut
    # Its limits are by the wall clock: a day's jump must not fail a save. Ours are in `wait`.
    context.async_options.timeout_secs = 10**6
    context.async_options.create_directories_asynchronously = False
    return context


def _cut(_: Any, leaf: Any) -> Any:
    """Cuts large stacks between their layers.

    Reading one layer then costs one layer (`Parts`).
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
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    texts = [os.strerror(number) for number in full]
    while error is not None:
        told = any(text in str(error) for text in texts)
        if getattr(error, "errno", None) in full or told:
            return True
        error = error.__cause__ or error.__context__
    return False
