"""What a layer keeps for its backward pass, and what it computes again.

Kept are the results of matrix products and of attention. Norms, activations and rotations are
single passes over an array: computing them again costs less than writing them out and reading
them back, and halves what a layer holds.
"""

from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from mor_jax.config import Remat
from mor_jax.config.parsing import check
from mor_jax.distributed.mesh import platform
from mor_jax.types import Array

KEPT, WIDE, INPUT = "kept", "wide", "input"

_POLICIES = jax.checkpoint_policies


def save_output(x: Array) -> Array:
    """Marks a result as worth keeping. It has an effect inside `remat` only."""
    return checkpoint_name(x, KEPT)


def save_wide_output(x: Array) -> Array:
    """Marks one of the two widest results, the MLP's, which "block" computes again."""
    return checkpoint_name(x, WIDE)


def layer_input(x: Array) -> Array:
    """Marks what a layer starts from, which "offload" keeps in the host's memory."""
    return checkpoint_name(x, INPUT)


def remat(layer: Any, how: Remat) -> Any:
    """`layer`, a scan's body, with only some results kept for the backward pass.

    none: all that are marked. block: without the wide ones. full: its input. offload: its input, in
    the memory of the host.

    Raises:
        ValueError: the platform cannot offload.
    """
    check_remat(how)
    # A scan's body: the loop keeps the compiler from undoing the recomputation.
    return jax.checkpoint(layer, prevent_cse=False, policy=_policy(how))


def check_remat(how: Remat) -> None:
    """Raises `ValueError` where the platform cannot do it."""
    rule = "needs a device beside the host, a CPU is the host itself"
    ok = how != "offload" or platform() != "cpu"
    check(ok, "model.remat", how, rule, "Use 'full'")


def _policy(how: Remat) -> Any:
    if how == "full":
        return None
    if how == "offload":
        return _POLICIES.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[INPUT],
            offload_src="device",
            offload_dst="pinned_host",
        )
    names = (KEPT, WIDE) if how == "none" else (KEPT,)
    named = _POLICIES.save_only_these_names(*names)

    def policy(primitive: Any, *args: Any, **params: Any) -> Any:
        # cuDNN's kernel makes its own residuals, which cannot be marked.
        fused = primitive.name.startswith("dot_product_attention_fwd")
        return fused or named(primitive, *args, **params)

    return policy
