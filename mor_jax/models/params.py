"""Models as functions of parameters: initialisation, axes, and the forward pass.

Outside `models/` a model is its configuration and a nested dictionary of float32 arrays.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from mor_jax.config import ModelConfig
from mor_jax.distributed.collectives import all_gather_param, batch_axes
from mor_jax.models.param_count import unique_parameters
from mor_jax.models.routing.router import Route
from mor_jax.models.transformer import ModelOutput, Transformer
from mor_jax.types import Array, Batch, Float, Params

MAX_RANDOM_NUMBERS = 2**28
"""Random numbers that initialisation generates at one time on one device."""


@functools.cache
def _abstract(
    cfg: ModelConfig, kind: type[Transformer] = Transformer
) -> tuple[nnx.GraphDef, nnx.State]:
    model = nnx.eval_shape(lambda: kind(cfg, rngs=nnx.Rngs(params=0)))
    return nnx.split(model)


def abstract_params(cfg: ModelConfig) -> Params:
    """The parameter tree as `jax.ShapeDtypeStruct`s."""
    return _abstract(cfg)[1].to_pure_dict()


def logical_axes(cfg: ModelConfig) -> Params:
    """The parameter tree with, for each array, the tuple of its logical axis names."""
    return _metadata(cfg, "axes")


def _metadata(cfg: ModelConfig, name: str) -> Params:
    tree: Params = {}
    for path, variable in nnx.to_flat_state(_abstract(cfg)[1]):
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = variable.get_metadata(name)
    return tree


def init_params(cfg: ModelConfig, seed: int) -> Params:
    """New float32 parameters; traceable. Their number is checked against the formula.

    Raises:
        ValueError: the configuration is invalid.
    """
    shapes, structure = jax.tree.flatten(abstract_params(cfg))
    # Weight sharing that silently broke would show here first.
    stored = sum(shape.size for shape in shapes)
    assert stored == unique_parameters(cfg), (stored, unique_parameters(cfg))
    inits = structure.flatten_up_to(_metadata(cfg, "init"))
    random = [s.shape for s, init in zip(shapes, inits, strict=True) if init.std > 0]
    values = iter(_normal(jax.random.key(seed), random))
    return structure.unflatten(
        init.mean + init.std * next(values)
        if init.std > 0
        else jnp.full(shape.shape, init.mean, jnp.float32)
        for shape, init in zip(shapes, inits, strict=True)
    )


def _normal(key: Array, shapes: list[tuple[int, ...]]) -> list[Float[Array, "..."]]:
    """Standard normal numbers in arrays of these shapes.

    Generated in one call and split: compiling a generator for each array would take most of the
    time from the command to the first step. One call per array if all would not fit a device.
    """
    sizes = [math.prod(shape) for shape in shapes]
    if sum(sizes) > MAX_RANDOM_NUMBERS:
        keys = jax.random.split(key, len(shapes))
        return [jax.random.normal(k, s, jnp.float32) for k, s in zip(keys, shapes, strict=True)]
    values = jax.random.normal(key, (sum(sizes),), jnp.float32)
    if not jax.sharding.get_abstract_mesh().empty:
        # Replicated, so every device keeps its own shards and no number moves between devices.
        values = jax.lax.with_sharding_constraint(values, PartitionSpec())
    ends = np.cumsum(sizes).tolist()
    return [
        jax.lax.slice(values, (end - size,), (end,)).reshape(shape)
        for end, size, shape in zip(ends, sizes, shapes, strict=True)
    ]


def model_of(
    cfg: ModelConfig, params: Params, kind: type[Transformer] = Transformer
) -> Transformer:
    """The module with these parameters; cheap, for use inside a traced function.

    kind: a class with the parameters of `Transformer` and another forward pass.
    """
    graph, state = _abstract(cfg, kind)
    copied = jax.tree.map(lambda leaf: leaf, state)
    nnx.replace_by_pure_dict(copied, params)
    return nnx.merge(graph, copied)


def gather(cfg: ModelConfig, params: Params, shared: bool) -> Params:
    """All-gathers the parameters outside the layers, and the shared block too if `shared`.

    Under `shard_map_over_batch` parameters that FSDP shards are all-gathered either here, once, or
    by the layer that uses them, each time it runs. Matrices are cast to the model's dtype.
    """
    if not batch_axes():
        return params
    axes, sizes = logical_axes(cfg), abstract_params(cfg)
    dtype = jnp.dtype(cfg.dtype)

    def one(path: Any, x: Array, names: tuple[str, ...], size: jax.ShapeDtypeStruct) -> Array:
        top, last = path[0].key, path[-1].key
        if top in ("layers", "first", "last") or (top == "shared" and not shared):
            return x
        narrow = top in ("embed", "head") or (top == "shared" and last != "scale")
        label = "gather_shared" if top == "shared" else "gather"
        return all_gather_param(x, names, size.shape, dtype if narrow else None, label)

    return jax.tree_util.tree_map_with_path(one, params, axes, sizes)


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
    """The table of the output projection, for losses that never materialise all logits."""
    return params["embed" if cfg.tie_embeddings else "head"]["weight"]


def paths(tree: Any) -> list[str]:
    """Dotted paths of a nested dictionary's leaves, in the order of `jax.tree.leaves`."""
    flat = jax.tree_util.tree_leaves_with_path(tree)
    return [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in flat]
