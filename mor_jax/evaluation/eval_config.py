"""Evaluation requests, and the configuration of a run adapted to one."""

import dataclasses

from mor_jax.config import TrainConfig
from mor_jax.config.parsing import check_positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalRequest:
    """What to evaluate on. None: as in the run's own evaluation.

    sources: other text, all of it, in the form of `data.sources`. length: tokens per sequence.
    batches, batch_size: number of batches, and sequences per batch. fsdp: devices over which each
    parameter is sharded; the batch is sharded over the others too. calibration: name or file of a
    calibration, for causal routing. recursions: number to run instead of the trained or calibrated
    one.
    """

    sources: tuple[str, ...] | None = None
    length: int | None = None
    batches: int | None = None
    batch_size: int | None = None
    fsdp: int = 1
    calibration: str | None = None
    recursions: int | None = None

    @property
    def split(self) -> str:
        """Split of the documents: all of a text that is not in the training data."""
        return "heldout" if self.sources is None else "all"


def config_for(cfg: TrainConfig, asked: EvalRequest) -> TrainConfig:
    """The run's configuration with the requested data. Raises `ValueError` as `evaluate`."""
    check_positive("evaluation", asked, "fsdp")
    given = dataclasses.replace(
        cfg.eval,
        batches=cfg.eval.batches if asked.batches is None else asked.batches,
        batch_size=cfg.eval.batch_size if asked.batch_size is None else asked.batch_size,
    )
    text = cfg.data
    if asked.sources is not None:
        text = dataclasses.replace(text, sources=asked.sources, weights=None)
    length = cfg.seq_len if asked.length is None else asked.length
    made = dataclasses.replace(cfg, eval=given, data=text, seq_len=length)
    made.validate()
    return made
