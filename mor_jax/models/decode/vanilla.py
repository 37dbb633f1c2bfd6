"""Decoding for models without routing: vanilla and recursive ones."""

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
    """Effective layers in order of execution."""
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


def prefill(decoder: Decoder, cache: Cache, chunk: PrefillChunk, token: Int[Array, "n"]) -> Cache:
    """Stores keys and values of n tokens of one sequence; no logits are computed."""
    return _run(decoder, cache, chunk, token, predicts=False)[1]


def _layer_access(
    decoder: Decoder, rows: DecodeBatch | PrefillChunk
) -> Callable[[LayerStep], AttentionAccess]:
    geometry, tables, chunk = decoder.geometry, decoder.tables, decoder.chunk
    ends, block = tables.ends[rows.slot], tables.block[rows.slot]
    block_access = [
        all_tokens(geometry, block[..., number, :], rows, chunk) for number in range(geometry.lists)
    ]
    end_access = all_tokens(geometry, ends, rows, chunk) if geometry.end_layers else None

    def of(step: LayerStep) -> AttentionAccess:
        return end_access if step.pool == "ends" else block_access[step.list]

    return of


def _run(
    decoder: Decoder,
    cache: Cache,
    rows: DecodeBatch | PrefillChunk,
    token: Int[Array, "n"],
    *,
    predicts: bool = True,
) -> tuple[Float[Array, "n d"], Cache]:
    cfg, weights, access_of = decoder.cfg, decoder.weights, _layer_access(decoder, rows)
    x = weights.embed[token]
    tables = rotary_tables(cfg, rows.position)
    pools = {"ends": list(cache.ends), "block": list(cache.block)}
    layers = steps(cfg)
    for step in layers:
        layer = getattr(weights, step.pool)[step.layer]
        pool, access = pools[step.pool], access_of(step)
        if cfg.kv_mode == "shared" and step.pool == "block" and step.recursion > 0:
            # Later recursions read what the first one stored.
            x = apply(cfg, layer, x, (tables, step.recursion), _reader(access, pool[step.layer]))
        elif step is layers[-1] and not predicts:
            _, k, v = project(cfg, layer, x, tables, step.recursion)
            pool[step.layer] = write(pool[step.layer], access.place, k, v)
        else:
            pages, at = (pool[step.layer],), (tables, step.recursion)
            x, (pool[step.layer],) = run_layers(cfg, (layer,), pages, x, at, access)
    updated = dataclasses.replace(cache, ends=tuple(pools["ends"]), block=tuple(pools["block"]))
    return x, updated


def _reader(access: AttentionAccess, pages: Pages) -> Callable[..., Array]:
    def mix(q: Array, k: Array, v: Array) -> Array:
        return access.see(q, pages).result(q.dtype)

    return mix
