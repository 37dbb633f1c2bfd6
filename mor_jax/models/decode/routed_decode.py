"""Decoding for routed models: a token enters, goes through the block a few times, and leaves.

Rows of one call may stand at different recursions, because these share their weights (paper section
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
    """Where n tokens stand between two recursions.

    x: residual stream. origin: what token-choice started from (expert-choice: None). gate: score
    that weighs the next pass. last: token-choice's last recursion. recursion: the next one.
    taken: the router sends the token through it; without, the token is about to leave. depth:
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
        """n tokens that are nowhere."""
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
        """Of n tokens, all zero."""
        zeros = jnp.zeros((n, cfg.num_kv_heads, cfg.head_dim), jnp.dtype(cfg.dtype))
        return cls(zeros, zeros)


def enter(
    decoder: Decoder, cache: Cache, rows: DecodeBatch, token: Int[Array, "n"]
) -> tuple[TokenState, KVEntry]:
    """New tokens: embedding, first layer, and the routers' first word."""
    cfg, weights = decoder.cfg, decoder.weights
    x, entry = _end(decoder, cache, rows, weights.embed[token], 0)
    empty = TokenState.empty(cfg, x.shape[0])
    router = weights.router
    assert router is not None
    if cfg.router.kind == "token":
        last, gate = causal_routing.token(cfg, router, x)
        everyone = jnp.ones(x.shape[0], bool)
        flight = dataclasses.replace(empty, x=x, origin=x, gate=gate, last=last, taken=everyone)
        return flight, entry
    verdict = causal_routing.expert(cfg, router, decoder.thresholds, x, empty.recursion)
    return dataclasses.replace(empty, x=x, gate=verdict.gate, taken=verdict.selected), entry


def needs_block(
    cfg: ModelConfig, taken: Bool[Array, "n"], recursion: Int[Array, "*n"]
) -> Bool[Array, "n"]:
    """Tokens whose pass through the block does something. taken: the routers send them through.

    Shared keys and values are those of all tokens, also of such that recursion 0 does not take.
    """
    return taken if cfg.kv_mode == "recursion" else taken | (recursion == 0)


def writes_list(
    cfg: ModelConfig, runs: Bool[Array, "n"], recursion: Int[Array, "*n"]
) -> Bool[Array, "n"]:
    """Tokens, of those that run, whose pass adds an entry to a list of the block's pool."""
    return runs & (recursion == 0) if cfg.kv_mode == "shared" else runs


def advance(
    decoder: Decoder, cache: Cache, rows: DecodeBatch, flight: TokenState, counts: Int[Array, "n"]
) -> tuple[TokenState, Bool[Array, "n"], Cache]:
    """Every token once through the block; also which of them leave now, with their final `x`.

    counts: entries of the list that each row writes to. Rows that are not live stay as they are.
    """
    cfg = decoder.cfg
    runs = rows.valid & needs_block(cfg, flight.taken, flight.recursion)
    does = dataclasses.replace(rows, valid=runs)
    at = (rotary_tables(cfg, rows.position), flight.recursion)
    y, cache = block(decoder, cache, does, flight.x, at, counts)
    step = _token_step if cfg.router.kind == "token" else _expert_step
    after, leaves = step(decoder, flight, y)
    live = rows.valid
    merged = jax.tree.map(lambda new, old: where_tokens(live, new, old), after, flight)
    return merged, leaves & live, cache


def leave(
    decoder: Decoder, cache: Cache, rows: DecodeBatch, x: Float[Array, "n d"]
) -> tuple[Float[Array, "n d"], KVEntry]:
    """Last layer and final norm of tokens that left the block."""
    x, entry = _end(decoder, cache, rows, x, 1)
    return norm(decoder.cfg, x, decoder.weights.norm, 0), entry


def store(decoder: Decoder, cache: Cache, rows: DecodeBatch, entry: KVEntry, which: int) -> Cache:
    """The cache with the rows' entries of the first (0) or the last (1) layer."""
    geometry = decoder.geometry
    if not geometry.end_layers:
        return cache
    lists = decoder.tables.ends[rows.slot]
    place = CacheSlots.of(lists, rows.position, geometry.size, rows.valid)
    ends = list(cache.ends)
    ends[which] = write(ends[which], place, entry.k, entry.v)
    return dataclasses.replace(cache, ends=tuple(ends))


def _expert_step(
    decoder: Decoder, flight: TokenState, y: Float[Array, "n d"]
) -> tuple[TokenState, Bool[Array, "n"]]:
    """x + gate * block(x), then the next recursion's router."""
    cfg = decoder.cfg
    x = jnp.where(flight.taken[:, None], flight.x + weighted_output(cfg, flight.gate, y), flight.x)
    following = flight.recursion + 1
    asked = jnp.minimum(following, cfg.num_recursions - 1)
    verdict = causal_routing.expert(cfg, decoder.weights.router or {}, decoder.thresholds, x, asked)
    goes = flight.taken & (following < cfg.num_recursions) & verdict.selected
    depth = flight.depth + flight.taken
    after = dataclasses.replace(
        flight, x=x, gate=verdict.gate, recursion=following, taken=goes, depth=depth
    )
    return after, ~goes


def _token_step(
    decoder: Decoder, flight: TokenState, y: Float[Array, "n d"]
) -> tuple[TokenState, Bool[Array, "n"]]:
    """block(x) until the token's own depth, where it leaves as origin + weight * block(x)."""
    assert flight.origin is not None
    leaves = flight.recursion >= flight.last
    final = flight.origin + weighted_output(decoder.cfg, flight.gate, y)
    x = jnp.where(leaves[:, None], final, y)
    following = flight.recursion + 1
    depth = flight.depth + 1
    after = dataclasses.replace(flight, x=x, recursion=following, taken=~leaves, depth=depth)
    return after, leaves


def weighted_output(
    cfg: ModelConfig, gate: Float[Array, "n"], y: Float[Array, "n d"]
) -> Float[Array, "n d"]:
    """The block's output as it is added: multiplied by the score under `weighted` gating."""
    return gate[:, None].astype(y.dtype) * y if cfg.router.gating == "weighted" else y


def _end(
    decoder: Decoder, cache: Cache, rows: DecodeBatch, x: Float[Array, "n d"], which: int
) -> tuple[Float[Array, "n d"], KVEntry]:
    """The first (0) or the last (1) layer, where the model has them.

    The cache is only read: a branch of a program that wrote to it would have to copy it.
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
