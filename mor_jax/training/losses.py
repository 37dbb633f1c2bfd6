"""Losses: arrays and sums in, scalars out.

Cross-entropy is computed in chunks of positions, so the float32 logits of all tokens never exist
at once. Sums are divided by the counts of the global batch, so that the split into
micro-batches never changes a result.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from mor_jax.config import ModelConfig
from mor_jax.distributed.collectives import psum_batch
from mor_jax.models.layers.embedding import unembed
from mor_jax.models.routing.outputs import Routing
from mor_jax.types import IGNORE, Array, Batch, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TextSums:
    """Sums over the tokens that have a target, float32.

    ce: cross-entropy in nats. z: squared log-partition. correct: targets ranked first.
    """

    ce: Float[Array, ""]
    z: Float[Array, ""]
    correct: Float[Array, ""]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Counts:
    """What the sums of one optimiser step are divided by, over the global batch.

    targets: tokens with a target. tokens: tokens without padding. candidates: tokens that
    each recursion chose from (expert-choice), else None. share: fraction of tokens that chose
    each depth, for the balancing loss of token-choice; None: that of the forward pass itself.
    """

    targets: Float[Array, ""]
    tokens: Float[Array, ""]
    candidates: Float[Array, "r"] | None = None
    share: Float[Array, "r"] | None = None


def batch_counts(cfg: ModelConfig, batch: Batch, kept: tuple[int, ...]) -> Counts:
    """Counts of a batch. kept: token slots of each recursion per sequence (expert-choice)."""
    present = jnp.full(batch.tokens.shape[:1], batch.tokens.shape[1], jnp.float32)
    if batch.segments is not None:
        present = jnp.sum(batch.segments > 0, axis=1, dtype=jnp.float32)
    candidates = None
    if cfg.router.kind == "expert":
        room = (batch.tokens.shape[1], *kept[:-1])
        candidates = jnp.stack([jnp.sum(jnp.minimum(present, float(c))) for c in room])
    targets = jnp.sum(batch.targets != IGNORE, dtype=jnp.float32)
    return Counts(targets, jnp.sum(present), candidates)


def text_loss(
    hidden: Float[Array, "b l d"],
    table: Float[Array, "v d"],
    targets: Int[Array, "b l"],
    chunk: int | None,
    z_coeff: float = 0.0,
) -> tuple[Float[Array, ""], TextSums]:
    """Sum over targets of cross-entropy + z_coeff * log-partition^2, and its parts.

    hidden: after the final norm. table: the output projection. chunk: positions of each
    sequence per chunk. Gradients of both arrays are computed together with the loss, while the
    logits of a chunk exist; only the first result carries a gradient.
    """
    length = hidden.shape[1]
    size = length if chunk is None else min(chunk, length)
    spare = -length % size
    hidden = jnp.pad(hidden, ((0, 0), (0, spare), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, spare)), constant_values=IGNORE)
    return _chunked_loss(hidden, table, targets, size, z_coeff)


def token_losses(
    hidden: Float[Array, "b l d"],
    table: Float[Array, "v d"],
    targets: Int[Array, "b l"],
    chunk: int | None,
) -> tuple[Float[Array, "b l"], Bool[Array, "b l"]]:
    """Cross-entropy of each target, nats, and whether it ranks first; 0 and False without target.

    Arguments as in `text_loss`. Of equal logits the first one ranks first, as in an argmax.
    For evaluation: it has no gradient.
    """
    length = hidden.shape[1]
    size = length if chunk is None else min(chunk, length)
    spare = -length % size
    hidden = jnp.pad(hidden, ((0, 0), (0, spare), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, spare)), constant_values=IGNORE)

    def one(chunk: tuple[Array, Array]) -> tuple[Array, Array]:
        logits, here = unembed(chunk[0], table), chunk[1] != IGNORE
        wanted = jnp.where(here, chunk[1], 0)
        right = jnp.take_along_axis(logits, wanted[..., None], axis=-1)[..., 0]
        ce = jax.nn.logsumexp(logits, axis=-1) - right
        return jnp.where(here, ce, 0.0), here & (jnp.argmax(logits, axis=-1) == wanted)

    parts = jax.lax.map(one, (_chunks(hidden, size), _chunks(targets, size)))
    ce, hit = (jnp.moveaxis(x, 0, 1).reshape(-1, length + spare)[:, :length] for x in parts)
    return ce, hit


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _chunked_loss(hidden, table, targets, size, z_coeff):
    def body(total: tuple[Array, TextSums], chunk: tuple[Array, Array]):
        loss, sums, _ = _chunk_loss(*chunk, table, z_coeff)
        return jax.tree.map(jnp.add, total, (loss, sums)), None

    chunks = (_chunks(hidden, size), _chunks(targets, size))
    return jax.lax.scan(body, _zeros(), chunks)[0]


def _loss_fwd(hidden, table, targets, size, z_coeff):
    def body(carry: tuple[tuple[Array, TextSums], Array], chunk: tuple[Array, Array]):
        total, table_grad = carry
        loss, sums, slope = _chunk_loss(*chunk, table, z_coeff)
        narrow = slope.astype(hidden.dtype)
        hidden_grad = jnp.einsum("blv,vd->bld", narrow, table.astype(hidden.dtype))
        table_grad = table_grad + jnp.einsum(
            "bld,blv->dv", chunk[0], narrow, preferred_element_type=jnp.float32
        )
        return (jax.tree.map(jnp.add, total, (loss, sums)), table_grad), hidden_grad

    chunks = (_chunks(hidden, size), _chunks(targets, size))
    # Summed as (d, v): for (v, d) a CPU would transpose the slope of every chunk.
    start = (_zeros(), jnp.zeros(table.shape[::-1], jnp.float32))
    (total, table_grad), hidden_grads = jax.lax.scan(body, start, chunks)
    hidden_grad = jnp.moveaxis(hidden_grads, 0, 1).reshape(hidden.shape)
    return total, (hidden_grad, table_grad.T.astype(table.dtype))


def _loss_bwd(size, z_coeff, grads, slopes):
    hidden_grad, table_grad = grads
    slope = slopes[0]
    hidden_grad, table_grad = ((slope * g).astype(g.dtype) for g in (hidden_grad, table_grad))
    return hidden_grad, table_grad, None


_chunked_loss.defvjp(_loss_fwd, _loss_bwd)


def _zeros() -> tuple[Array, TextSums]:
    zero = jnp.zeros((), jnp.float32)
    return zero, TextSums(zero, zero, zero)


def _chunks(x: Array, size: int) -> Array:
    b, length = x.shape[:2]
    return jnp.moveaxis(x.reshape(b, length // size, size, *x.shape[2:]), 1, 0)


def _chunk_loss(
    hidden: Array, targets: Array, table: Array, z_coeff: float
) -> tuple[Array, TextSums, Array]:
    """Loss of a chunk, its parts, and the slope of the loss along the chunk's logits."""
    logits = unembed(hidden, table)
    here = (targets != IGNORE).astype(jnp.float32)
    top = jnp.max(logits, axis=-1, keepdims=True)
    lse = jax.nn.logsumexp(logits, axis=-1)
    hit = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2) == targets[..., None]
    right = jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)
    ce, z = jnp.sum((lse - right) * here), jnp.sum(lse * lse * here)
    correct = jnp.sum((right >= top[..., 0]) * here)
    pull = (1.0 + 2.0 * z_coeff * lse)[..., None]
    slope = (jnp.exp(logits - lse[..., None]) * pull - hit) * here[..., None]
    return ce + z_coeff * z, TextSums(ce, z, correct), slope


