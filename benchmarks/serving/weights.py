"""Random weights made ready to serve, with thresholds under which depths follow the capacities."""

import time
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from mor_jax.calibration.calibrator import CalibrationText, Calibrator
from mor_jax.config import ModelConfig, TrainConfig
from mor_jax.data.tokenizers.base import Tokenizer
from mor_jax.inference.calibration_targets import trained_shares
from mor_jax.inference.load_model import LoadedModel, expected_shares
from mor_jax.models.params import init_params
from mor_jax.types import Batch

_ROWS, _BATCHES, _LENGTH = 8, 3, 512


def random_served(name: str, cfg: ModelConfig, tokenizer: Tokenizer, seed: int = 0) -> LoadedModel:
    """A model nobody trained: its speed is that of trained weights, its routing is calibrated.

    Thresholds are quantiles on random tokens, which is also what such weights generate.
    """
    params, thresholds = init_params(cfg, seed), None
    if cfg.router.kind != "none":
        run = TrainConfig(model=cfg, seq_len=_LENGTH, batch_size=_ROWS)
        text = CalibrationText("random tokens", tuple(_random(cfg)), ())
        thresholds = Calibrator(run, params, text).thresholds(trained_shares(cfg))
    return LoadedModel(
        name=name,
        cfg=cfg,
        params=params,
        thresholds=thresholds,
        shares=expected_shares(cfg),
        tokenizer=tokenizer,
        chat_template=None,
        special_tokens={},
        eos_ids=frozenset({tokenizer.eos_id}),
        created=int(time.time()),
    )


def _random(cfg: ModelConfig) -> Iterator[Batch]:
    rng = np.random.default_rng(7)
    for _ in range(_BATCHES):
        tokens = jnp.asarray(rng.integers(0, cfg.vocab_size, (_ROWS, _LENGTH), dtype=np.int32))
        yield Batch(tokens=tokens, targets=tokens)
