"""The weights of a run for whoever uses them: evaluation, generation, serving.

A training job may be at work in the directory meanwhile: nothing is locked, nothing is written.
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
    """Weights that are there and whole. step: 0 for those that a run was given to start from.

    cfg: of the run as it was when they were written. source: where weights that were imported
    came from, else None.
    """

    path: epath.Path
    cfg: TrainConfig
    step: int
    source: dict[str, Any] | None

    def __str__(self) -> str:
        """`runs/mor, step 200` or `runs/smollm2, imported weights of a/model`."""
        what = f"step {self.step}" if self.step else pretrained.origin(self.path)
        return f"{self.path}, {what}"

    @property
    def name(self) -> str:
        """The same without the path of the directory, for titles."""
        return str(self).removeprefix(f"{self.path.parent}/")

    def changes(self, recursions: int, calibration: str | None) -> str:
        """`, 2 recursions in place of 3, calibration fast`: what makes it another than trained."""
        there = self.cfg.model.num_recursions
        told = f", {recursions} recursions in place of {there}" if recursions != there else ""
        return f"{told}, calibration {calibration}" if calibration else told

    def check(self) -> None:
        """Reads every file through once. Raises `ValueError` if one is not as it was written."""
        if self.step == 0:
            pretrained.verify(self.path, self.cfg.model)
        else:
            _facts(self.path, self.step)

    def params(self, shardings: Params | None = None) -> Params:
        """The parameters, without optimiser or gradients; every process reads its part.

        shardings: one for each parameter; by default all go to the first device. Raises
        `ValueError` if a file cannot be read.
        """
        abstract = abstract_params(self.cfg.model)
        if shardings is not None:
            abstract = jax.tree.map(_with, abstract, shardings)
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
    """The newest good checkpoint of a run, or that of `step`; else the weights it starts from.

    Every file is read through once, so that damage shows before anything is done with them; without
    `sums` that is left to `Found.check`.

    Raises:
        ValueError: no run is there, it has no weights yet, none are good, or not those of `step`.
    """
    path = run_dir.resolved_path(directory)
    cfg = run_dir.read_config(path)
    given = pretrained.present(path)
    if given and step in (None, 0) and not any_complete(path):
        return RunWeights(path, cfg, 0, pretrained.verify(path, cfg.model, sums=sums)["source"])
    facts = _facts(path, step, sums)
    cfg = TrainConfig.from_dict(facts["config"])
    source = pretrained.facts(path)["source"] if given else None
    return RunWeights(path, cfg, facts["step"], source)


def _facts(path: epath.Path, step: int | None, sums: bool = True) -> dict[str, Any]:
    there = complete_steps(path)
    rule = f"there is no complete checkpoint of this step in {path}; complete are {there or 'none'}"
    check(step is None or step in there, "step", step, rule, "Leave it out for the newest")
    checkpoints = Checkpointer(path, CheckpointConfig())
    try:
        return checkpoints.facts(step, sums=sums)
    finally:
        checkpoints.close()


def _with(leaf: jax.ShapeDtypeStruct, where: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)


__all__ = ["RunWeights", "load_run"]
