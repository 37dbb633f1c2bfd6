"""Log-probabilities and depths of the tokens of one text, under causal routing."""

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
    """One forward pass over a text; compiles once for each power of two of tokens."""

    def __init__(
        self, cfg: ModelConfig, params: Params, thresholds: tuple[float, ...] | None
    ) -> None:
        self._longest, self._params = cfg.max_seq_len, params
        self._run = jax.jit(partial(_forward, cfg, Route(mode="causal", thresholds=thresholds)))

    def __call__(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Log-probabilities, float32 [l], the first one NaN; depths, int32 [l], None unrouted.

        tokens: int32 [l], at most the model's context. They are padded at the end: under causal
        routing later tokens change no earlier output (tests/models/test_transformer.py).
        """
        length = len(tokens)
        size = min(1 << max(length - 1, 15).bit_length(), self._longest)
        inputs = np.zeros((1, size), np.int32)
        inputs[0, :length] = tokens
        targets = np.full_like(inputs, IGNORE)
        targets[0, : length - 1] = tokens[1:]
        logprobs, depths = jax.device_get(self._run(self._params, inputs, targets))
        first = np.array([np.nan], np.float32)
        known = np.concatenate([first, logprobs[0, : length - 1]])
        return known, None if depths is None else depths[0, :length]


def _forward(
    cfg: ModelConfig, route: Route, params: Params, tokens: Int[Array, "1 l"], targets: Array
) -> tuple[Float[Array, "1 l"], Int[Array, "1 l"] | None]:
    output = forward(cfg, params, Batch(tokens, targets), route)
    losses, _ = token_losses(output.hidden, logits_table(cfg, params), targets, _CHUNK)
    return -losses, None if output.routing is None else output.routing.depth
