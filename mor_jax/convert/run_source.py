"""Reads the weights of a run from its directory, without its devices.

A training job may use the directory at the same time: nothing is locked or written.
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
    """A run as the source of a conversion.

    path: its directory. step: of the checkpoint; 0 for imported initial weights. params: by dotted
    path, float32. tokenizer: None if imported weights came without one. source: origin of imported
    weights, else None. evaluated: the last evaluation that the run logged at or before `step`, else
    empty. check: reads all files once and raises `ValueError` if one is damaged; it takes as long
    as a conversion, so both run concurrently.
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
    """The newest valid checkpoint of a run, or that of `step`; else its initial weights.

    Raises:
        ValueError: `directory` is not a run, it has no valid checkpoint, `step` does not exist, or
            the tokenizer is missing.
    """
    weights = load_run(directory, step, sums=False)
    cfg, path = weights.cfg, weights.path
    part = partial(pretrained.array, path)
    if weights.step:
        checkpoints = Checkpointer(path, CheckpointConfig())
        part = checkpoints.partial_restore(weights.step).read
        checkpoints.close()
    shapes = array_shapes(cfg.model, entries(cfg.model))
    specs = {name: ArraySpec(shape) for name, shape in shapes.items()}
    params = LazyArrays(str(weights), specs, part, part)
    tokenizer = None
    if weights.step or weights.source is None or weights.source.get("tokenizer"):
        tokenizer = data.load_tokenizer(_tokenizer_path(path, cfg.data.tokenizer))
        data.check_vocabulary(tokenizer, cfg.model.vocab_size)
    evaluated = _last_evaluation(path, weights.step)
    return RunSource(
        path, cfg, weights.step, params, tokenizer, weights.source, evaluated, weights.check
    )


def _tokenizer_path(path: epath.Path, name: str) -> str:
    # An imported run has a copy of its tokenizer, which also serves after the run was moved.
    if name == "bytes" or epath.Path(name).expanduser().exists():
        return name
    copy = path / "tokenizer"
    rule = "the tokenizer of this run does not exist any more"
    check(copy.is_dir(), "data.tokenizer", name, rule, f"Restore it, or copy its files to {copy}")
    return str(copy)


def _last_evaluation(path: epath.Path, step: int) -> dict[str, Any]:
    file = path / "metrics.jsonl"
    records = metrics.read(file) if file.exists() else []
    evaluations = [r for r in records if "eval/loss_causal" in r and r["step"] <= step]
    if not evaluations:
        return {}
    return {name.removeprefix("eval/"): value for name, value in evaluations[-1].items()}
