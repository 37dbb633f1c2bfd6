"""Storing a piece of a prompt for a routed model, recursion by recursion.

The number of survivors is known to the device alone. The block therefore runs on small groups of
them in a loop whose rounds follow from that number: no shape depends on the data, and no token that
stopped is worked on.
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
    """What became of a piece. fits: its lists had room; otherwise nothing counts as stored.

    counts: entries of each list afterwards; `wanted`: what they would have been, up to the list
    that had no room. depth: recursions that each token went through.
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
    piece: PrefillChunk,
    token: Int[Array, "n"],
    lists: tuple[Int[Array, "lists"], Int[Array, "lists"]],
    group: int,
) -> tuple[Stored, Cache]:
    """Stores n tokens of one sequence, whose predictions nobody asks for.

    lists: entries that the sequence's lists hold, and those that they have room for. group: tokens
    that pass the block at one time.
    """
    cfg, weights = decoder.cfg, decoder.weights
    counts, room = lists
    tables = rotary_tables(cfg, piece.position)
    x = weights.embed[token]
    ends = decoder.geometry.end_layers > 0
    look = None
    if ends:
        of_all = decoder.tables.ends[piece.slot]
        look = all_tokens(decoder.geometry, of_all, piece, decoder.chunk)
        x, first = run_layers(cfg, weights.ends[:1], cache.ends[:1], x, (tables, 0), look)
        cache = dataclasses.replace(cache, ends=first + cache.ends[1:])
    depth = jnp.zeros(x.shape[0], jnp.int32)
    start = _Carry(cache, x, piece.valid, Stored(jnp.array(True), counts, counts, depth))
    choice = None
    if cfg.router.kind == "token":
        choice = causal_routing.token(cfg, weights.router or {}, x)

    def recursion(r: Array, carry: _Carry) -> _Carry:
        last = None if choice is None else choice[0]
        return _recursion(decoder, piece, (r, room, group, last), tables, carry)

    done = jax.lax.fori_loop(0, cfg.num_recursions, recursion, start)
    cache, stored, x_out = done.cache, done.stored, done.x
    if choice is not None:
        x_out = x + weighted_output(cfg, choice[1], x_out)
    if look is not None:
        _, k, v = project(cfg, weights.ends[1], x_out, tables, 0)
        cache = dataclasses.replace(
            cache, ends=(cache.ends[0], write(cache.ends[1], look.place, k, v))
        )
    kept = jnp.where(stored.fits, stored.counts, counts)
    return dataclasses.replace(stored, counts=kept), cache


def _recursion(
    decoder: Decoder,
    piece: PrefillChunk,
    how: tuple[Int[Array, ""], Int[Array, "lists"], int, Int[Array, "n"] | None],
    tables: RotaryTables,
    carry: _Carry,
) -> _Carry:
    """One recursion. how: its number, the lists' room, group, token-choice's depths."""
    cfg = decoder.cfg
    r, room, group, last = how
    if last is None:
        verdict = causal_routing.expert(
            cfg, decoder.weights.router or {}, decoder.thresholds, carry.x, r
        )
        taken, gate = carry.active & verdict.selected, verdict.gate
    else:
        taken, gate = carry.active & (last >= r), None
    runs = piece.valid & needs_block(cfg, taken, r)
    number = jnp.sum(runs, dtype=jnp.int32)
    old = carry.stored
    which = decoder.geometry.list_of(r)
    adds = jnp.sum(writes_list(cfg, runs, r), dtype=jnp.int32)
    fits = old.fits & (old.counts[which] + adds <= room[which])
    wanted = old.wanted.at[which].add(jnp.where(old.fits, adds, 0))
    number, adds = jnp.where(fits, number, 0), jnp.where(fits, adds, 0)
    order = jnp.argsort(~runs, stable=True).astype(jnp.int32)
    y, cache = _groups(decoder, piece, (r, number, group, order), tables, carry)
    if gate is not None:
        y = carry.x + weighted_output(cfg, gate, y)
    goes = taken & fits
    depth = old.depth + goes
    stored = Stored(fits, old.counts.at[which].add(adds), wanted, depth)
    return _Carry(cache, jnp.where(goes[:, None], y, carry.x), goes, stored)


def _groups(
    decoder: Decoder,
    piece: PrefillChunk,
    how: tuple[Int[Array, ""], Int[Array, ""], int, Int[Array, "n"]],
    tables: RotaryTables,
    carry: _Carry,
) -> tuple[Float[Array, "n d"], Cache]:
    """The block on the first `number` tokens of `order`, by groups; rows as in `carry.x`."""
    r, number, group, order = how
    n = order.shape[0]
    padded = jnp.pad(order, (0, -n % group))
    held = carry.stored.counts[decoder.geometry.list_of(r)]

    def one(i: Array, state: tuple[Array, Cache]) -> tuple[Array, Cache]:
        y, cache = state
        index = jax.lax.dynamic_slice_in_dim(padded, i * group, group)
        rank = i * group + jnp.arange(group, dtype=jnp.int32)
        live = rank < number
        rows = PrefillChunk(piece.slot, piece.position[index], live)
        at = (RotaryTables(tables.cos[:, index], tables.sin[:, index]), r)
        out, cache = block(decoder, cache, rows, carry.x[index], at, held + rank)
        return y.at[jnp.where(live, index, n)].set(out, mode="drop"), cache

    rounds = (number + group - 1) // group
    return jax.lax.fori_loop(0, rounds, one, (jnp.zeros_like(carry.x), carry.cache))
