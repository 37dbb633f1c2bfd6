"""What a layer keeps for its backward pass: the same gradients from fewer saved arrays."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Primitive
from jax.interpreters import mlir

from mor_jax.models.layers.remat import (
    check_remat,
    layer_input,
    remat,
    save_output,
    save_wide_output,
)

LAYERS, TOKENS, HIDDEN, WIDE = 2, 5, 3, 7
LEVELS = ("none", "block", "full")


def layer(x, weights):
    """A scan's body with one marked result of each kind, and unmarked ones between them."""
    up, down = weights
    hidden = save_output(jnp.sin(layer_input(x) @ up[:, :HIDDEN]))
    wide = save_wide_output(jnp.cos(hidden) @ up)
    return x + jnp.tanh(wide) @ down, None


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    shapes = ((TOKENS, HIDDEN), (LAYERS, HIDDEN, WIDE), (LAYERS, WIDE, HIDDEN))
    return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)


def scanned(body):
    return lambda x, up, down: jax.lax.scan(body, x, (up, down))[0]


def value_and_gradients(body, arrays):
    return jax.value_and_grad(lambda *a: jnp.sum(jnp.sin(scanned(body)(*a))), (0, 1, 2))(*arrays)


def saved(body, arrays):
    """How many arrays of each shape the backward pass is given, weights aside."""
    _, backward = jax.vjp(scanned(body), *arrays)
    shapes = collections.Counter(leaf.shape for leaf in jax.tree.leaves(backward))
    return {shape: n for shape, n in shapes.items() if len(shape) == 3 and shape[1] == TOKENS}


@pytest.mark.parametrize("how", LEVELS)
def test_values_and_gradients_are_those_of_the_plain_layer(how, arrays):
    def plain(x, weights):
        up, down = weights
        hidden = jnp.sin(x @ up[:, :HIDDEN])
        return x + jnp.tanh(jnp.cos(hidden) @ up) @ down, None

    got, want = (value_and_gradients(body, arrays) for body in (remat(layer, how), plain))
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)
        assert np.any(np.asarray(other) != 0)


@pytest.mark.parametrize(
    ("how", "narrow", "wide"),
    # Each level keeps the layer's input; what else it keeps is marked.
    [("none", 2, 1), ("block", 2, 0), ("full", 1, 0)],
)
def test_each_level_keeps_the_input_and_the_results_that_it_names(how, narrow, wide, arrays):
    want = {(LAYERS, TOKENS, HIDDEN): narrow, (LAYERS, TOKENS, WIDE): wide}
    assert saved(remat(layer, how), arrays) == {shape: n for shape, n in want.items() if n}


def test_without_it_more_is_kept(arrays):
    assert sum(saved(layer, arrays).values()) > sum(saved(remat(layer, "none"), arrays).values())


@pytest.mark.parametrize("mark", [save_output, save_wide_output, layer_input])
def test_marks_change_neither_values_nor_gradients(mark):
    x = jnp.asarray([1.0, -2.0, 0.5])
    np.testing.assert_array_equal(mark(x), x)
    np.testing.assert_array_equal(jax.grad(lambda x: jnp.sum(mark(x) ** 2))(x), 2 * x)


def kernel(name):
    """A kernel with residuals of its own, which carry no mark: twice x. Counts its runs."""
    primitive, runs = Primitive(name), []

    def twice(x):
        return 2 * x

    primitive.def_impl(twice)
    primitive.def_abstract_eval(lambda x: runs.append(x.shape) or x)
    mlir.register_lowering(primitive, mlir.lower_fun(twice, multiple_results=False))

    @jax.custom_vjp
    def apply(x):
        return primitive.bind(x)

    def forward(x):
        out = primitive.bind(x)
        return out, out

    apply.defvjp(forward, lambda out, grad: (grad * out,))
    return apply


@pytest.mark.parametrize(
    ("name", "kept"), [("dot_product_attention_fwd_wrapper", 1), ("other_kernel", 0)]
)
@pytest.mark.parametrize("how", LEVELS)
def test_results_of_the_fused_attention_kernel_are_kept_unless_all_is_computed_again(
    name, kept, how, arrays
):
    attend = kernel(name)

    def body(x, weights):
        # Twice as wide, so that its result is told from the layer's input.
        return x + attend(jnp.concatenate([x, x], axis=1))[:, :HIDDEN], None

    shapes = saved(remat(body, how), arrays)
    assert shapes.get((LAYERS, TOKENS, 2 * HIDDEN), 0) == (0 if how == "full" else kept)


def test_a_host_cannot_offload_to_itself():
    message = r"model\.remat='offload': needs a device .*host.*Use 'full'"
    with pytest.raises(ValueError, match=message):
        check_remat("offload")
    with pytest.raises(ValueError, match=message):
        remat(layer, "offload")
    for how in LEVELS:
        check_remat(how)
