"""Decoding for routed models: a token enters, passes the shared block several times, and exits.

Rows of one call may be at different recursions, because these share their weights (paper section
2.2.2, continuous depth-wise batching). Routing is causal.
"""

import dataclasses

import jax
import jax.numpy as jnp

from mor_jax.config import ModelConfig
from mor_jax.models.decode import causal_routing
from mor_jax.models.decode.attention import Queue, Softmax, by_queue
from mor_jax.models.decode.batch import DecodeBatch, block
from mor_jax.models.decode.decoder import Decoder
from mor_jax.models.decode.layer import apply, norm, rotary_tables
from mor_jax.models.decode.paged_cache import Cache, CacheSlots, write
from mor_jax.models.layers.token_gather import where_tokens
from mor_jax.types import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenState:
    """State of n tokens between two recursions.

    x: residual stream. origin: input of recursion 0 for token-choice (expert-choice: None). gate:
    score of the next pass. last: last recursion that token-choice chose. recursion: the next one.
    taken: whether the router selected the token for it; otherwise the token exits next. depth:
    recursions that it went through.
    """

    x: Float[Array, "n d"]
    origin: Float[Array, "n d"] | None
    gate: Float[Array, "n"]
    last: Int[Array, "n"]
    recursion: Int[Array, "n"]
    taken: Bool[Array, "n"]
    depth: Int[Array, "n"]

    @classmethod
    def empty(cls, cfg: ModelConfig, n: int) -> "TokenState":
        """n unused entries."""
        x = jnp.zeros((n, cfg.hidden_size), jnp.dtype(cfg.dtype))
        number = jnp.zeros(n, jnp.int32)
        origin = x if cfg.router.kind == "token" else None
        return cls(x, origin, jnp.zeros(n), number, number, jnp.zeros(n, bool), number)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVEntry:
    """Keys and values of n tokens in one layer, not stored yet."""

    k: Float[Array, "n g k"]
    v: Float[Array, "n g k"]

    @classmethod
    def empty(cls, cfg: ModelConfig, n: int) -> "KVEntry":
        """Zeros for n tokens."""
        zeros = jnp.zeros((n, cfg.num_kv_heads, cfg.head_dim), jnp.dtype(cfg.dtype))
        return cls(zeros, zeros)


def enter(
    decoder: Decoder, cache: Cache, rows: DecodeBatch, token: Int[Array, "n"]
) -> tuple[TokenState, KVEntry]:
    """Starts new tokens: embedding, first layer, and the first routing decision."""
    cfg, weights = decoder.cfg, decoder.weights
    x, entry = _end(decoder, cache, rows, weights.embed[token], 0)
    empty = TokenState.empty(cfg, x.shape[0])
    router = weights.router
    assert router is not None
    if cfg.router.kind == "token":
        last, gate = causal_routing.token(cfg, router, x)
        all_selected = jnp.ones(x.shape[0], bool)
        state = dataclasses.replace(empty, x=x, origin=x, gate=gate, last=last, taken=all_selected)
        return state, entry
    decision = causal_routing.expert(cfg, router, decoder.thresholds, x, empty.recursion)
    return dataclasses.replace(empty, x=x, gate=decision.gate, taken=decision.selected), entry


def needs_block(
    cfg: ModelConfig, taken: Bool[Array, "n"], recursion: Int[Array, "*n"]
) -> Bool[Array, "n"]:
    """Tokens whose pass through the block has an effect. taken: the routers selected them.

    Shared keys and values are those of all tokens, even if recursion 0 does not select them.
    """
    return taken if cfg.kv_mode == "recursion" else taken | (recursion == 0)


def writes_list(
    cfg: ModelConfig, runs: Bool[Array, "n"], recursion: Int[Array, "*n"]
) -> Bool[Array, "n"]:
    """Tokens among those that run whose pass adds an entry to a list of the block's pool."""
    return runs & (recursion == 0) if cfg.kv_mode == "shared" else runs


