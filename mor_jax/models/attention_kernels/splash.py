"""Attention on TPU through JAX's splash kernel, which skips blocks that no query sees.

The compiler cannot partition the kernel, so under a mesh (`jax.set_mesh`) each device runs it on
its own sequences and heads: attention mixes neither, and no collective is needed.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    BlockSizes,
    CausalMask,
    MultiHeadMask,
    SegmentIds,
    make_splash_mha_single_device,
)

from mor_jax.distributed.collectives import free_spec
from mor_jax.models.layers.masks import AttentionMask, sees_any
from mor_jax.models.layers.remat import SAVED
from mor_jax.types import Array, Float, Int

LANES = 128
"""Width of a TPU vector register; every block is a multiple of it."""


def splash_attention(
    q: Float[Array, "b c h k"],
    k: Float[Array, "b n g k"],
    v: Float[Array, "b n g k"],
    visible: AttentionMask,
    interpret: bool = False,
) -> Float[Array, "b c h k"]:
    """See `attend` for the arguments; `interpret` runs the kernel in plain JAX, for tests.

    Raises:
        ValueError: the mesh does not divide the batch, the heads or the key/value heads.
    """
    run = partial(_one_device, interpret=interpret)
    mesh = jax.sharding.get_abstract_mesh()
    # Inside a shard_map over all axes these are the arrays of one device already.
    if mesh.empty or set(mesh.manual_axes) == set(mesh.axis_names):
        return run(q, k, v, visible)
    heads, keys = (free_spec("batch", None, name) for name in ("heads", "kv_heads"))
    specs = (heads, keys, keys, free_spec("batch"))
    open_axes = set(mesh.axis_names) - set(mesh.manual_axes)
    sharded = jax.shard_map(
        run, in_specs=specs, out_specs=heads, axis_names=open_axes, check_vma=False
    )
    return sharded(q, k, v, visible)


def _one_device(
    q: Array, k: Array, v: Array, visible: AttentionMask, interpret: bool
) -> Float[Array, "b c h k"]:
    """Attention of the arrays on one device.

    Lengths are padded at the end to whole blocks: causal order hides padded keys from every query,
    and padded queries are cut off.
    """
    c, n = q.shape[1], k.shape[1]
    c_block, n_block = _block(c), _block(n)
    queries, keys = -(-c // c_block) * c_block, -(-n // n_block) * n_block
    # A causal mask, shifted to the largest positions that q_index allows, decides what the kernel
    # skips; within the rest it compares the positions passed to it.
    offset = n - c
    mask = MultiHeadMask([CausalMask((queries, keys), offset)] * q.shape[2])
    sizes = _block_sizes(c_block, n_block)
    kernel = make_splash_mha_single_device(
        mask, block_sizes=sizes, interpret=interpret, residual_checkpoint_name=SAVED
    )

    def one_sequence(q: Array, k: Array, v: Array, ids: SegmentIds | None, index: Array | None):
        return _at_positions(kernel, index)(q, k, v, ids)

    ids, index = None, None
    if visible.q_segments is not None and visible.k_segments is not None:
        ids = SegmentIds(_pad(visible.q_segments, queries), _pad(visible.k_segments, keys))
    if visible.q_index is not None:
        index = _pad(visible.q_index - offset, queries)
    scaled = (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)
    heads = [_pad(x, size).swapaxes(1, 2) for x, size in ((scaled, queries), (k, keys), (v, keys))]
    out = jax.vmap(one_sequence)(*heads, ids, index).swapaxes(1, 2)[:, :c]
    sees = sees_any(visible)
    return out if sees is None else jnp.where(sees[:, :, None, None], out, 0)


def _at_positions(kernel, index: Int[Array, "c"] | None):
    """The kernel with queries at positions `index` instead of 0 .. c-1."""
    if index is None:
        return kernel
    infos = (kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info)
    return type(kernel)(*(info._replace(q_sequence=index) for info in infos), **kernel.kwargs)


def _block(length: int) -> int:
    """Block size for a length: large blocks are faster, small ones need less padding."""
    if length <= 2 * LANES:
        return LANES
    return 4 * LANES if -(-length // (2 * LANES)) % 2 == 0 else 2 * LANES


def _block_sizes(c: int, n: int) -> BlockSizes:
    return BlockSizes(
        block_q=c,
        block_kv=n,
        block_q_dkv=c,
        block_kv_dkv=n,
        block_q_dq=c,
        block_kv_dq=n,
    )


def _pad(x: Array, size: int) -> Array:
    """Zeros at the end of axis 1, up to `size`."""
    return jnp.pad(x, [(0, 0), (0, size - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