def router_losses(
    cfg: ModelConfig, routing: Routing, counts: Counts
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The weighted sum of all router losses, and each by name, unweighted (paper, appendix).

    expert: `router_bce` (against the choice; with an auxiliary router it trains that one alone, at
    weight 1) and `router_z`, each the sum over recursions of the mean over candidates.
    token: `router_z`, and with balancing by loss `router_balance` (Nr * sum of mean score times
    share), which is no sum over micro-batches and therefore reported only where it is trained.
    """
    router = cfg.router
    if routing.expert is not None and counts.candidates is not None:
        bce = jnp.sum(routing.expert.bce / counts.candidates)
        z = jnp.sum(routing.expert.z / counts.candidates)
        weight = {"aux_loss": router.aux_loss_coeff, "aux_router": 1.0, "none": 0.0}[
            router.causal_routing
        ]
        return weight * bce + router.z_loss_coeff * z, {"router_bce": bce, "router_z": z}
    sums = routing.token
    assert sums is not None
    z = sums.z / counts.tokens
    if router.load_balancing != "loss":
        return router.z_loss_coeff * z, {"router_z": z}
    share = counts.share
    if share is None:
        share = psum_batch(jax.lax.stop_gradient(sums.choice)) / counts.tokens
    balance = cfg.num_recursions * jnp.sum(
        sums.weight / counts.tokens * jax.lax.stop_gradient(share)
    )
    total = router.balance_loss_coeff * balance + router.z_loss_coeff * z
    return total, {"router_balance": balance, "router_z": z}
