"""What a budget of FLOPs counts, and how many steps it pays for.

`training`: training FLOPs with routing, head included, causal attention halved; what
`mor accounting` prints. `paper`: the unit in which the paper's 2e18, 5e18 and 16.5e18 give
its numbers of steps (docs/accounting.md): forward FLOPs without the head, causal attention halved,
keys and values counted as wide as the queries.
"""

import dataclasses
from typing import Literal

from mor_jax.config import ModelConfig
from mor_jax.models.flops import flops

Unit = Literal["training", "paper"]

UNITS: dict[str, str] = {
    "training": "training FLOPs, routed, head included, causal attention halved",
    "paper": "forward FLOPs without the head, keys and values as wide as queries",
}
"""Descriptions for reports."""


def flops_per_token(cfg: ModelConfig, length: int, unit: Unit) -> float:
    """FLOPs per token of a sequence of `length` tokens, in the unit."""
    if unit == "training":
        return flops(cfg, length).training()
    wide = dataclasses.replace(cfg, num_kv_heads=cfg.num_heads)
    return flops(wide, length).forward(head=False)


def steps_for(budget: float, per_token: float, batch_tokens: int) -> int:
    """Optimiser steps of `batch_tokens` tokens that come nearest to the budget."""
    return round(budget / (per_token * batch_tokens))
