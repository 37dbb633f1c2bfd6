"""The pre-norm Llama layer, and a stack of them under one scan.

A stack is called once per recursion with the same parameters: that is how weights are shared.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from mor_jax.config import ModelConfig
from mor_jax.distributed.collectives import all_gather_param, batch_axes, constrain
from mor_jax.models.attention import Attention, KeyValue, SequenceContext
from mor_jax.models.layers.initializers import Axes
from mor_jax.models.layers.mlp import SwiGLU
from mor_jax.models.layers.norm import RMSNorm
from mor_jax.models.layers.remat import layer_input, remat, save_output
from mor_jax.types import Array, Float

SavedNames = tuple[Literal["kv", "outputs"], ...]
"""Names of the outputs of its layers that a stack returns, as in `SavedOutputs`."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SavedOutputs:
    """Requested outputs of the layers of a stack, stacked along a leading axis.

    The sequence schemes have two leading axes in `outputs`: (layer, recursion).
    """

    kv: KeyValue | None = None
    outputs: Float[Array, "... b c d"] | None = None


class Stack(nnx.Module):
    """`size` pre-norm layers whose parameters are stacked along a leading axis.

    The block that recursions share (`is_shared`) has one pair of norms per layer and recursion
    unless `share_norms` is set.
    """

    def __init__(self, cfg: ModelConfig, size: int, *, rngs: nnx.Rngs, is_shared: bool = False):
        stacked: Axes = (("layers", size),)
        self.separate_norms = is_shared and not cfg.share_norms
        norms = (*stacked, ("recursions", cfg.num_recursions)) if self.separate_norms else stacked
        self.attention = Attention(cfg, rngs=rngs, stacked=stacked)
        self.mlp = SwiGLU(cfg, rngs=rngs, stacked=stacked)
        self.norm1 = RMSNorm(cfg, rngs=rngs, stacked=norms)
        self.norm2 = RMSNorm(cfg, rngs=rngs, stacked=norms)
        self.is_shared, self.recursions = is_shared, cfg.num_recursions
        self.remat = cfg.remat
        # Routed tokens are gathered from anywhere in their sequence.
        self.shards_sequence = not (is_shared and cfg.router.kind != "none")
        self.update = cfg.kv_mode == "shared_update"

    def __call__(
        self,
        x: Float[Array, "b c d"],
        context: SequenceContext,
        *,
        recursion: int = 0,
        shared_kv: KeyValue | None = None,
        sequence: SequenceContext | None = None,
        save: SavedNames = (),
    ) -> tuple[Float[Array, "b c d"], SavedOutputs]:
        """Runs all layers on the tokens of `context`; returns the output and what `save` names.

        shared_kv, sequence: keys and values of each layer to attend to instead of the tokens' own,
        and the context of the whole sequence that they cover.
        """
        graph, params = nnx.split(self)

        def body(x: Array, slot: tuple[nnx.State, KeyValue | None]):
            weights, kv = slot
            layer = nnx.merge(graph, self._gathered(weights, x.dtype))
            y, used = layer._layer(x, context, recursion, kv, sequence)
            return y, SavedOutputs(used if "kv" in save else None, y if "outputs" in save else None)

        return self._scan(body, x, (params, shared_kv))

    def interleaved(
        self,
        x: Float[Array, "b l d"],
        sequence: SequenceContext,
        share_kv: bool,
        save: SavedNames = (),
    ) -> tuple[Float[Array, "b l d"], SavedOutputs]:
        """Runs each layer `recursions` times before the next one (the sequence schemes)."""
        graph, params = nnx.split(self)

        def body(x: Array, weights: nnx.State):
            kv, outputs = None, []
            layer = nnx.merge(graph, self._gathered(weights, x.dtype))
            for r in range(self.recursions):
                x, used = layer._layer(x, sequence, r, kv, sequence)
                kv = used if share_kv else None
                outputs.append(x)
            return x, SavedOutputs(outputs=jnp.stack(outputs) if "outputs" in save else None)

        return self._scan(body, x, params)

    def _layer(
        self,
        x: Array,
        context: SequenceContext,
        recursion: int,
        shared_kv: KeyValue | None,
        sequence: SequenceContext | None,
    ) -> tuple[Array, KeyValue]:
        """h = x + attention(norm1(x)); y = h + mlp(norm2(h)). `self` is one slice of the stack."""
        norm_index = recursion if self.separate_norms else None
        normed = self.norm1(x, norm_index)
        if self.update and shared_kv is not None:
            shared_kv = self.attention.updated(normed, context, shared_kv)
        mixed, kv = self.attention(normed, context, shared_kv, sequence)
        hidden = save_output(x + mixed)
        return constrain(
            hidden + self.mlp(self.norm2(hidden, norm_index)), self.shards_sequence
        ), kv

    def _scan(self, body, x: Array, slots):
        def from_input(x: Array, slot: Any):
            return body(layer_input(x), slot)

        return jax.lax.scan(remat(from_input, self.remat), x, slots)

    def _gathered(self, weights: nnx.State, dtype: jnp.dtype) -> nnx.State:
        """All-gathers the parameters of one layer; gathered matrices are cast to `dtype`."""
        if not batch_axes():
            return weights

        def gather(path: tuple[Any, ...], variable: nnx.Variable) -> nnx.Variable:
            # The scan runs over the leading axis, that of layers.
            axes, sizes = variable.get_metadata("axes")[1:], variable.get_metadata("sizes")[1:]
            cast = None if path[-1] == "scale" else dtype
            label = "gather_shared" if self.is_shared else "gather"
            return variable.replace(all_gather_param(variable[...], axes, sizes, cast, label))

        return nnx.map_state(gather, weights)
