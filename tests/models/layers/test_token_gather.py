"""Taking rows and putting them back, and that gradients go the same way."""

import jax
import jax.numpy as jnp
import numpy as np

from mor_jax.models.layers.token_gather import TokenGather

INDEX = jnp.asarray([[1, 3, 4], [0, 2, 5]], jnp.int32)
VALID = jnp.asarray([[True, True, True], [True, False, True]])
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 2)), jnp.float32)


def test_rows_are_taken_and_put_back_where_they_were():
    rows = TokenGather.of(INDEX, VALID, 6)
    taken = rows.gather(X)
    np.testing.assert_array_equal(taken[1], X[1, np.array([0, 2, 5])])
    put = np.array(rows.scatter(X, taken + 100))
    want = np.array(X)
    want[0, [1, 3, 4]] += 100
    # Slot 1 of the second row is a filler: read, but never put back.
    want[1, [0, 5]] += 100
    np.testing.assert_allclose(put, want, rtol=1e-6)
    np.testing.assert_array_equal(rows.chosen[1], [True, False, False, False, False, True])


def test_gradients_equal_those_of_indexing():
    rows, weights = TokenGather.of(INDEX, VALID, 6), jnp.cos(jnp.arange(24.0)).reshape(2, 6, 2)
    batch = jnp.arange(2)[:, None]
    # Fillers point nowhere: indices beyond the row are dropped.
    aim = jnp.where(VALID, INDEX, 6)

    def ours(x):
        return jnp.sum(weights * rows.scatter(x * x, jnp.sin(rows.gather(x))))

    def plain(x):
        taken = x.at[batch, aim].get(mode="fill", fill_value=0)
        return jnp.sum(weights * (x * x).at[batch, aim].set(jnp.sin(taken), mode="drop"))

    got, want = jax.jit(jax.value_and_grad(ours))(X), jax.jit(jax.value_and_grad(plain))(X)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-6)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-5, atol=1e-6)


def test_without_fillers_every_slot_counts():
    rows = TokenGather.of(INDEX, None, 6)
    assert rows.chosen.sum(axis=1).tolist() == [3, 3]
    np.testing.assert_array_equal(rows.scatter(X, rows.gather(X)), X)
