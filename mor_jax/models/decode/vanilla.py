"""Decoding for models whose tokens all take the same way: plain and recursive ones."""

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

from mor_jax.config import ModelConfig
from mor_jax.models.decode.batch import (
    AttentionAccess,
    DecodeBatch,
    PrefillChunk,
    all_tokens,
    run_layers,
)
from mor_jax.models.decode.decoder import Decoder
from mor_jax.models.decode.layer import apply, norm, project, rotary_tables
from mor_jax.models.decode.paged_cache import Cache, Pages, write
from mor_jax.types import Array, Float, Int


class LayerStep(NamedTuple):
    """One effective layer: its pool, its number there, the recursion, and its list's number."""

    pool: Literal["ends", "block"]
    layer: int
    recursion: int = 0
    list: int = 0


def steps(cfg: ModelConfig) -> list[LayerStep]:
    """Effective layers in the order in which they run."""
    size, nr = cfg.shared_layers, cfg.num_recursions
    pairs = [(s, r) for r in range(nr) for s in range(size)]
    if cfg.is_sequence:
        pairs = [(s, r) for s in range(size) for r in range(nr)]
    middle = [LayerStep("block", s, r, 0 if cfg.kv_mode == "shared" else r) for s, r in pairs]
    return [LayerStep("ends", 0), *middle, LayerStep("ends", 1)] if cfg.is_middle else middle


def decode(
    decoder: Decoder, cache: Cache, rows: DecodeBatch, token: Int[Array, "n"]
) -> tuple[Float[Array, "n d"], Cache]:
    """Hidden states, after the final norm, of one token of each of n sequences."""
    x, cache = _run(decoder, cache, rows, token)
    return norm(decoder.cfg, x, decoder.weights.norm, 0), cache


def prefill(decoder: Decoder, cache: Cache, piece: PrefillChunk, token: Int[Array, "n"]) -> Cache:
    """Stores n tokens of one sequence, whose predictions nobody asks for."""
    return _run(decoder, cache, piece, token, predicts=False)[1]


def _looks(
    decoder: Decoder, rows: DecodeBatch | PrefillChunk
) -> Callable[[LayerStep], AttentionAccess]:
    geometry, tables, chunk = decoder.geometry, decoder.tables, decoder.chunk
    ends, block = tables.ends[rows.slot], tables.block[rows.slot]
    made = [
        all_tokens(geometry, block[..., number, :], rows, chunk) for number in range(geometry.lists)
    ]
    at_ends = all_tokens(geometry, ends, rows, chunk) if geometry.end_layers else None

    def of(step: LayerStep) -> AttentionAccess:
        return at_ends if step.pool == "ends" else made[step.list]

    return of


def _run(
    decoder: Decoder,
    cache: Cache,
    rows: DecodeBatch | PrefillChunk,
    token: Int[Array, "n"],
    *,
    predicts: bool = True,
) -> tuple[Float[Array, "n d"], Cache]:
    cfg, weights, looks = decoder.cfg, decoder.weights, _looks(decoder, rows)
    x = weights.embed[token]
    tables = rotary_tables(cfg, rows.position)
    pools = {"ends": list(cache.ends), "block": list(cache.block)}
    way = steps(cfg)
    for step in way:
        layer = getattr(weights, step.pool)[step.layer]
        pool, look = pools[step.pool], looks(step)
        if cfg.kv_mode == "shared" and step.pool == "block" and step.recursion > 0:
            # Later recursions read what the first one stored.
            x = apply(cfg, layer, x, (tables, step.recursion), _reader(look, pool[step.layer]))
        elif step is way[-1] and not predicts:
            _, k, v = project(cfg, layer, x, tables, step.recursion)
            pool[step.layer] = write(pool[step.layer], look.place, k, v)
        else:
            here, at = (pool[step.layer],), (tables, step.recursion)
            x, (pool[step.layer],) = run_layers(cfg, (layer,), here, x, at, look)
    kept = dataclasses.replace(cache, ends=tuple(pools["ends"]), block=tuple(pools["block"]))
    return x, kept


def _reader(look: AttentionAccess, pages: Pages) -> Callable[..., Array]:
    def mix(q: Array, k: Array, v: Array) -> Array:
        return look.see(q, pages).result(q.dtype)

    return mix
