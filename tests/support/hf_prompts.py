"""Rows of unequal length, padded on the left: what every test of `generate` starts from."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

PROMPT = 20


def prompts(vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Three seeded rows of 20, 13 and 7 tokens, and their mask, int64 [3 20]."""
    ids = np.random.default_rng(0).integers(0, vocab_size, (3, PROMPT))
    mask = np.arange(PROMPT)[None] >= np.array([[0], [7], [13]])
    return torch.from_numpy(ids), torch.from_numpy(mask.astype(np.int64))


def forced(rows: Any) -> Callable[[int, torch.Tensor], list[int]]:
    """For `generate(prefix_allowed_tokens_fn=...)`: what `rows` say, and nothing else."""
    return lambda row, seen: [int(rows[row][len(seen)])]
