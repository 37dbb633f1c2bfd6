"""What cuDNN is asked for: sizes that it takes, with the same numbers.

No GPU is here, so a stand-in refuses what JAX's own checks refuse, and computes the rest in XLA.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.seeded import random_params
from support.tiny import EXPERT_ROUTER, TINY, batch, train_config
from test_attention_kernels import arrays, with_gradients

from mor_jax.config import RouterConfig
from mor_jax.models.attention_kernels import cudnn, dispatch
from mor_jax.models.attention_kernels.cudnn import cudnn_attention, cudnn_sizes
from mor_jax.models.attention_kernels.dispatch import attend, best_implementation, dense_attention
from mor_jax.models.layers.masks import AttentionMask
from mor_jax.models.params import abstract_params, forward
from mor_jax.models.routing.router import Route, capacity_tokens
from mor_jax.planning import gpu_targets
from mor_jax.training.train_step import eval_step, gradients

ASKED = jax.nn.dot_product_attention


def refusing(q, k, v, *, implementation, wide=False, **how):
    """`jax.nn.dot_product_attention` under the limits that it has for cuDNN when training."""
    assert implementation == "cudnn"
    assert wide or q.dtype == k.dtype == v.dtype == jnp.bfloat16, q.dtype
    assert q.shape[1] % 2 == k.shape[1] % 2 == 0, (q.shape, k.shape)
    assert q.shape[3] == k.shape[3] <= 128 and q.shape[3] % 8 == 0, q.shape
    assert not how.get("is_causal") or q.shape[1] == k.shape[1]
    # XLA's code spreads the weight of a query that sees nothing over NaNs, cuDNN's does not.
    if "mask" in how:
        bias = jnp.where(how.pop("mask"), 0.0, -(2.0**41)).astype(q.dtype)
        return ASKED(q, k, v, bias=bias, **how)
    return ASKED(q, k, v, **how)


@pytest.fixture
def gpu(monkeypatch):
    """Programs are traced as for an NVIDIA GPU."""
    monkeypatch.setattr(dispatch, "platform", lambda: "cuda")
    monkeypatch.setattr(jax.nn, "dot_product_attention", refusing)


# (queries, keys, head_dim, dtype) -> kernel of `auto`, (queries, keys, head_dim) handed to cuDNN.
CHOICES = {
    (2048, 2048, 64, "bfloat16"): ("cudnn", (2048, 2048, 64)),
    (1365, 1365, 64, "bfloat16"): ("cudnn", (1366, 1366, 64)),
    (682, 682, 64, "bfloat16"): ("cudnn", (682, 682, 64)),
    (2047, 2047, 64, "bfloat16"): ("cudnn", (2048, 2048, 64)),
    (1365, 2047, 64, "bfloat16"): ("cudnn", (1366, 2048, 64)),
    (1, 77, 128, "bfloat16"): ("cudnn", (2, 78, 128)),
    (16, 16, 20, "bfloat16"): ("cudnn", (16, 16, 24)),
    (16, 16, 128, "float16"): ("cudnn", (16, 16, 128)),
    (16, 16, 136, "bfloat16"): ("blockwise", None),
    (16, 16, 64, "float32"): ("blockwise", None),
}


@pytest.mark.parametrize("shape", CHOICES)
def test_kernel_and_padding_by_shape(shape):
    c, n, width, dtype = shape
    kernel, padded = CHOICES[shape]
    q, k = (jnp.zeros((1, length, 1, width), dtype) for length in (c, n))
    assert best_implementation(q, "cuda") == kernel
    if padded is not None:
        assert dataclasses.astuple(cudnn_sizes(q, k)) == padded


@pytest.mark.parametrize(
    ("q", "words"),
    [
        (jnp.ones((1, 4, 2, 8)), "16-bit arrays, got float32.*bfloat16"),
        (jnp.ones((1, 4, 2, 256), jnp.bfloat16), "at most 128, got 256.*blockwise"),
    ],
)
def test_what_cannot_be_padded_is_refused_where_cudnn_is_asked_for(gpu, q, words):
    with pytest.raises(ValueError, match=rf"model\.attention='cudnn': .*{words}"):
        attend(q, q, q, AttentionMask(), "cudnn")


def cut(case: str, c: int, n: int, width: int):
    """A case of the other implementations, shorter and with other heads."""
    (q, k, v), grad, visible = arrays(case)
    wide = [jnp.concatenate([x, x[..., ::-1] * 0.5], -1)[..., :width] for x in (q, k, v, grad)]
    q, k, v, grad = wide
    index, chosen, segments = visible.q_index, visible.q_segments, visible.k_segments
    if index is not None:
        index = jnp.minimum(index[:, :c], n - c + jnp.arange(c, dtype=jnp.int32)[None])
    if segments is not None:
        segments = segments[:, :n].at[:, -3:].set(0)
        chosen = segments if index is None else jnp.take_along_axis(segments, index, 1)
    seen = AttentionMask(index, chosen, segments)
    return (q[:, :c], k[:, :n], v[:, :n]), grad[:, :c], seen


@pytest.mark.parametrize(
    ("case", "c", "n", "width"),
    [
        ("plain", 41, 41, 8),
        ("plain", 40, 40, 12),
        ("documents", 41, 41, 8),
        ("gathered", 27, 41, 10),
        ("gathered", 26, 41, 8),
        ("gathered_documents", 27, 40, 8),
        ("gathered_documents", 1, 41, 8),
    ],
)
def test_padding_changes_no_number_and_no_gradient(monkeypatch, case, c, n, width):
    # In float32, to tell padding from rounding.
    monkeypatch.setattr(jax.nn, "dot_product_attention", partial(refusing, wide=True))
    inputs, grad, visible = cut(case, c, n, width)
    ours = with_gradients(cudnn_attention, inputs, visible, grad)
    reference = with_gradients(dense_attention, inputs, visible, grad)
    for name, one, other in zip("oqkv", ours, reference, strict=True):
        assert one.shape == other.shape
        np.testing.assert_allclose(one, other, atol=2e-6, err_msg=name)


def test_whatever_fits_is_not_copied(monkeypatch):
    monkeypatch.setattr(cudnn.jnp, "pad", lambda *x: pytest.fail("padded"))
    monkeypatch.setattr(jax.nn, "dot_product_attention", refusing)
    q = jnp.ones((1, 4, 2, 8), jnp.bfloat16)
    assert cudnn_attention(q, q, q, AttentionMask()).shape == q.shape


def test_a_query_that_sees_nothing_gets_zeros(gpu):
    (q, k, v), _, visible = cut("gathered_documents", 27, 41, 8)
    lost = AttentionMask(visible.q_index, visible.q_segments.at[:, ::3].set(9), visible.k_segments)
    out = attend(*(x.astype(jnp.bfloat16) for x in (q, k, v)), lost, "cudnn")
    assert not np.any(out[:, ::3]) and np.any(out[:, 1])


# Head size and lengths that cuDNN takes only when they are padded.
SHAPES = {
    "expert": {"router": EXPERT_ROUTER},
    "shared": {"router": EXPERT_ROUTER, "kv_mode": "shared"},
    "shared_update": {"router": EXPERT_ROUTER, "kv_mode": "shared_update"},
    "token": {"router": RouterConfig(kind="token", activation="softmax")},
    "roomy": {"router": RouterConfig(kind="token", activation="softmax", capacity_factor=1.1)},
}


@pytest.mark.parametrize(
    ("name", "attention", "documents"),
    [
        ("expert", "auto", False),
        ("expert", "cudnn", True),
        ("shared", "auto", True),
        ("shared_update", "cudnn", False),
        ("token", "auto", True),
        ("roomy", "auto", False),
    ],
)
def test_every_program_traces_for_a_gpu(gpu, name, attention, documents):
    router = dataclasses.replace(SHAPES[name]["router"], capacity_multiple=1)
    model = dataclasses.replace(
        TINY["expert"],
        dtype="bfloat16",
        attention=attention,
        head_dim=12,
        max_seq_len=2048,
        **SHAPES[name] | {"router": router},
    )
    # Three recursions at 2048: 1365 tokens in the second one.
    cfg = dataclasses.replace(train_config("expert"), model=model, seq_len=2047, loss_chunk_size=89)
    rows = jax.eval_shape(lambda: batch(model, 2, cfg.seq_len))
    here = jax.ShapeDtypeStruct(rows.tokens.shape, jnp.int32)
    rows = dataclasses.replace(rows, segments=here, positions=here) if documents else rows
    params, step = abstract_params(model), jax.ShapeDtypeStruct((), jnp.int32)
    kept = capacity_tokens(model, cfg.seq_len)
    assert name == "token" or any(count % 2 for count in kept)
    jax.eval_shape(partial(gradients, cfg, kept=kept), params, rows, step=step)
    for mode in ("topk", "causal"):
        jax.eval_shape(partial(eval_step, cfg, mode=mode), params, rows)


def test_a_model_gives_the_same_numbers_through_padded_kernels(monkeypatch):
    model = dataclasses.replace(TINY["expert_kv_update"], head_dim=10)
    rows, params = batch(model, 2, 45), random_params(model)
    assert capacity_tokens(model, 45) == (45, 30, 15)
    plain = jax.jit(lambda p: forward(model, p, rows, Route()).hidden)(params)
    monkeypatch.setattr(dispatch, "platform", lambda: "cuda")
    monkeypatch.setattr(dispatch, "cudnn_obstacle", lambda q: None)
    monkeypatch.setattr(jax.nn, "dot_product_attention", partial(refusing, wide=True))
    padded = dataclasses.replace(model, attention="cudnn")
    ours = jax.jit(lambda p: forward(padded, p, rows, Route()).hidden)(params)
    np.testing.assert_allclose(ours, plain, atol=1e-5)


def test_targets_are_described_and_their_absence_explained(monkeypatch):
    for target in gpu_targets.TARGETS.values():
        text = gpu_targets.target_config(target)
        assert f"core_count: {target.cores}" in text and text.count("{") == text.count("}")
    with pytest.raises(ValueError, match=r"gpu='v100': .*h100, a100.*Try h100"):
        gpu_targets.gpu_devices("v100")
    monkeypatch.setattr(gpu_targets, "_installed", lambda: False)
    with pytest.raises(ValueError, match=r"gpu='h100': .*jax\[cuda\].*requirements-gpu\.txt"):
        gpu_targets.gpu_devices("h100")
