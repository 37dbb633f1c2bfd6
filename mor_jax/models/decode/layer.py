"""Weights in the layout for decoding, and one layer on a list of rows.

Layers are separate arrays, not a stack: a scan over layers would copy each layer's weights and
pages out of the stack, which costs more than the arithmetic of a few rows.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from mor_jax.config import ModelConfig
from mor_jax.models.layers.norm import rms_norm
from mor_jax.models.layers.rope import RotaryTables, apply_rope, compute_rotary_tables
from mor_jax.types import Array, Float, Int, Params

Mix = Callable[[Array, Array, Array], Array]
"""Scaled queries [n g j k], keys and values [n g k] of the rows -> attention's output [n g j k]."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layer:
    """Weights of one layer in the model's dtype; query, key and value fused, gate and up too.

    Norm scales are float32, with one row per recursion if they are not shared.
    """

    norm1: Float[Array, "*r d"]
    qkv: Float[Array, "d wide"]
    out: Float[Array, "inner d"]
    norm2: Float[Array, "*r d"]
    gate_up: Float[Array, "d wider"]
    down: Float[Array, "f d"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weights:
    """A model's weights.

    ends: the first and the last layer if they are outside the block, else empty. block: layers of
    the shared block, or of a vanilla model. head: the output matrix, a copy even if tied to
    `embed`: this layout is multiplied a third faster on CPUs. router: parameters of the routers,
    float32.
    """

    embed: Float[Array, "v d"]
    ends: tuple[Layer, ...]
    block: tuple[Layer, ...]
    norm: Float[Array, "d"]
    head: Float[Array, "d v"]
    router: Params | None

    @classmethod
    def of(cls, cfg: ModelConfig, params: Params) -> "Weights":
        """From the parameters of a checkpoint; intended for `jax.jit`."""
        dtype = jnp.dtype(cfg.dtype)
        stack = "layers" if cfg.sharing == "none" else "shared"
        embed = params["embed"]["weight"].astype(dtype)
        head = embed if cfg.tie_embeddings else params["head"]["weight"].astype(dtype)
        ends = [_layer(params[name], 0, dtype) for name in ("first", "last") if cfg.is_middle]
        block = [_layer(params[stack], i, dtype) for i in range(cfg.shared_layers)]
        norm = params["norm"]["scale"]
        return cls(embed, tuple(ends), tuple(block), norm, head.T, params.get("router"))


def _layer(stack: Params, i: int, dtype: jnp.dtype) -> Layer:
    a = {name: array[i].astype(dtype) for name, array in stack["attention"].items()}
    m = {name: array[i].astype(dtype) for name, array in stack["mlp"].items()}
    d = a["q"].shape[0]
    return Layer(
        norm1=stack["norm1"]["scale"][i],
        qkv=jnp.concatenate([a[name].reshape(d, -1) for name in "qkv"], axis=1),
        out=a["o"].reshape(-1, d),
        norm2=stack["norm2"]["scale"][i],
        gate_up=jnp.concatenate([m["gate"], m["up"]], axis=1),
        down=m["down"],
    )


def rotary_tables(cfg: ModelConfig, position: Int[Array, "n"]) -> RotaryTables:
    """Rotary tables of n rows."""
    return compute_rotary_tables(position[None], cfg.head_dim, cfg.rope_theta, cfg.rope_scaling)


def norm(
    cfg: ModelConfig, x: Float[Array, "n d"], scale: Float[Array, "*r d"], r: Array | int
) -> Float[Array, "n d"]:
    """RMSNorm of n rows. r: recursion of each row [n], or of all rows."""
    if scale.ndim == 1:
        return rms_norm(x, scale, cfg.norm_eps)
    ones = jnp.ones(x.shape[1], jnp.float32)
    return rms_norm(x, ones, cfg.norm_eps) * jnp.atleast_2d(scale[r]).astype(x.dtype)


def project(
    cfg: ModelConfig, layer: Layer, x: Float[Array, "n d"], tables: RotaryTables, r: Array | int
) -> tuple[Float[Array, "n g j k"], Float[Array, "n g k"], Float[Array, "n g k"]]:
    """Scaled queries, keys and values of n rows, with rotary embedding."""
    n, g, k = x.shape[0], cfg.num_kv_heads, cfg.head_dim
    wide = norm(cfg, x, layer.norm1, r) @ layer.qkv
    heads = wide.reshape(1, n, -1, k)
    rotated = apply_rope(heads[:, :, : cfg.num_heads + g], tables)[0]
    q = (rotated[:, : cfg.num_heads] * k**-0.5).reshape(n, g, -1, k)
    return q, rotated[:, cfg.num_heads :], heads[0, :, cfg.num_heads + g :]


def apply(
    cfg: ModelConfig,
    layer: Layer,
    x: Float[Array, "n d"],
    at: tuple[RotaryTables, Array | int],
    mix: Mix,
) -> Float[Array, "n d"]:
    """One pre-norm layer on n rows. at: their rotary tables and recursions."""
    q, k, v = project(cfg, layer, x, *at)
    mixed = mix(q, k, v).astype(x.dtype)
    hidden = x + mixed.reshape(x.shape[0], -1) @ layer.out
    wide = norm(cfg, hidden, layer.norm2, at[1]) @ layer.gate_up
    gate, up = jnp.split(wide, 2, axis=1)
    return hidden + (jax.nn.silu(gate) * up) @ layer.down


def logits(weights: Weights, hidden: Float[Array, "n d"]) -> Float[Array, "n v"]:
    """Float32 logits of normalised hidden states."""
    return jnp.matmul(hidden, weights.head, preferred_element_type=jnp.float32)
