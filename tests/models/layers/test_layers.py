"""Normalisation, rotary embedding and the output projection on their own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mor_jax.config import RopeScaling
from mor_jax.models.layers.embedding import unembed
from mor_jax.models.layers.mlp import gated_mlp
from mor_jax.models.layers.norm import rms_norm
from mor_jax.models.layers.rope import apply_rope, compute_rotary_tables, frequencies


def test_rms_norm_works_in_float32_and_scales_in_the_dtype_of_its_input():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 8)) * 1e-3, jnp.bfloat16)
    scale = jnp.linspace(0.5, 2.0, 8)
    got = rms_norm(x, scale, 1e-5)
    wide = np.asarray(x, np.float64)
    normed = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5)
    assert got.dtype == jnp.bfloat16
    # Two roundings to bfloat16 (8 bits), one before and one after the scale.
    np.testing.assert_allclose(np.asarray(got, np.float64), normed * np.asarray(scale), rtol=2**-7)
    assert not np.any(rms_norm(jnp.zeros((1, 8)), scale, 1e-5))


def textbook_norm(x, scale):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) * scale[None, None]


def textbook_mlp(x, gate, up, down):
    g, u = x @ gate, x @ up
    return (g / (1 + jnp.exp(-g)) * u) @ down


@pytest.mark.parametrize(
    ("ours", "textbook", "shapes"),
    [
        (lambda x, scale: rms_norm(x, scale, 1e-5), textbook_norm, [(2, 3, 8), (8,)]),
        (gated_mlp, textbook_mlp, [(2, 3, 8), (8, 12), (8, 12), (12, 8)]),
    ],
)
def test_hand_written_gradients_equal_those_of_the_textbook_formula(ours, textbook, shapes):
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
    pull = jnp.asarray(rng.normal(size=shapes[0]), jnp.float32)
    places = tuple(range(len(arrays)))

    def gradients(f):
        return jax.jit(jax.value_and_grad(lambda *a: jnp.sum(pull * f(*a)), places))(*arrays)

    (got, grads), (want, expected) = gradients(ours), gradients(textbook)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for mine, theirs in zip(grads, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)
    half = [x.astype(jnp.bfloat16) for x in arrays]
    narrow = jax.eval_shape(jax.grad(lambda *a: jnp.sum(ours(*a)), places), *half)
    assert narrow[0].dtype == jnp.bfloat16


def test_rotary_embedding_keeps_norms_and_sees_only_distances():
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, 8)), jnp.float32) for _ in "qk")

    def at(x, position):
        return apply_rope(
            x, compute_rotary_tables(jnp.full((1, 1), position, jnp.int32), 8, 10000.0)
        )

    np.testing.assert_array_equal(at(q, 0), q)
    np.testing.assert_allclose(jnp.linalg.norm(at(q, 77)), jnp.linalg.norm(q), rtol=1e-6)
    near, far = (jnp.vdot(at(q, 5 + s), at(k, 2 + s)) for s in (0, 1000))
    np.testing.assert_allclose(near, far, atol=1e-3)
    assert abs(float(near - jnp.vdot(at(q, 5), at(k, 3)))) > 0.01
    # Channel pairs are (i, i + 4): a quarter turn of the first moves channel 0 into channel 4.
    turned = at(jnp.zeros((1, 1, 1, 8)).at[0, 0, 0, 0].set(1.0), 1)
    np.testing.assert_allclose(turned[0, 0, 0, 4], np.sin(1.0), rtol=1e-6)
    assert at(q.astype(jnp.bfloat16), 3).dtype == jnp.bfloat16


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_divides_the_slow_frequencies_only(factor):
    scaling = RopeScaling(rope_type="llama3", factor=factor, original_max_position_embeddings=8192)
    plain = 500000.0 ** (-np.arange(64) / 64)
    expected = []
    for frequency in plain:
        wavelength = 2 * np.pi / frequency
        if wavelength < 8192 / 4:
            expected.append(frequency)
        elif wavelength > 8192:
            expected.append(frequency / factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            expected.append((1 - smooth) * frequency / factor + smooth * frequency)
    got = frequencies(128, 500000.0, scaling)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert 0 < np.sum(~np.isclose(got, plain) & ~np.isclose(got, plain / factor)) < 64


def test_linear_scaling_divides_positions():
    stretched = compute_rotary_tables(
        jnp.array([[12]]), 8, 10000.0, RopeScaling(rope_type="linear", factor=4.0)
    )
    np.testing.assert_allclose(
        stretched.sin, compute_rotary_tables(jnp.array([[3]]), 8, 10000.0).sin, rtol=1e-6
    )


def test_logits_are_summed_in_float32():
    # 256 + 256 ones: a sum in bfloat16 would stop growing at 256.
    hidden, table = jnp.ones((1, 512), jnp.bfloat16), jnp.ones((3, 512))
    logits = unembed(hidden, table)
    assert logits.dtype == jnp.float32
    assert logits.tolist() == [[512.0] * 3]
