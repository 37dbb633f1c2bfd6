"""The weights of a run, read from its directory without its devices and without disturbing it.

A training job may be at work in the directory meanwhile: nothing is locked and nothing is written.
"""

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from etils import epath

from mor_jax import data, initial, metrics, workdir
from mor_jax.checkpoint import Checkpoints, any_complete
from mor_jax.config import CheckpointConfig, TrainConfig, fail
from mor_jax.convert.lazy import Lazy, Spec
from mor_jax.convert.names import array_shapes, entries


@dataclasses.dataclass(frozen=True)
class RunSource:
    """A run as a conversion sees it.

    step: of the checkpoint; 0 for the weights that the run was given to start from. params: by
    dotted path, float32. tokenizer: None if imported weights came without. source: where weights
    that were imported came from, else None. evaluated: the last evaluation that the run logged at
    or before `step`, else empty.
    """

    cfg: TrainConfig
    step: int
    params: Lazy
    tokenizer: data.Tokenizer | None
    source: dict[str, Any] | None
    evaluated: dict[str, Any]


def open_run(directory: epath.PathLike, step: int | None = None) -> RunSource:
    """The newest good checkpoint of a run, or that of `step`; else the weights it starts from.

    Every file is read through once, so that damage is found before anything is converted.

    Raises:
        ValueError: no run is there, no checkpoint is good, `step` is not there, or the tokenizer
            has gone.
    """
    path = workdir.resolved(directory)
    file = path / workdir.CONFIG_FILE
    if not file.exists():
        rule = f"is not the directory of a run: it has no {workdir.CONFIG_FILE}"
        fail("workdir", str(path), rule, "Give the --workdir of a training run or of an import")
    cfg = TrainConfig.from_dict(json.loads(file.read_text()))
    given = initial.present(path)
    if given and step in (None, 0) and not any_complete(path):
        facts = initial.verify(path, cfg.model)
        found, source = 0, facts["source"]
        params = _lazy(cfg, str(path / initial.DIRECTORY), partial(initial.array, path))
    else:
        checkpoints = Checkpoints(path, CheckpointConfig())
        facts = checkpoints.facts(step)
        checkpoints.close()
        # What is computed, not how: the model as it was when the checkpoint was written.
        cfg = TrainConfig.from_dict(facts["config"])
        found = facts["step"]
        source = initial.facts(path)["source"] if given else None
        where = f"{path} at step {found}"
        params = _lazy(cfg, where, checkpoints.parts(found).read)
    tokenizer = None
    if found or source is None or source["tokenizer"] is not None:
        tokenizer = data.load_tokenizer(cfg.data.tokenizer)
        data.check_vocabulary(tokenizer, cfg.model.vocab_size)
    return RunSource(cfg, found, params, tokenizer, source, _evaluated(path, found))


def _lazy(cfg: TrainConfig, where: str, part: Callable[..., np.ndarray]) -> Lazy:
    # part: name, and an index of the leading axes or nothing.
    shapes = array_shapes(cfg.model, entries(cfg.model))
    return Lazy(where, {name: Spec(shape) for name, shape in shapes.items()}, part, part)


def _evaluated(path: epath.Path, step: int) -> dict[str, Any]:
    file = path / "metrics.jsonl"
    records = metrics.read(file) if file.exists() else []
    told = [r for r in records if "eval/loss_causal" in r and r["step"] <= step]
    if not told:
        return {}
    return {name.removeprefix("eval/"): value for name, value in told[-1].items()}
