"""Loads the weights of a run for evaluation, generation and serving.

Takes no lock and writes nothing, so the run may be training at the same time.
"""

import dataclasses
from typing import Any

import jax
from etils import epath

from mor_jax.checkpoint import pretrained, run_dir
from mor_jax.checkpoint.checkpointer import Checkpointer, any_complete, complete_steps
from mor_jax.config import CheckpointConfig, TrainConfig
from mor_jax.config.parsing import check
from mor_jax.models.params import abstract_params
from mor_jax.types import Params


@dataclasses.dataclass(frozen=True)
class RunWeights:
    """The location of valid weights of a run.

    cfg: the run's configuration when the weights were written. step: 0 for imported initial
    weights. source: the origin of imported weights, otherwise None.
    """

    path: epath.Path
    cfg: TrainConfig
    step: int
    source: dict[str, Any] | None

    def __str__(self) -> str:
        """`runs/mor, step 200` or `runs/smollm2, imported weights of a/model`."""
        weights = f"step {self.step}" if self.step else pretrained.origin(self.path)
        return f"{self.path}, {weights}"

    @property
    def name(self) -> str:
        """`str(self)` without the parent directory, for titles."""
        return str(self).removeprefix(f"{self.path.parent}/")

    def changes(self, recursions: int, calibration: str | None) -> str:
        """How inference differs from training: `, 2 recursions instead of 3, calibration fast`."""
        trained = self.cfg.model.num_recursions
        text = f", {recursions} recursions instead of {trained}" if recursions != trained else ""
        return f"{text}, calibration {calibration}" if calibration else text

    def check(self) -> None:
        """Verifies the checksum of every file. Raises `ValueError` if one is damaged."""
        if self.step == 0:
            pretrained.verify(self.path, self.cfg.model)
        else:
            _facts(self.path, self.step)

    def params(self, shardings: Params | None = None) -> Params:
        """The parameters, without optimiser state; each process reads only its shards.

        shardings: one per parameter; by default all go to the first device. Raises `ValueError` if
        a file cannot be read.
        """
        abstract = abstract_params(self.cfg.model)
        if shardings is not None:
            abstract = jax.tree.map(_with_sharding, abstract, shardings)
        if self.step == 0:
            return pretrained.load(self.path, abstract)
        checkpoints = Checkpointer(self.path, CheckpointConfig())
        try:
            return checkpoints.parameters(abstract, self.step)
        finally:
            checkpoints.close()


def load_run(
    directory: epath.PathLike, step: int | None = None, *, sums: bool = True
) -> RunWeights:
    """The newest valid checkpoint of a run, or that of `step`; otherwise its imported weights.

    sums: verify the checksum of every file, which reads them once; otherwise only file sizes, and
    `RunWeights.check` verifies the checksums.

    Raises:
        ValueError: `directory` is not a run, it has no weights yet, all of them or those of `step`
            are damaged, or `step` does not exist.
    """
    path = run_dir.resolved_path(directory)
    cfg = run_dir.read_config(path)
    is_imported = pretrained.present(path)
    if is_imported and step in (None, 0) and not any_complete(path):
        return RunWeights(path, cfg, 0, pretrained.verify(path, cfg.model, sums=sums)["source"])
    facts = _facts(path, step, sums)
    cfg = TrainConfig.from_dict(facts["config"])
    source = pretrained.facts(path)["source"] if is_imported else None
    return RunWeights(path, cfg, facts["step"], source)


def _facts(path: epath.Path, step: int | None, sums: bool = True) -> dict[str, Any]:
    steps = complete_steps(path)
    rule = f"there is no complete checkpoint of this step in {path}; complete: {steps or 'none'}"
    check(step is None or step in steps, "step", step, rule, "Omit it to use the newest")
    checkpoints = Checkpointer(path, CheckpointConfig())
    try:
        return checkpoints.facts(step, sums=sums)
    finally:
        checkpoints.close()


def _with_sharding(
    leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding
) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


__all__ = ["RunWeights", "load_run"]
