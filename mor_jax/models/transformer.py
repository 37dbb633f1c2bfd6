"""The decoder: embedding, first layer, recursion stage, last layer, final norm, logits."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from mor_jax.config import ModelConfig
from mor_jax.config.parsing import check
from mor_jax.distributed.collectives import constrain
from mor_jax.models.attention import SequenceContext
from mor_jax.models.block import Stack
from mor_jax.models.layers.embedding import Embed, unembed
from mor_jax.models.layers.norm import RMSNorm
from mor_jax.models.layers.rope import compute_rotary_tables
from mor_jax.models.recursion import (
    RecursionContext,
    run_expert_choice,
    run_token_choice,
    run_unrouted,
)
from mor_jax.models.routing.outputs import Routing
from mor_jax.models.routing.router import Route, Routers, check_route
from mor_jax.types import Array, Batch, Float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trace:
    """The residual stream at several points, for parity checks and analysis.

    embedded: after the embedding. layers: in a vanilla or recursive model, after each effective
    layer; in a routed one, after the first layer, each recursion (token-choice: after the last
    recursion only) and the last layer.
    """

    embedded: Float[Array, "b l d"]
    layers: tuple[Float[Array, "b l d"], ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModelOutput:
    """Result of a forward pass. hidden: after the final norm; `Transformer.logits` maps it on."""

    hidden: Float[Array, "b l d"]
    routing: Routing | None = None
    trace: Trace | None = None


class Transformer(nnx.Module):
    """Vanilla Llama, recursive, or Mixture-of-Recursions model, by `cfg` (paper section 2)."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        cfg.validate()
        self.cfg = cfg
        self.embed = Embed(cfg, rngs=rngs)
        self.norm = RMSNorm(cfg, rngs=rngs)
        self.layers = self.first = self.shared = self.last = nnx.data(None)
        self.head = self.router = nnx.data(None)
        if not cfg.tie_embeddings:
            self.head = Embed(cfg, rngs=rngs)
        if cfg.sharing == "none":
            self.layers = Stack(cfg, cfg.num_layers, rngs=rngs)
            return
        self.shared = Stack(cfg, cfg.shared_layers, rngs=rngs, is_shared=True)
        if cfg.is_middle:
            self.first = Stack(cfg, 1, rngs=rngs)
            self.last = Stack(cfg, 1, rngs=rngs)
        if cfg.router.kind != "none":
            self.router = Routers(cfg, rngs=rngs)

    def __call__(
        self, batch: Batch, route: Route | None = None, *, trace: bool = False
    ) -> ModelOutput:
        """Runs the sequences of `batch`; its targets are not read. trace: return a `Trace` too.

        Raises:
            ValueError: sequences longer than `max_seq_len`, or a route that does not fit the model.
        """
        sequence = self._sequence(batch)
        stack = self.layers or self.first or self.shared
        embedded = constrain(
            self.embed(batch.tokens, jnp.dtype(self.cfg.dtype)), stack.shards_sequence
        )
        x, before = _run_once(self.layers or self.first, embedded, sequence, trace)
        if self.router is not None:
            x = constrain(x, length=False)
        x, routing, within = self._recur(x, sequence, route or Route(), trace)
        x, after = _run_once(self.last, x, sequence, trace)
        traced = Trace(embedded, (*before, *within, *after)) if trace else None
        return ModelOutput(constrain(self.norm(x), length=False), routing, traced)

    def _sequence(self, batch: Batch) -> SequenceContext:
        length, longest = batch.tokens.shape[1], self.cfg.max_seq_len
        rule = f"sequences have at most model.max_seq_len={longest} tokens"
        check(length <= longest, "length", length, rule, "Shorten them or raise the maximum")
        positions = batch.positions
        if positions is None:
            positions = jnp.arange(length, dtype=jnp.int32)[None]
        cfg = self.cfg
        tables = compute_rotary_tables(positions, cfg.head_dim, cfg.rope_theta, cfg.rope_scaling)
        return SequenceContext(tables, batch.segments)

    def _recur(
        self, x: Float[Array, "b l d"], sequence: SequenceContext, route: Route, trace: bool
    ) -> tuple[Float[Array, "b l d"], Routing | None, tuple[Array, ...]]:
        """The recursions: output, routing, and with `trace` the outputs of the layers."""
        if self.shared is None:
            return x, None, ()
        stage = RecursionContext(self.cfg, self.shared, self.router, route, trace)
        if self.cfg.router.kind == "none":
            x, layers = run_unrouted(stage, x, sequence)
            return x, None, layers
        check_route(route, self.cfg.num_recursions)
        if self.cfg.router.kind == "expert":
            x, routing = run_expert_choice(stage, x, sequence)
            return (
                x,
                routing,
                tuple(one.output for one in routing.recursion_traces if one.output is not None),
            )
        x, routing = run_token_choice(stage, x, sequence)
        return x, routing, (x,)

    def logits(self, hidden: Float[Array, "... d"]) -> Float[Array, "... v"]:
        """Float32 logits of `ModelOutput.hidden`."""
        table = self.embed if self.head is None else self.head
        return unembed(hidden, table.weight[...])


def _run_once(
    stack: Stack | None, x: Float[Array, "b l d"], sequence: SequenceContext, trace: bool
) -> tuple[Float[Array, "b l d"], tuple[Array, ...]]:
    """Runs a stack that every token passes once; the identity if the model has no such stack."""
    if stack is None:
        return x, ()
    x, saved = stack(x, sequence, save=("outputs",) if trace else ())
    return x, tuple(saved.outputs) if trace else ()
