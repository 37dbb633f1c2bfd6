"""Gather and scatter of tokens, and their gradients."""

import jax
import jax.numpy as jnp
import numpy as np

from mor_jax.models.layers.token_gather import TokenGather

INDEX = jnp.asarray([[1, 3, 4], [0, 2, 5]], jnp.int32)
VALID = jnp.asarray([[True, True, True], [True, False, True]])
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 2)), jnp.float32)


def test_tokens_are_gathered_and_scattered_back_to_their_positions():
    tokens = TokenGather.of(INDEX, VALID, 6)
    gathered = tokens.gather(X)
    np.testing.assert_array_equal(gathered[1], X[1, np.array([0, 2, 5])])
    scattered = np.array(tokens.scatter(X, gathered + 100))
    want = np.array(X)
    want[0, [1, 3, 4]] += 100
    # Slot 1 of the second sequence is padding: gathered, but never scattered.
    want[1, [0, 5]] += 100
    np.testing.assert_allclose(scattered, want, rtol=1e-6)
    np.testing.assert_array_equal(tokens.selected[1], [True, False, False, False, False, True])


def test_gradients_equal_those_of_indexing():
    tokens, weights = TokenGather.of(INDEX, VALID, 6), jnp.cos(jnp.arange(24.0)).reshape(2, 6, 2)
    batch = jnp.arange(2)[:, None]
    # Padding points nowhere: indices beyond the sequence are dropped.
    aim = jnp.where(VALID, INDEX, 6)

    def ours(x):
        return jnp.sum(weights * tokens.scatter(x * x, jnp.sin(tokens.gather(x))))

    def plain(x):
        gathered = x.at[batch, aim].get(mode="fill", fill_value=0)
        return jnp.sum(weights * (x * x).at[batch, aim].set(jnp.sin(gathered), mode="drop"))

    got, want = jax.jit(jax.value_and_grad(ours))(X), jax.jit(jax.value_and_grad(plain))(X)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-5, atol=1e-6)


def test_without_padding_every_slot_is_scattered():
    tokens = TokenGather.of(INDEX, None, 6)
    assert tokens.selected.sum(axis=1).tolist() == [3, 3]
    np.testing.assert_array_equal(tokens.scatter(X, tokens.gather(X)), X)
