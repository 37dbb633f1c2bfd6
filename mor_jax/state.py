"""Between the modules and plain JAX: building parameters, applying a model, the training state.

Outside `models/` a model is its configuration and a nested dictionary of float32 arrays.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mor_jax.config import ModelConfig
from mor_jax.models.router import Route
from mor_jax.models.transformer import ModelOutput, Transformer
from mor_jax.parameters import unique_parameters
from mor_jax.types import Array, Batch, Float, Int, Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step changes.

    step: optimiser steps taken, skipped ones included. skipped: steps whose loss or gradient was
    not finite; skipped_in_a_row: those at the end of the run so far.
    """

    step: Int[Array, ""]
    params: Params
    opt_state: Any
    skipped: Int[Array, ""]
    skipped_in_a_row: Int[Array, ""]


@functools.cache
def _abstract(cfg: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
    model = nnx.eval_shape(lambda: Transformer(cfg, rngs=nnx.Rngs(params=0)))
    return nnx.split(model)


def abstract_params(cfg: ModelConfig) -> Params:
    """The parameter tree as `jax.ShapeDtypeStruct`s."""
    return _abstract(cfg)[1].to_pure_dict()


def logical_axes(cfg: ModelConfig) -> Params:
    """The parameter tree with, for each array, the tuple of its logical axis names."""
    axes = jax.tree.map(
        lambda p: p.get_metadata("axes"),
        _abstract(cfg)[1],
        is_leaf=lambda node: isinstance(node, nnx.Variable),
    )
    return axes.to_pure_dict() if isinstance(axes, nnx.State) else axes


def init_params(cfg: ModelConfig, seed: int) -> Params:
    """Fresh parameters. The count of what is stored is checked against the formula.

    Raises:
        ValueError: the configuration does not make a model.
    """

    def build() -> Params:
        model = Transformer(cfg, rngs=nnx.Rngs(params=jax.random.key(seed)))
        return nnx.split(model)[1].to_pure_dict()

    params = jax.jit(build)()
    stored = sum(leaf.size for leaf in jax.tree.leaves(params))
    # Weight sharing that silently came apart would show here first.
    assert stored == unique_parameters(cfg), (stored, unique_parameters(cfg))
    return params


def model_of(cfg: ModelConfig, params: Params) -> Transformer:
    """The module with these parameters; cheap, meant for use under a trace."""
    graph, state = _abstract(cfg)
    filled = jax.tree.map(lambda leaf: leaf, state)
    nnx.replace_by_pure_dict(filled, params)
    return nnx.merge(graph, filled)


def forward(
    cfg: ModelConfig,
    params: Params,
    batch: Batch,
    route: Route | None = None,
    *,
    trace: bool = False,
) -> ModelOutput:
    """Runs the model; see `Transformer.__call__`."""
    return model_of(cfg, params)(batch, route, trace=trace)


def unembed(
    cfg: ModelConfig, params: Params, hidden: Float[Array, "... d"]
) -> Float[Array, "... v"]:
    """Float32 logits of the hidden states that `forward` returned."""
    return model_of(cfg, params).logits(hidden)


def logits_table(cfg: ModelConfig, params: Params) -> Float[Array, "v d"]:
    """The table of the output projection, for losses that never hold all logits at once."""
    return params["embed" if cfg.tie_embeddings else "head"]["weight"]


def new_state(params: Params, opt_state: Any) -> TrainState:
    """The state before the first step."""
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, opt_state, zero, zero)
