"""What routing saves: KV cache entries and FLOPs; tokens that are never selected."""

import dataclasses
from typing import Any

import numpy as np

from mor_jax.analysis.output_directory import number
from mor_jax.analysis.routing_record import RoutingRecord
from mor_jax.models.flops import flops, kv_bytes


def saving_records(observed: RoutingRecord) -> list[dict[str, Any]]:
    """One record per routing: KV cache entries and bytes per token, FLOPs of a forward pass.

    An entry is the keys and values of one token in one layer. Dense means all tokens at all
    effective layers. Bytes are in the run's configured dtype.
    """
    model = observed.model
    cfg = dataclasses.replace(model.model, dtype=model.found.cfg.model.dtype)
    length, ones = observed.rows.length, (1.0,) * cfg.num_recursions
    # With separate keys and values per recursion, a token has one entry per effective layer.
    dense = kv_bytes(dataclasses.replace(cfg, kv_mode="recursion"), length, ones)
    records = []
    for mode, one in observed.passes.items():
        shares = tuple(float((one.depth > r).mean()) for r in range(cfg.num_recursions))
        kept = kv_bytes(cfg, length, shares)
        work = flops(cfg, length, shares).forward() / flops(cfg, length, ones).forward()
        records.append(
            {
                "statistic": "savings",
                "routing": mode,
                "shares": [number(share) for share in shares],
                "dense_entries": cfg.num_layers,
                "entries": number(kept * cfg.num_layers / dense),
                "dense_bytes": number(dense),
                "bytes": number(kept),
                "saved": number(1 - kept / dense),
                "length": length,
                "work": number(work),
            }
        )
    return records


def dead_records(observed: RoutingRecord, min_count: int) -> list[dict[str, Any]]:
    """One record per routing: tokens, positions and token types that recursions never select.

    tokens: share of tokens that no recursion selects (depth 0). positions: share of positions that
    reach the last recursion in no sequence. kinds: share of the token types with at least
    `min_count` occurrences that never reach it; dead_kinds: their token IDs.
    """
    deepest, records = observed.model.model.num_recursions, []
    kinds, label = np.unique(observed.token, return_inverse=True)
    often = np.bincount(label) >= min_count
    rows = int(observed.row[-1]) + 1
    for mode, one in observed.passes.items():
        last = one.depth == deepest
        reached = np.zeros(observed.rows.length, bool)
        reached[observed.position[last]] = True
        there = np.unique(observed.position)
        alive = np.bincount(label, last, minlength=len(kinds)) > 0
        dead = kinds[often & ~alive]
        records.append(
            {
                "statistic": "dead",
                "routing": mode,
                "tokens": number((one.depth == 0).mean()),
                "positions": number((~reached[there]).mean()),
                "rows": rows,
                "kinds": number(len(dead) / often.sum()) if often.any() else None,
                "of_kinds": int(often.sum()),
                "min_count": min_count,
                "dead_kinds": dead.tolist(),
            }
        )
    return records
