"""What to evaluate on, and a run's configuration changed to it."""

import dataclasses

from mor_jax.config import TrainConfig
from mor_jax.config.parsing import check_positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalRequest:
    """What to evaluate on. None: as the run itself does it.

    sources: other text, all of it, written as `data.sources`. length: tokens of a row. batches,
    batch_size: of rows. fsdp: devices over which each parameter is cut; the others take rows.
    calibration: name or file of one, for causal routing. recursions: to run in place of those
    trained or calibrated.
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
        """Of the documents: nothing is trained on other text, so all of it may be used."""
        return "heldout" if self.sources is None else "all"


def config_for(cfg: TrainConfig, asked: EvalRequest) -> TrainConfig:
    """A run's configuration with the rows that are asked for. Raises `ValueError` as `evaluate`."""
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