def advance(
    decoder: Decoder, cache: Cache, rows: DecodeBatch, state: TokenState, counts: Int[Array, "n"]
) -> tuple[TokenState, Bool[Array, "n"], Cache]:
    """Runs every token once through the block; also returns which exit now, with their final `x`.

    counts: entries of the list that each row writes to. Padding rows do not change.
    """
    cfg = decoder.cfg
    runs = rows.valid & needs_block(cfg, state.taken, state.recursion)
    active = dataclasses.replace(rows, valid=runs)
    at = (rotary_tables(cfg, rows.position), state.recursion)
    y, cache = block(decoder, cache, active, state.x, at, counts)
    step = _token_step if cfg.router.kind == "token" else _expert_step
    after, exits = step(decoder, state, y)
    valid = rows.valid
    merged = jax.tree.map(lambda new, old: where_tokens(valid, new, old), after, state)
    return merged, exits & valid, cache


def leave(
    decoder: Decoder, cache: Cache, rows: DecodeBatch, x: Float[Array, "n d"]
) -> tuple[Float[Array, "n d"], KVEntry]:
    """Last layer and final norm of tokens that exited the block."""
    x, entry = _end(decoder, cache, rows, x, 1)
    return norm(decoder.cfg, x, decoder.weights.norm, 0), entry


def store(decoder: Decoder, cache: Cache, rows: DecodeBatch, entry: KVEntry, which: int) -> Cache:
    """Writes the rows' entries of the first (0) or the last (1) layer."""
    geometry = decoder.geometry
    if not geometry.end_layers:
        return cache
    lists = decoder.tables.ends[rows.slot]
    place = CacheSlots.of(lists, rows.position, geometry.size, rows.valid)
    ends = list(cache.ends)
    ends[which] = write(ends[which], place, entry.k, entry.v)
    return dataclasses.replace(cache, ends=tuple(ends))


def _expert_step(
    decoder: Decoder, state: TokenState, y: Float[Array, "n d"]
) -> tuple[TokenState, Bool[Array, "n"]]:
    """x + gate * block(x), then the next recursion's router."""
    cfg = decoder.cfg
    x = jnp.where(state.taken[:, None], state.x + weighted_output(cfg, state.gate, y), state.x)
    next_recursion = state.recursion + 1
    recursion = jnp.minimum(next_recursion, cfg.num_recursions - 1)
    decision = causal_routing.expert(
        cfg, decoder.weights.router or {}, decoder.thresholds, x, recursion
    )
    selected = state.taken & (next_recursion < cfg.num_recursions) & decision.selected
    depth = state.depth + state.taken
    after = dataclasses.replace(
        state, x=x, gate=decision.gate, recursion=next_recursion, taken=selected, depth=depth
    )
    return after, ~selected


def _token_step(
    decoder: Decoder, state: TokenState, y: Float[Array, "n d"]
) -> tuple[TokenState, Bool[Array, "n"]]:
    """block(x) until the token's own depth, where it exits as origin + weight * block(x)."""
    assert state.origin is not None
    exits = state.recursion >= state.last
    final = state.origin + weighted_output(decoder.cfg, state.gate, y)
    x = jnp.where(exits[:, None], final, y)
    next_recursion = state.recursion + 1
    depth = state.depth + 1
    after = dataclasses.replace(state, x=x, recursion=next_recursion, taken=~exits, depth=depth)
    return after, exits


def weighted_output(
    cfg: ModelConfig, gate: Float[Array, "n"], y: Float[Array, "n d"]
) -> Float[Array, "n d"]:
    """The block's output, multiplied by the score under `weighted` gating."""
    return gate[:, None].astype(y.dtype) * y if cfg.router.gating == "weighted" else y


def _end(
    decoder: Decoder, cache: Cache, rows: DecodeBatch, x: Float[Array, "n d"], which: int
) -> tuple[Float[Array, "n d"], KVEntry]:
    """The first (0) or the last (1) layer, if the model has them.

    The cache is only read: a `lax.cond` branch that wrote to it would have to copy it.
    """
    geometry, cfg = decoder.geometry, decoder.cfg
    entries = [KVEntry.empty(cfg, x.shape[0])]
    if not geometry.end_layers:
        return x, entries[-1]
    before = jnp.where(rows.valid, rows.position, 0)
    queue = Queue.of(decoder.tables.ends[rows.slot], before, geometry.size, decoder.chunk)

    def mix(q: Array, k: Array, v: Array) -> Array:
        entries.append(KVEntry(k, v))
        seen = by_queue(Softmax.own(q, k, v), q, cache.ends[which], queue)
        return seen.result(x.dtype)

    x = apply(cfg, decoder.weights.ends[which], x, (rotary_tables(cfg, rows.position), 0), mix)
    return x, entries[-1]
