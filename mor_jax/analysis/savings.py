"""What routing saves: KV cache entries and FLOPs; tokens that are never selected."""

import dataclasses
from typing import Any

import numpy as np

from mor_jax.analysis.output_directory import rounded
from mor_jax.analysis.routing_record import RoutingRecord
from mor_jax.models.flops import flops, kv_bytes


def saving_records(observed: RoutingRecord) -> list[dict[str, Any]]:
    """One record per routing: KV cache entries and bytes per token, FLOPs of a forward pass.

    An entry is the keys and values of one token in one layer. Dense means all tokens at all
    effective layers. Bytes are in the run's configured dtype.
    """
    model = observed.model
    cfg = dataclasses.replace(model.model, dtype=model.weights.cfg.model.dtype)
    length, ones = observed.sequences.length, (1.0,) * cfg.num_recursions
    # With separate keys and values per recursion, a token has one entry per effective layer.
    dense = kv_bytes(dataclasses.replace(cfg, kv_mode="recursion"), length, ones)
    records = []
    for mode, routing_pass in observed.passes.items():
        shares = tuple(float((routing_pass.depth > r).mean()) for r in range(cfg.num_recursions))
        stored = kv_bytes(cfg, length, shares)
        work = flops(cfg, length, shares).forward() / flops(cfg, length, ones).forward()
        records.append(
            {
                "statistic": "savings",
                "routing": mode,
                "shares": [rounded(share) for share in shares],
                "dense_entries": cfg.num_layers,
                "entries": rounded(stored * cfg.num_layers / dense),
                "dense_bytes": rounded(dense),
                "bytes": rounded(stored),
                "saved": rounded(1 - stored / dense),
                "length": length,
                "work": rounded(work),
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
    token_types, label = np.unique(observed.token, return_inverse=True)
    frequent = np.bincount(label) >= min_count
    num_sequences = int(observed.sequence[-1]) + 1
    for mode, routing_pass in observed.passes.items():
        last = routing_pass.depth == deepest
        reached = np.zeros(observed.sequences.length, bool)
        reached[observed.position[last]] = True
        positions = np.unique(observed.position)
        reached_last = np.bincount(label, last, minlength=len(token_types)) > 0
        dead_types = token_types[frequent & ~reached_last]
        records.append(
            {
                "statistic": "dead",
                "routing": mode,
                "tokens": rounded((routing_pass.depth == 0).mean()),
                "positions": rounded((~reached[positions]).mean()),
                "rows": num_sequences,
                "kinds": rounded(len(dead_types) / frequent.sum()) if frequent.any() else None,
                "of_kinds": int(frequent.sum()),
                "min_count": min_count,
                "dead_kinds": dead_types.tolist(),
            }
        )
    return records
