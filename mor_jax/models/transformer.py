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
from mor_jax.models.layers.rope import rotary
from mor_jax.models.recursion import RecursionContext, run_expert, run_plain, run_token
from mor_jax.models.routing.outputs import Routing
from mor_jax.models.routing.router import Route, Routers, check_route
from mor_jax.types import Array, Batch, Float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trace:
    """The residual stream on its way, for parity checks and analysis.

    embedded: after the embedding. layers: after every top-level layer: each effective layer of a
    plain or recursive model; first, each recursion (token-choice: the stage as a whole), last.
    """

    embedded: Float[Array, "b l d"]
    layers: tuple[Float[Array, "b l d"], ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModelOutput:
    """What a forward pass returns. hidden: after the final norm; `logits` turns it into logits."""

    hidden: Float[Array, "b l d"]
    routing: Routing | None = None
    trace: Trace | None = None


class Transformer(nnx.Module):
    """Plain Llama, recursive, or Mixture-of-Recursions, as `cfg` says (paper section 2)."""

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
        self.shared = Stack(cfg, cfg.shared_layers, rngs=rngs, recurs=True)
        if cfg.is_middle:
            self.first = Stack(cfg, 1, rngs=rngs)
            self.last = Stack(cfg, 1, rngs=rngs)
        if cfg.router.kind != "none":
            self.router = Routers(cfg, rngs=rngs)

    def __call__(
        self, batch: Batch, route: Route | None = None, *, trace: bool = False
    ) -> ModelOutput:
        """Runs the rows of `batch` (its targets are not read).

        Raises:
            ValueError: rows longer than `max_length`, or a route that does not fit the model.
        """
        row = self._row(batch)
        stack = self.layers or self.first or self.shared
        embedded = constrain(self.embed(batch.tokens, jnp.dtype(self.cfg.dtype)), stack.cuts_length)
        x, before = _through(self.layers or self.first, embedded, row, trace)
        if self.router is not None:
            x = constrain(x, length=False)
        x, routing, within = self._recur(x, row, route or Route(), trace)
        x, after = _through(self.last, x, row, trace)
        kept = Trace(embedded, (*before, *within, *after)) if trace else None
        return ModelOutput(constrain(self.norm(x), length=False), routing, kept)

    def _row(self, batch: Batch) -> SequenceContext:
        length, longest = batch.tokens.shape[1], self.cfg.max_seq_len
        rule = f"rows may hold at most model.max_seq_len={longest} tokens"
        check(length <= longest, "length", length, rule, "Shorten them or raise the maximum")
        positions = batch.positions
        if positions is None:
            positions = jnp.arange(length, dtype=jnp.int32)[None]
        cfg = self.cfg
        tables = rotary(positions, cfg.head_dim, cfg.rope_theta, cfg.rope_scaling)
        return SequenceContext(tables, batch.segments)

    def _recur(
        self, x: Float[Array, "b l d"], row: SequenceContext, route: Route, trace: bool
    ) -> tuple[Float[Array, "b l d"], Routing | None, tuple[Array, ...]]:
        """The recursion stage: output, routing, and (traced) the outputs of its layers."""
        if self.shared is None:
            return x, None, ()
        stage = RecursionContext(self.cfg, self.shared, self.router, route, trace)
        if self.cfg.router.kind == "none":
            x, layers = run_plain(stage, x, row)
            return x, None, layers
        check_route(route, self.cfg.num_recursions)
        if self.cfg.router.kind == "expert":
            x, routing = run_expert(stage, x, row)
            return x, routing, tuple(v.output for v in routing.visits if v.output is not None)
        x, routing = run_token(stage, x, row)
        return x, routing, (x,)

    def logits(self, hidden: Float[Array, "... d"]) -> Float[Array, "... v"]:
        """Float32 logits of `ModelOutput.hidden`."""
        table = self.embed if self.head is None else self.head
        return unembed(hidden, table.weight[...])


def _through(
    stack: Stack | None, x: Float[Array, "b l d"], row: SequenceContext, trace: bool
) -> tuple[Float[Array, "b l d"], tuple[Array, ...]]:
    """A stack that every token passes once; nothing where the model has no such stack."""
    if stack is None:
        return x, ()
    x, kept = stack(x, row, keep=("outputs",) if trace else ())
    return x, tuple(kept.outputs) if trace else ()
