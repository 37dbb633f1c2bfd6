"""Chunked cross-entropy against the dense formula, router losses and what they are divided by."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.tiny import TINY, batch

from mor_jax.models.routing.outputs import ExpertSums, Routing, TokenSums
from mor_jax.training.losses import Counts, batch_counts, router_losses, text_loss
from mor_jax.types import IGNORE, Batch

WIDTH, VOCAB, LENGTH = 8, 11, 13


def inputs(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(3, LENGTH, WIDTH)), dtype)
    table = jnp.asarray(rng.normal(size=(VOCAB, WIDTH)), jnp.float32)
    targets = rng.integers(0, VOCAB, (3, LENGTH))
    targets[0, -4:] = targets[1] = IGNORE
    return hidden, table, jnp.asarray(targets, jnp.int32)


def dense_loss(hidden, table, targets, z_coeff):
    """The textbook formula, every logit at once. Also the parts, as in TextSums."""
    logits = jnp.einsum("bld,vd->blv", hidden, table)
    here = targets != IGNORE
    lse = jax.nn.logsumexp(logits, axis=-1)
    logp = jax.nn.log_softmax(logits)
    right = jnp.take_along_axis(logp, jnp.where(here, targets, 0)[..., None], -1)[..., 0]
    ce, z = -jnp.sum(right * here), jnp.sum(lse**2 * here)
    correct = jnp.sum((jnp.argmax(logits, -1) == targets) & here)
    return ce + z_coeff * z, (ce, z, correct)


@pytest.mark.parametrize("chunk", [None, 1, 5, 64])
def test_chunks_change_neither_the_loss_nor_its_gradients(chunk):
    hidden, table, targets = inputs()
    options = {"chunk": chunk, "z_coeff": 0.01}
    chunked = jax.jit(jax.value_and_grad(partial(text_loss, **options), (0, 1), has_aux=True))
    dense = jax.jit(jax.value_and_grad(partial(dense_loss, z_coeff=0.01), (0, 1), has_aux=True))
    (loss, sums), grads = chunked(hidden, table, targets)
    (want, (ce, z, correct)), want_grads = dense(hidden, table, targets)
    np.testing.assert_allclose(
        (loss, sums.ce, sums.z, sums.correct), (want, ce, z, correct), rtol=1e-6
    )
    assert 0 < correct < np.sum(np.asarray(targets) != IGNORE)
    for got, expected in zip(grads, want_grads, strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5)
    assert not np.any(grads[0][1])
    # Without gradients another function computes the loss.
    alone, _ = jax.jit(partial(text_loss, **options))(hidden, table, targets)
    np.testing.assert_allclose(alone, want, rtol=1e-6)


def test_the_gradient_follows_what_the_loss_is_multiplied_by():
    hidden, table, targets = inputs()
    grad = jax.jit(jax.grad(lambda s: text_loss(s * hidden, s * table, targets, 5)[0] / 7))
    want = jax.jit(jax.grad(lambda s: dense_loss(s * hidden, s * table, targets, 0.0)[0] / 7))
    np.testing.assert_allclose(grad(1.5), want(1.5), rtol=1e-5)


def test_bfloat16_hidden_states_keep_the_loss_and_the_table_gradient_in_float32():
    hidden, table, targets = inputs(jnp.bfloat16)
    run = jax.jit(jax.value_and_grad(partial(text_loss, chunk=4), (0, 1), has_aux=True))
    (loss, sums), (hidden_grad, table_grad) = run(hidden, table, targets)
    assert (loss.dtype, sums.ce.dtype, table_grad.dtype) == (jnp.float32,) * 3
    assert hidden_grad.dtype == jnp.bfloat16
    want, _ = jax.jit(dense_loss)(hidden.astype(jnp.float32), table, targets, 0.0)
    np.testing.assert_allclose(loss, want, rtol=1e-2)


def test_counts_leave_padding_out():
    cfg = TINY["expert"]
    rows = batch(cfg, 2, 16)
    assert batch_counts(cfg, rows, (16, 10, 5)).candidates.tolist() == [32, 32, 20]
    segments = jnp.asarray(np.arange(16)[None] < np.array([[16], [7]]), jnp.int32)
    targets = jnp.where(segments > 0, rows.targets, IGNORE)
    counts = batch_counts(cfg, Batch(rows.tokens, targets, segments), (16, 10, 5))
    assert (float(counts.targets), float(counts.tokens)) == (15 + 7, 16 + 7)
    # The row of 7 tokens never has more than 7 candidates, that of 16 what was kept before.
    assert counts.candidates.tolist() == [16 + 7, 16 + 7, 10 + 5 + 2]
    assert batch_counts(TINY["plain"], rows, (16,)).candidates is None


def expert_routing(**sums):
    filled = {f.name: jnp.zeros(3) for f in dataclasses.fields(ExpertSums)} | sums
    return Routing(jnp.zeros((1, 1), jnp.int32), ExpertSums(**filled), None, ())


@pytest.mark.parametrize(("aux", "weight"), [("aux_loss", 0.5), ("aux_router", 1.0), ("none", 0.0)])
def test_expert_losses_are_means_over_candidates_summed_over_recursions(aux, weight):
    cfg = TINY["expert"]
    router = dataclasses.replace(
        cfg.router, causal_routing=aux, aux_loss_coeff=0.5, z_loss_coeff=0.1
    )
    cfg = dataclasses.replace(cfg, router=router)
    routing = expert_routing(bce=jnp.array([8.0, 8.0, 3.0]), z=jnp.array([4.0, 0.0, 6.0]))
    counts = Counts(jnp.float32(9), jnp.float32(16), jnp.array([16.0, 8.0, 2.0]))
    total, terms = router_losses(cfg, routing, counts)
    assert float(terms["router_bce"]) == 0.5 + 1.0 + 1.5
    assert float(terms["router_z"]) == 0.25 + 0.0 + 3.0
    np.testing.assert_allclose(total, weight * 3.0 + 0.1 * 3.25, rtol=1e-6)


@pytest.mark.parametrize("balancing", ["loss", "loss_free", "none"])
def test_balancing_multiplies_mean_scores_with_the_share_of_each_depth(balancing):
    cfg = TINY["token"]
    router = dataclasses.replace(
        cfg.router, load_balancing=balancing, balance_loss_coeff=0.2, z_loss_coeff=0.1
    )
    cfg = dataclasses.replace(cfg, router=router)
    sums = TokenSums(
        weight=jnp.array([4.0, 3.0, 1.0]),
        choice=jnp.array([6.0, 2.0, 0.0]),
        z=jnp.float32(16.0),
        tokens=jnp.float32(8),
        overflow=jnp.zeros(3),
    )
    routing = Routing(jnp.zeros((1, 1), jnp.int32), None, sums, ())
    counts = Counts(jnp.float32(8), jnp.float32(8))
    total, terms = router_losses(cfg, routing, counts)
    assert float(terms["router_z"]) == 2.0
    if balancing != "loss":
        np.testing.assert_allclose(total, 0.1 * 2.0, rtol=1e-6)
        assert terms.keys() == {"router_z"}
        return
    balance = 3 * (0.5 * 0.75 + 0.375 * 0.25)
    np.testing.assert_allclose(terms["router_balance"], balance, rtol=1e-6)
    np.testing.assert_allclose(total, 0.2 * balance + 0.1 * 2.0, rtol=1e-6)
    # The share of the whole batch, where it is known, replaces that of the micro-batch.
    known = dataclasses.replace(counts, share=jnp.array([0.0, 0.0, 1.0]))
    _, terms = router_losses(cfg, routing, known)
    np.testing.assert_allclose(terms["router_balance"], 3 * 0.125, rtol=1e-6)
