"""Array aliases, the batch, and the legend of dimension letters.

Letters in every shape annotation of this project:

    b  batch (sequences)          h  query heads
    l  sequence length            g  key/value heads
    c  tokens selected            k  head dimension
    n  candidates of a recursion  f  intermediate size of the MLP
    d  hidden size                v  vocabulary size
    r  recursions                 s  layers of the shared block
"""

import dataclasses
from typing import Any

import jax
from jaxtyping import Array, Bool, Float, Int

Params = dict[str, Any]
"""Nested dictionary of arrays: what checkpoints hold and the optimiser updates."""

IGNORE = -100
"""Target value of a position that carries no loss."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Packed sequences of tokens, the unit of training and of evaluation.

    tokens: the model's input.
    targets: the next token of each position, `IGNORE` where there is none.
    segments: document number within the sequence, counted from 1; 0 marks padding. `None` means
        one document per sequence without padding, and costs nothing.
    positions: position within the document, for the rotary embedding; `None` means 0 .. l-1.
    """

    tokens: Int[Array, "b l"]
    targets: Int[Array, "b l"]
    segments: Int[Array, "b l"] | None = None
    positions: Int[Array, "b l"] | None = None


__all__ = ["IGNORE", "Array", "Batch", "Bool", "Float", "Int", "Params"]
