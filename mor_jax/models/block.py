"""The pre-norm Llama layer, and a stack of them under one scan.

A stack is called once per recursion with the same parameters: that is how weights are shared.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from mor_jax.config import ModelConfig
from mor_jax.distributed.collectives import all_gather_param, constrain, row_axes
from mor_jax.models.attention import Attention, KeyValue, SequenceContext
from mor_jax.models.layers.initializers import Axes
from mor_jax.models.layers.mlp import SwiGLU
from mor_jax.models.layers.norm import RMSNorm
from mor_jax.models.layers.remat import layer_input, remat
from mor_jax.models.layers.remat import save_output as kept_by_remat
from mor_jax.types import Array, Float

Keep = tuple[Literal["kv", "outputs"], ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SavedOutputs:
    """What a pass through a stack was asked to keep, with a leading axis of layers.

    For the sequence schemes `outputs` has the axes (layer, recursion) in front.
    """

    kv: KeyValue | None = None
    outputs: Float[Array, "... b c d"] | None = None


class Stack(nnx.Module):
    """`size` pre-norm layers whose parameters are stacked along a leading axis.

    The block that recursions share (`recurs`) holds one pair of norms per layer and recursion
    where the configuration does not share norms.
    """

    def __init__(self, cfg: ModelConfig, size: int, *, rngs: nnx.Rngs, recurs: bool = False):
        stacked: Axes = (("layers", size),)
        self.separate_norms = recurs and not cfg.share_norms
        norms = (*stacked, ("recursions", cfg.num_recursions)) if self.separate_norms else stacked
        self.attention = Attention(cfg, rngs=rngs, stacked=stacked)
        self.mlp = SwiGLU(cfg, rngs=rngs, stacked=stacked)
        self.norm1 = RMSNorm(cfg, rngs=rngs, stacked=norms)
        self.norm2 = RMSNorm(cfg, rngs=rngs, stacked=norms)
        self.recurs, self.recursions = recurs, cfg.num_recursions
        self.remat = cfg.remat
        # Routed tokens are gathered from anywhere in their row.
        self.cuts_length = not (recurs and cfg.router.kind != "none")
        self.update = cfg.kv_mode == "shared_update"

    def __call__(
        self,
        x: Float[Array, "b c d"],
        scope: SequenceContext,
        *,
        recursion: int = 0,
        shared: KeyValue | None = None,
        row: SequenceContext | None = None,
        keep: Keep = (),
    ) -> tuple[Float[Array, "b c d"], SavedOutputs]:
        """Runs all layers on the tokens of `scope`; returns the output and what `keep` names.

        shared, row: keys and values of each layer to attend to instead of the tokens' own, and
        the scope of the whole row that they cover.
        """
        graph, params = nnx.split(self)

        def body(x: Array, slot: tuple[nnx.State, KeyValue | None]):
            weights, kv = slot
            layer = nnx.merge(graph, self._gathered(weights, x.dtype))
            y, used = layer._layer(x, scope, recursion, kv, row)
            return y, SavedOutputs(used if "kv" in keep else None, y if "outputs" in keep else None)

        return self._scan(body, x, (params, shared))

    def interleaved(
        self, x: Float[Array, "b l d"], scope: SequenceContext, share_kv: bool, keep: Keep = ()
    ) -> tuple[Float[Array, "b l d"], SavedOutputs]:
        """Each layer `recursions` times before the next one (the sequence schemes)."""
        graph, params = nnx.split(self)

        def body(x: Array, weights: nnx.State):
            kv, outputs = None, []
            layer = nnx.merge(graph, self._gathered(weights, x.dtype))
            for r in range(self.recursions):
                x, used = layer._layer(x, scope, r, kv, scope)
                kv = used if share_kv else None
                outputs.append(x)
            return x, SavedOutputs(outputs=jnp.stack(outputs) if "outputs" in keep else None)

        return self._scan(body, x, params)

    def _layer(
        self,
        x: Array,
        scope: SequenceContext,
        recursion: int,
        shared: KeyValue | None,
        row: SequenceContext | None,
    ) -> tuple[Array, KeyValue]:
        """h = x + attention(norm1(x)); y = h + mlp(norm2(h)). `self` is one slice of the stack."""
        which = recursion if self.separate_norms else None
        normed = self.norm1(x, which)
        if self.update and shared is not None:
            shared = self.attention.updated(normed, scope, shared)
        mixed, kv = self.attention(normed, scope, shared, row)
        hidden = kept_by_remat(x + mixed)
        return constrain(hidden + self.mlp(self.norm2(hidden, which)), self.cuts_length), kv

    def _scan(self, body, x: Array, slots):
        def from_input(x: Array, slot: Any):
            return body(layer_input(x), slot)

        return jax.lax.scan(remat(from_input, self.remat), x, slots)

    def _gathered(self, weights: nnx.State, dtype: jnp.dtype) -> nnx.State:
        """The parameters of one layer, whole; matrices that had to be gathered come in `dtype`."""
        if not row_axes():
            return weights

        def gather(path: tuple[Any, ...], variable: nnx.Variable) -> nnx.Variable:
            # The leading axis, over layers, is the scan's.
            axes, sizes = variable.get_metadata("axes")[1:], variable.get_metadata("sizes")[1:]
            cast = None if path[-1] == "scale" else dtype
            label = "gather_shared" if self.recurs else "gather"
            return variable.replace(all_gather_param(variable[...], axes, sizes, cast, label))

        return nnx.map_state(gather, weights)
