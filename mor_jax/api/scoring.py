"""Log-probabilities of the tokens of one text, under causal routing."""

from functools import partial

import jax
import numpy as np

from mor_jax.config import ModelConfig
from mor_jax.models.params import forward, logits_table
from mor_jax.models.routing.router import Route
from mor_jax.training.losses import token_losses
from mor_jax.types import IGNORE, Array, Batch, Float, Int, Params

_CHUNK = 512
"""Positions whose logits exist at the same time."""


class Scorer:
    """Scores texts with one model; compiles once for each power of two of tokens."""

    def __init__(
        self, cfg: ModelConfig, params: Params, thresholds: tuple[float, ...] | None
    ) -> None:
        self._longest, self._params = cfg.max_seq_len, params
        self._run = jax.jit(partial(_logprobs, cfg, Route(mode="causal", thresholds=thresholds)))

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        """tokens: int32 [l], at most the model's context -> float32 [l], the first one NaN."""
        inputs = np.zeros((1, padded_length(len(tokens), self._longest)), np.int32)
        inputs[0, : len(tokens)] = tokens
        targets = np.full_like(inputs, IGNORE)
        targets[0, : len(tokens) - 1] = tokens[1:]
        found = np.asarray(self._run(self._params, inputs, targets))[0, : len(tokens) - 1]
        return np.concatenate([np.array([np.nan], np.float32), found])


def padded_length(length: int, longest: int) -> int:
    """A power of two, so that few lengths are compiled.

    Under causal routing later tokens change no earlier output (tests/models/test_transformer.py),
    so padding at the end is safe.
    """
    return min(1 << max(length - 1, 15).bit_length(), longest)


def _logprobs(
    cfg: ModelConfig, route: Route, params: Params, tokens: Int[Array, "1 l"], targets: Array
) -> Float[Array, "1 l"]:
    hidden = forward(cfg, params, Batch(tokens, targets), route).hidden
    return -token_losses(hidden, logits_table(cfg, params), targets, _CHUNK)[0]
