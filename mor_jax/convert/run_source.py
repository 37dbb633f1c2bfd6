"""The weights of a run, read from its directory without its devices and without disturbing it.

A training job may be at work in the directory meanwhile: nothing is locked and nothing is written.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

from etils import epath

from mor_jax import data
from mor_jax.checkpoint import pretrained
from mor_jax.checkpoint.checkpointer import Checkpointer
from mor_jax.checkpoint.lazy_arrays import ArraySpec, LazyArrays
from mor_jax.checkpoint.load_weights import load_run
from mor_jax.config import CheckpointConfig, TrainConfig
from mor_jax.config.parsing import check
from mor_jax.convert.names import array_shapes, entries
from mor_jax.observability import metrics


@dataclasses.dataclass(frozen=True)
class RunSource:
    """A run as a conversion sees it.

    path: its directory. step: of the checkpoint; 0 for the weights that the run was given to start
    from. params: by dotted path, float32. tokenizer: None if imported weights came without. source:
    where weights that were imported came from, else None. evaluated: the last evaluation that the
    run logged at or before `step`, else empty. check: reads all files through once and raises
    `ValueError` if one is damaged; takes as long as a conversion, so both go on at one time.
    """

    path: epath.Path
    cfg: TrainConfig
    step: int
    params: LazyArrays
    tokenizer: data.Tokenizer | None
    source: dict[str, Any] | None
    evaluated: dict[str, Any]
    check: Callable[[], None]


def open_run(directory: epath.PathLike, step: int | None = None) -> RunSource:
    """The newest good checkpoint of a run, or that of `step`; else the weights it starts from.

    Raises:
        ValueError: no run is there, no checkpoint is good, `step` is not there, or the tokenizer
            has gone.
    """
    found = load_run(directory, step, sums=False)
    cfg, path = found.cfg, found.path
    part = partial(pretrained.array, path)
    if found.step:
        checkpoints = Checkpointer(path, CheckpointConfig())
        part = checkpoints.partial_restore(found.step).read
        checkpoints.close()
    shapes = array_shapes(cfg.model, entries(cfg.model))
    specs = {name: ArraySpec(shape) for name, shape in shapes.items()}
    params = LazyArrays(str(found), specs, part, part)
    tokenizer = None
    if found.step or found.source is None or found.source.get("tokenizer"):
        tokenizer = data.load_tokenizer(_place(path, cfg.data.tokenizer))
        data.check_vocabulary(tokenizer, cfg.model.vocab_size)
    evaluated = _evaluated(path, found.step)
    return RunSource(path, cfg, found.step, params, tokenizer, found.source, evaluated, found.check)


def _place(path: epath.Path, name: str) -> str:
    # A run that was moved still has the tokenizer that it was imported with.
    if name == "bytes" or epath.Path(name).expanduser().exists():
        return name
    own = path / "tokenizer"
    rule = "the tokenizer of this run is not there any more"
    check(own.is_dir(), "data.tokenizer", name, rule, f"Put it back, or its files into {own}")
    return str(own)


def _evaluated(path: epath.Path, step: int) -> dict[str, Any]:
    file = path / "metrics.jsonl"
    records = metrics.read(file) if file.exists() else []
    told = [r for r in records if "eval/loss_causal" in r and r["step"] <= step]
    if not told:
        return {}
    return {name.removeprefix("eval/"): value for name, value in told[-1].items()}
