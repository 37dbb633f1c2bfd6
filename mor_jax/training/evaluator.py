"""Losses on validation text under both routing modes, depths, and a sampled completion.

The training rule of expert-choice compares with later tokens, so its validation loss is too low;
generation uses causal routing. Both are reported, under names of their own.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from mor_jax.config import ModelConfig, TrainConfig
from mor_jax.models.params import forward, unembed
from mor_jax.models.routing.router import Route
from mor_jax.training.train_step import eval_step
from mor_jax.types import Array, Batch, Int, Params

CAUSAL = Route(mode="causal")


def modes(cfg: ModelConfig) -> tuple[str, ...]:
    """Routing modes to evaluate; one suffices for a model without routing."""
    return ("causal",) if cfg.router.kind == "none" else ("topk", "causal")


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Evaluates parameters on fixed batches; compiles once per routing mode."""

    cfg: TrainConfig
    batches: list[Batch]
    step: Callable[[Params, Batch, str], dict[str, Array]]

    @classmethod
    def of(
        cls,
        cfg: TrainConfig,
        batches: list[Batch],
        thresholds: tuple[float, ...] | None = None,
    ) -> "Evaluator":
        """Jits the evaluation step. thresholds: of causal routing, as in `Route`."""
        step = partial(eval_step, cfg, thresholds=thresholds)
        return cls(cfg, batches, jax.jit(step, static_argnums=2))

    def __call__(self, params: Params) -> dict[str, Any]:
        """Means over all validation tokens, nats per token, by name and routing mode.

        loss_*, accuracy_*; for routed models also depth_* (mean recursions per token) and
        depth_share_* (share of tokens at depth 0 .. Nr).
        """
        found: dict[str, Any] = {}
        for mode in modes(self.cfg.model):
            sums = [self.step(params, batch, mode) for batch in self.batches]
            total = jax.tree.map(lambda *leaves: np.sum(leaves, axis=0), *jax.device_get(sums))
            found[f"loss_{mode}"] = float(total["ce"] / total["targets"])
            found[f"accuracy_{mode}"] = float(total["correct"] / total["targets"])
            if "depth_count" in total:
                share = total["depth_count"] / total["depth_count"].sum()
                found[f"depth_{mode}"] = float(share @ np.arange(len(share)))
                found[f"depth_share_{mode}"] = share.tolist()
        return found


def complete(
    cfg: ModelConfig, params: Params, prompt: np.ndarray, number: int, seed: int
) -> np.ndarray:
    """`number` tokens sampled after `prompt` (int32 [l]) at temperature 0.8, under causal routing.

    Recomputes the sequence for every token: for short samples, not for serving.
    """
    length = len(prompt) + number
    row = np.zeros((1, length), np.int32)
    row[0, : len(prompt)] = prompt
    sample = jax.jit(partial(_extend, cfg), static_argnums=2, out_shardings=_whole(params))
    done = sample(params, jnp.asarray(row), len(prompt), jax.random.key(seed))
    return np.asarray(done)[0, len(prompt) :]


def _extend(
    cfg: ModelConfig, params: Params, row: Int[Array, "1 l"], start: int, key: Array
) -> Int[Array, "1 l"]:
    targets = jnp.zeros_like(row)

    def body(i: Array, row: Array) -> Array:
        hidden = forward(cfg, params, Batch(row, targets), CAUSAL).hidden
        last = jax.lax.dynamic_slice_in_dim(hidden, i - 1, 1, axis=1)
        logits = unembed(cfg, params, last)[:, 0] / 0.8
        token = jax.random.categorical(jax.random.fold_in(key, i), logits)
        return jax.lax.dynamic_update_slice_in_dim(row, token[:, None].astype(row.dtype), i, 1)

    return jax.lax.fori_loop(start, row.shape[1], body, row)


def token_depths(
    cfg: ModelConfig,
    params: Params,
    tokens: np.ndarray,
    thresholds: tuple[float, ...] | None = None,
) -> np.ndarray:
    """Depth of every token (int32 [l]) of one sequence under causal routing; needs a routed model.

    thresholds: as in `Route`.
    """
    route = Route(mode="causal", thresholds=thresholds)

    def depths(params: Params, row: Int[Array, "1 l"]) -> Int[Array, "l"]:
        routing = forward(cfg, params, Batch(row, jnp.zeros_like(row)), route).routing
        assert routing is not None
        return routing.depth[0]

    found = jax.jit(depths, out_shardings=_whole(params))
    return np.asarray(found(params, jnp.asarray(tokens, jnp.int32)[None]))


def _whole(params: Params) -> NamedSharding | None:
    # Replicated, so every process has the whole result.
    where = jax.tree.leaves(params)[0].sharding
    return NamedSharding(where.mesh, PartitionSpec()) if isinstance(where, NamedSharding) else None
