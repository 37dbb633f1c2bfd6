"""Prefill of a chunk of a prompt for a routed model, recursion by recursion.

Only the device knows how many tokens each recursion selects. The block therefore runs on small
groups of selected tokens in a loop with as many rounds as they need: no shape depends on the data,
and no dropped token is processed.
"""

import dataclasses

import jax
import jax.numpy as jnp

from mor_jax.models.decode import causal_routing
from mor_jax.models.decode.batch import PrefillChunk, all_tokens, block, run_layers
from mor_jax.models.decode.decoder import Decoder
from mor_jax.models.decode.layer import project, rotary_tables
from mor_jax.models.decode.paged_cache import Cache, write
from mor_jax.models.decode.routed_decode import needs_block, weighted_output, writes_list
from mor_jax.models.layers.rope import RotaryTables
from mor_jax.types import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stored:
    """Result of a prefill. fits: the lists had free entries for it; otherwise nothing is stored.

    counts: entries of each list afterwards; wanted: entries that it required, up to the first list
    that was full. depth: recursions that each token went through.
    """

    fits: Bool[Array, ""]
    counts: Int[Array, "lists"]
    wanted: Int[Array, "lists"]
    depth: Int[Array, "n"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Carry:
    cache: Cache
    x: Float[Array, "n d"]
    active: Bool[Array, "n"]
    stored: Stored


def prefill(
    decoder: Decoder,
    cache: Cache,
    chunk: PrefillChunk,
    token: Int[Array, "n"],
    lists: tuple[Int[Array, "lists"], Int[Array, "lists"]],
    group: int,
) -> tuple[Stored, Cache]:
    """Stores keys and values of n tokens of one sequence; no logits are computed.

    lists: number of entries in each list of the sequence, and the most it can hold. group: tokens
    that pass the block at one time.
    """
    cfg, weights = decoder.cfg, decoder.weights
    counts, limits = lists
    tables = rotary_tables(cfg, chunk.position)
    x = weights.embed[token]
    ends = decoder.geometry.end_layers > 0
    access = None
    if ends:
        pages = decoder.tables.ends[chunk.slot]
        access = all_tokens(decoder.geometry, pages, chunk, decoder.chunk)
        x, first = run_layers(cfg, weights.ends[:1], cache.ends[:1], x, (tables, 0), access)
        cache = dataclasses.replace(cache, ends=first + cache.ends[1:])
    depth = jnp.zeros(x.shape[0], jnp.int32)
    start = _Carry(cache, x, chunk.valid, Stored(jnp.array(True), counts, counts, depth))
    choice = None
    if cfg.router.kind == "token":
        choice = causal_routing.token(cfg, weights.router or {}, x)

    def recursion(r: Array, carry: _Carry) -> _Carry:
        last = None if choice is None else choice[0]
        return _recursion(decoder, chunk, (r, limits, group, last), tables, carry)

    done = jax.lax.fori_loop(0, cfg.num_recursions, recursion, start)
    cache, stored, x_out = done.cache, done.stored, done.x
    if choice is not None:
        x_out = x + weighted_output(cfg, choice[1], x_out)
    if access is not None:
        _, k, v = project(cfg, weights.ends[1], x_out, tables, 0)
        cache = dataclasses.replace(
            cache, ends=(cache.ends[0], write(cache.ends[1], access.place, k, v))
        )
    kept = jnp.where(stored.fits, stored.counts, counts)
    return dataclasses.replace(stored, counts=kept), cache


def _recursion(
    decoder: Decoder,
    chunk: PrefillChunk,
    how: tuple[Int[Array, ""], Int[Array, "lists"], int, Int[Array, "n"] | None],
    tables: RotaryTables,
    carry: _Carry,
) -> _Carry:
    """One recursion. how: its number, most entries of the lists, group, depths of token-choice."""
    cfg = decoder.cfg
    r, limits, group, last = how
    if last is None:
        decision = causal_routing.expert(
            cfg, decoder.weights.router or {}, decoder.thresholds, carry.x, r
        )
        taken, gate = carry.active & decision.selected, decision.gate
    else:
        taken, gate = carry.active & (last >= r), None
    runs = chunk.valid & needs_block(cfg, taken, r)
    number = jnp.sum(runs, dtype=jnp.int32)
    old = carry.stored
    which = decoder.geometry.list_of(r)
    adds = jnp.sum(writes_list(cfg, runs, r), dtype=jnp.int32)
    fits = old.fits & (old.counts[which] + adds <= limits[which])
    wanted = old.wanted.at[which].add(jnp.where(old.fits, adds, 0))
    number, adds = jnp.where(fits, number, 0), jnp.where(fits, adds, 0)
    order = jnp.argsort(~runs, stable=True).astype(jnp.int32)
    y, cache = _groups(decoder, chunk, (r, number, group, order), tables, carry)
    if gate is not None:
        y = carry.x + weighted_output(cfg, gate, y)
    selected = taken & fits
    depth = old.depth + selected
    stored = Stored(fits, old.counts.at[which].add(adds), wanted, depth)
    return _Carry(cache, jnp.where(selected[:, None], y, carry.x), selected, stored)


def _groups(
    decoder: Decoder,
    chunk: PrefillChunk,
    how: tuple[Int[Array, ""], Int[Array, ""], int, Int[Array, "n"]],
    tables: RotaryTables,
    carry: _Carry,
) -> tuple[Float[Array, "n d"], Cache]:
    """Runs the block on the first `number` tokens of `order`, in groups; rows as in `carry.x`."""
    r, number, group, order = how
    n = order.shape[0]
    padded = jnp.pad(order, (0, -n % group))
    length = carry.stored.counts[decoder.geometry.list_of(r)]

    def one(i: Array, state: tuple[Array, Cache]) -> tuple[Array, Cache]:
        y, cache = state
        index = jax.lax.dynamic_slice_in_dim(padded, i * group, group)
        rank = i * group + jnp.arange(group, dtype=jnp.int32)
        valid = rank < number
        rows = PrefillChunk(chunk.slot, chunk.position[index], valid)
        at = (RotaryTables(tables.cos[:, index], tables.sin[:, index]), r)
        out, cache = block(decoder, cache, rows, carry.x[index], at, length + rank)
        return y.at[jnp.where(valid, index, n)].set(out, mode="drop"), cache

    rounds = (number + group - 1) // group
    return jax.lax.fori_loop(0, rounds, one, (jnp.zeros_like(carry.x), carry.cache))
