"""Causal routing: each token is routed by its own state, independently of all others."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from mor_jax.config import ModelConfig
from mor_jax.models.routing.router import Router, Routers, expert_score, token_score
from mor_jax.types import Array, Bool, Float, Int, Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RoutingDecision:
    """Routing of n rows before a recursion. selected: they enter it. gate: their score."""

    selected: Bool[Array, "n"]
    gate: Float[Array, "n"]


@functools.cache
def _structure(cfg: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: Routers(cfg, rngs=nnx.Rngs(params=0))))


def _routers(cfg: ModelConfig, params: Params) -> Routers:
    graph, state = _structure(cfg)
    filled = jax.tree.map(lambda leaf: leaf, state)
    nnx.replace_by_pure_dict(filled, params)
    return nnx.merge(graph, filled)


def takes_all(cfg: ModelConfig) -> tuple[bool, ...]:
    """Recursions of expert-choice that all their candidates enter: capacity 1."""
    return tuple(capacity == 1.0 for capacity in cfg.router.capacities(cfg.num_recursions))


def expert(
    cfg: ModelConfig,
    params: Params,
    thresholds: Float[Array, "r"],
    x: Float[Array, "n d"],
    r: Int[Array, "n"] | Int[Array, ""],
) -> RoutingDecision:
    """Expert-choice before recursion `r`, of all rows or of each (paper section 2.2.1).

    thresholds: least logit of a selected row, of the router trained to predict the selection.
    """
    routers = _routers(cfg, params)
    tempered = x.astype(jnp.float32) / cfg.router.temperature
    logits = _logits(routers.main, tempered, r, cfg.num_recursions)
    trained = logits if routers.aux is None else _logits(routers.aux, x, r, cfg.num_recursions)
    selected = jnp.array(takes_all(cfg))[r] | (trained >= thresholds[r])
    return RoutingDecision(selected, expert_score(cfg.router, logits))


def _logits(router: Router, x: Float[Array, "n d"], r: Array, recursions: int) -> Float[Array, "n"]:
    if r.ndim == 0:
        return router.one(x[None], r)[0]
    # Rows are at different recursions: every router scores all of them.
    every = jnp.stack([router.one(x[None], i)[0] for i in range(recursions)])
    return jnp.take_along_axis(every, r[None], axis=0)[0]


def token(
    cfg: ModelConfig, params: Params, x: Float[Array, "n d"]
) -> tuple[Int[Array, "n"], Float[Array, "n"]]:
    """Token-choice: last recursion of each row and its weight, from the input of recursion 0."""
    routers = _routers(cfg, params)
    weights = token_score(
        cfg.router, routers.main.joint(x.astype(jnp.float32)[None] / cfg.router.temperature)
    )[0]
    ranked = weights if routers.bias is None else weights + routers.bias[...][None]
    choice = jnp.argmax(ranked, axis=-1).astype(jnp.int32)
    return choice, jnp.take_along_axis(weights, choice[:, None], axis=1)[:, 0]
