"""Every implementation gives the dense reference's numbers, values and gradients; the choice."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mor_jax.config import MeshConfig
from mor_jax.distributed.mesh import make_mesh
from mor_jax.models.attention_kernels import dispatch
from mor_jax.models.attention_kernels.blockwise import blockwise_attention
from mor_jax.models.attention_kernels.dispatch import attend, best_implementation, dense_attention
from mor_jax.models.attention_kernels.splash import splash_attention
from mor_jax.models.layers.masks import AttentionMask

KERNELS = {
    "blockwise": blockwise_attention,
    "splash": partial(splash_attention, interpret=True),
}
# name: (queries, keys, heads, key heads, with segments). 150 is more than two blocks of queries.
CASES = {
    "plain": (150, 150, 4, 2, False),
    "documents": (150, 150, 2, 2, True),
    "gathered": (80, 150, 4, 1, False),
    "gathered_documents": (80, 150, 4, 2, True),
    "one_query": (1, 5, 2, 1, False),
    "one_token": (1, 1, 2, 2, True),
}


def arrays(case: str, dtype=jnp.float32):
    """Random q, k, v, the gradient of the output, and who sees whom."""
    c, n, h, g, documents = CASES[case]
    rng = np.random.default_rng(0)
    shapes = [(2, c, h, 8), (2, n, g, 8), (2, n, g, 8), (2, c, h, 8)]
    q, k, v, grad = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    index = None if c == n else np.sort([rng.permutation(n)[:c] for _ in range(2)])
    segments = np.sort(rng.integers(0, 3, (2, n))) if documents else None
    chosen = segments
    if segments is not None and index is not None:
        chosen = np.take_along_axis(segments, index, 1)
    ids = [None if x is None else jnp.asarray(x, jnp.int32) for x in (index, chosen, segments)]
    return (q, k, v), grad, AttentionMask(*ids)


def with_gradients(kernel, inputs, visible, grad):
    """Output and the gradients of q, k and v, compiled."""

    @jax.jit
    def run(inputs, visible, grad):
        out, pull = jax.vjp(lambda *qkv: kernel(*qkv, visible), *inputs)
        return out, *pull(grad)

    return run(inputs, visible, grad)


def by_hand(inputs, visible: AttentionMask) -> np.ndarray:
    """Attention as the definition states it, one query at a time, in NumPy float64."""
    q, k, v = (np.asarray(x, np.float64) for x in inputs)
    (b, c, h, width), shared = q.shape, q.shape[2] // k.shape[2]
    out = np.zeros(q.shape)
    for row in range(b):
        for i in range(c):
            last = i if visible.q_index is None else int(visible.q_index[row, i])
            seen = np.arange(k.shape[1]) <= last
            if visible.q_segments is not None:
                seen &= np.asarray(visible.k_segments[row] == visible.q_segments[row, i])
            for head in range(h):
                scores = k[row, seen, head // shared] @ q[row, i, head] / np.sqrt(width)
                weights = np.exp(scores - scores.max())
                out[row, i, head] = weights / weights.sum() @ v[row, seen, head // shared]
    return out


@pytest.mark.parametrize("case", CASES)
def test_reference_is_the_definition(case):
    inputs, _, visible = arrays(case)
    np.testing.assert_allclose(
        dense_attention(*inputs, visible), by_hand(inputs, visible), atol=2e-6
    )


# Interpreted kernels take seconds each, so splash runs the cases that differ most.
@pytest.mark.parametrize(
    ("kernel", "case"),
    [("blockwise", case) for case in CASES]
    + [("splash", case) for case in ("plain", "gathered_documents", "one_query")],
)
def test_same_numbers_as_the_reference(kernel, case):
    inputs, grad, visible = arrays(case)
    ours = with_gradients(KERNELS[kernel], inputs, visible, grad)
    reference = with_gradients(dense_attention, inputs, visible, grad)
    for name, one, other in zip("oqkv", ours, reference, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("kernel", ["dense", *KERNELS])
def test_bfloat16_stays_near_float32(kernel):
    inputs, grad, visible = arrays("gathered_documents", jnp.bfloat16)
    run = KERNELS.get(kernel, dense_attention)
    narrow = with_gradients(run, inputs, visible, grad)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), (inputs, grad))
    exact = with_gradients(dense_attention, wide[0], visible, wide[1])
    for name, one, other in zip("oqkv", narrow, exact, strict=True):
        assert one.dtype == jnp.bfloat16
        error = jnp.abs(one.astype(jnp.float32) - other).max() / jnp.abs(other).max()
        # bfloat16 keeps 8 bits: 2^-8 for each of the few roundings on the way.
        assert error < 0.02, (name, float(error))


@pytest.mark.parametrize("kernel", ["dense", *KERNELS])
def test_a_query_that_sees_nothing_gets_zeros_and_sends_none(kernel):
    inputs, grad, visible = arrays("gathered_documents")
    lost = AttentionMask(visible.q_index, visible.q_segments.at[:, ::3].set(9), visible.k_segments)
    out, d_q, *others = with_gradients(KERNELS.get(kernel, dense_attention), inputs, lost, grad)
    assert not np.any(out[:, ::3]) and not np.any(d_q[:, ::3])
    assert np.all(np.any(out[:, 1::3], axis=(2, 3)))
    # Its own gradient must not reach any key or value.
    silent = with_gradients(dense_attention, inputs, lost, grad.at[:, ::3].set(0.0))
    for ours, theirs in zip(others, silent[2:], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("kernel", ["dense", *KERNELS])
def test_huge_scores_stay_finite(kernel):
    inputs, grad, visible = arrays("plain")
    inputs = (inputs[0] * 1e3, inputs[1] * 1e3, inputs[2])
    for x in with_gradients(KERNELS.get(kernel, dense_attention), inputs, visible, grad):
        assert np.all(np.isfinite(x))


def test_blocks_leave_nothing_of_size_queries_by_keys_for_the_backward_pass():
    (q, k, v), _, visible = arrays("plain")
    kept = jax.eval_shape(
        lambda *x: jax.vjp(lambda *y: attend(*y, visible, "blockwise"), *x), q, k, v
    )
    assert max(leaf.size for leaf in jax.tree.leaves(kept)) <= q.size


@pytest.mark.parametrize("kernel", KERNELS)
def test_rows_and_heads_may_be_cut_over_devices(kernel):
    inputs, grad, visible = arrays("gathered_documents")
    whole = with_gradients(dense_attention, inputs, visible, grad)
    mesh = make_mesh(MeshConfig(data=2, fsdp=1, tensor=2), jax.devices()[:4])
    with jax.set_mesh(mesh):
        cut = jax.device_put(inputs, NamedSharding(mesh, PartitionSpec("data", None, "tensor")))
        ours = with_gradients(KERNELS[kernel], cut, visible, grad)
    for name, one, other in zip("oqkv", ours, whole, strict=True):
        assert one.sharding.spec[0] in ("data", ("data", "fsdp")), (name, one.sharding)
        np.testing.assert_allclose(one, other, atol=1e-5, err_msg=name)


def test_a_repeated_index_in_filler_slots_stays_finite():
    inputs, grad, visible = arrays("gathered_documents")
    clipped = AttentionMask(
        visible.q_index.at[:, 60:].set(149), visible.q_segments, visible.k_segments
    )
    for kernel in KERNELS.values():
        for x in with_gradients(kernel, inputs, clipped, grad):
            assert np.all(np.isfinite(x))


def test_auto_chooses_by_platform():
    (q, _, _), _, _ = arrays("plain", jnp.bfloat16)
    assert best_implementation(q, "cpu") == "blockwise"
    assert best_implementation(q, "tpu") == "splash"
    assert best_implementation(q, "cuda") == "cudnn"
    assert best_implementation(q, "rocm") == "blockwise"


def test_a_mesh_of_absent_devices_decides(monkeypatch):
    assert dispatch.platform() == "cpu"
    mesh = SimpleNamespace(abstract_device=SimpleNamespace(platform="tpu"))
    monkeypatch.setattr(jax.sharding, "get_abstract_mesh", lambda: mesh)
    assert dispatch.platform() == "tpu"


@pytest.mark.parametrize(("kernel", "where"), [("cudnn", "NVIDIA GPUs"), ("splash", "TPUs")])
def test_kernels_are_refused_off_their_devices(kernel, where):
    inputs, _, visible = arrays("plain")
    told = rf"model\.attention='{kernel}': runs on {where} only, .*'cpu'.*Use 'auto'"
    with pytest.raises(ValueError, match=told):
        attend(*inputs, visible, kernel)


@pytest.mark.parametrize(
    ("queries", "visible", "message"),
    [
        (3, AttentionMask(), "as many queries as keys, got 3 and 4"),
        (
            4,
            AttentionMask(None, jnp.ones((1, 4), jnp.int32)),
            r"k_segments=None: .*both or neither",
        ),
        (5, AttentionMask(jnp.arange(5, dtype=jnp.int32)[None]), "queries=5: more than the 4 keys"),
    ],
)
def test_a_misfit_is_explained(queries, visible, message):
    q, k = jnp.ones((1, queries, 2, 8)), jnp.ones((1, 4, 1, 8))
    with pytest.raises(ValueError, match=message):
        attend(q, k, k, visible)
