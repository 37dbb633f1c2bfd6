"""What a layer keeps for its backward pass, and what it computes again.

Kept are the results of matrix products and of attention. Norms, activations and rotations are
single passes over an array: computing them again costs less than writing them out and reading
them back, and halves what a layer holds.
"""

from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from mor_jax.config import Remat
from mor_jax.types import Array

KEPT = "kept"

_named = jax.checkpoint_policies.save_only_these_names(KEPT)


def keep(x: Array) -> Array:
    """Marks a result as worth keeping. It has an effect inside `remat` only."""
    return checkpoint_name(x, KEPT)


def _policy(primitive: Any, *args: Any, **params: Any) -> Any:
    # cuDNN's kernel makes its own residuals, which cannot be marked.
    fused = primitive.name.startswith("dot_product_attention_fwd")
    return fused or _named(primitive, *args, **params)


def remat(layer: Any, how: Remat) -> Any:
    """`layer` with only what was marked kept for the backward pass; nothing unless how="none".

    For the body of a scan, which keeps the compiler from undoing the recomputation.
    """
    policy = _policy if how == "none" else None
    return jax.checkpoint(layer, prevent_cse=False, policy=policy)
