"""Rematerialisation: what a layer saves for its backward pass, and what it recomputes.

The results of matrix products and of attention are saved. Norms, activations and rotations are
single passes over an array: recomputing them costs less than writing and reading them, and halves
what a layer saves.
"""

from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from mor_jax.config import Remat
from mor_jax.config.parsing import check
from mor_jax.distributed.mesh import platform
from mor_jax.types import Array

SAVED, WIDE, INPUT = "saved", "wide", "input"

_POLICIES = jax.checkpoint_policies


def save_output(x: Array) -> Array:
    """Marks a result to be saved for the backward pass. Has an effect inside `remat` only."""
    return checkpoint_name(x, SAVED)


def save_wide_output(x: Array) -> Array:
    """Marks one of the two widest results, those of the MLP, which "block" recomputes."""
    return checkpoint_name(x, WIDE)


def layer_input(x: Array) -> Array:
    """Marks the input of a layer, which "offload" saves in host memory."""
    return checkpoint_name(x, INPUT)


def remat(layer: Any, how: Remat) -> Any:
    """`layer`, the body of a scan, which saves only some results for the backward pass.

    how: `none` saves all marked results, `block` all but the wide ones, `full` only the input, and
    `offload` only the input, in host memory.

    Raises:
        ValueError: the platform cannot offload.
    """
    check_remat(how)
    # In the body of a scan, the loop keeps the compiler from undoing the recomputation.
    return jax.checkpoint(layer, prevent_cse=False, policy=_policy(how))


def check_remat(how: Remat) -> None:
    """Raises `ValueError` if the platform does not support it."""
    rule = "needs a device other than the host CPU"
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
    names = (SAVED, WIDE) if how == "none" else (SAVED,)
    named = _POLICIES.save_only_these_names(*names)

    def policy(primitive: Any, *args: Any, **params: Any) -> Any:
        # cuDNN's kernel computes its own residuals, which cannot be marked.
        fused = primitive.name.startswith("dot_product_attention_fwd")
        return fused or named(primitive, *args, **params)

    return policy
