"""Small models of every family as exports, and beside each what JAX computes with it."""

import dataclasses
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from mor_jax.checkpoint.lazy_arrays import flatten, from_arrays
from mor_jax.config import ModelConfig, RopeScaling, RouterConfig, TrainConfig
from mor_jax.convert.exports import ExportOptions, export
from mor_jax.convert.run_source import RunSource
from mor_jax.models.params import forward, init_params, unembed
from mor_jax.models.routing.router import Route, capacity_tokens
from mor_jax.training.losses import batch_counts
from mor_jax.training.train_step import loss_fn
from mor_jax.types import IGNORE, Batch, Params

# Left-padded prompts, tokens to write after them; rows of the training step.
PROMPTS, NEW, TRAIN, RATE = (20, 13, 7), 32, (4, 24), 0.02
LENGTH = max(PROMPTS) + NEW
BASE = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    num_layers=5,
    num_recursions=3,
    sharing="middle_cycle",
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=48,
    max_seq_len=128,
    dtype="float32",
    attention="xla",
    # Wider than usual, so that such a small model writes varied text.
    init_std=0.3,
)
# Losses of the router large enough to show in a step.
EXPERT = RouterConfig(kind="expert", aux_loss_coeff=0.5, z_loss_coeff=0.01, capacity_multiple=1)
TOKEN = RouterConfig(
    kind="token",
    activation="softmax",
    alpha=1.0,
    balance_loss_coeff=0.5,
    z_loss_coeff=0.01,
    capacity_factor=0.8,
)
SCALED = RopeScaling(rope_type="llama3", factor=8.0, original_max_position_embeddings=32)


def _model(**changes) -> ModelConfig:
    cfg = dataclasses.replace(BASE, **changes)
    cfg.validate()
    return cfg


_router = partial(dataclasses.replace, EXPERT)
MODELS = {
    "plain": _model(
        sharing="none", num_layers=4, num_recursions=1, tie_embeddings=False, rope_scaling=SCALED
    ),
    "recursive": _model(share_norms=False),
    "expert": _model(router=EXPERT),
    "expert-kv-shared": _model(router=_router(capacity_multiple=8), kv_mode="shared"),
    "expert-kv-update": _model(router=EXPERT, kv_mode="shared_update", share_norms=False),
    "expert-aux-router": _model(router=_router(causal_routing="aux_router", arch="mlp")),
    "token": _model(router=TOKEN, num_layers=6, sharing="cycle"),
}


def write(name: str, folder: Path) -> Path:
    """Exports model `name`, weights drawn, to `folder`/`name`, with expected.npz beside."""
    cfg = MODELS[name]
    params = init_params(cfg, 0)
    run = RunSource(
        path=epath.Path(folder) / f"{name}-run",
        cfg=TrainConfig(model=cfg, seq_len=LENGTH),
        step=0,
        params=from_arrays(dict(flatten(params))),
        tokenizer=None,
        source=None,
        evaluated={},
        check=lambda: None,
    )
    place = folder / name
    export(run, "hf", ExportOptions(output=place))
    np.savez(place / "expected.npz", **expected(cfg, params))
    return place


def expected(cfg: ModelConfig, params: Params) -> dict[str, np.ndarray]:
    """What PyTorch has to compute: text, its logits under both routings, losses of a step."""
    rng = np.random.default_rng(0)
    longest = max(PROMPTS)
    rows = rng.integers(0, cfg.vocab_size, (len(PROMPTS), LENGTH))
    starts = longest - np.array(PROMPTS)
    mask = (np.arange(LENGTH)[None] >= starts[:, None]).astype(np.int64)
    run = jax.jit(_logits, static_argnums=(0, 3))
    for place in range(longest, LENGTH):
        # Later tokens change nothing before them, so that the row may be full from the start.
        rows[:, place] = _best(run(cfg, params, _batch(rows, mask), "causal"), place)
    batch, train = _batch(rows, mask), rng.integers(0, cfg.vocab_size, TRAIN)
    return {
        "rows": rows,
        "mask": mask,
        "prompt": np.array(longest),
        "causal": np.asarray(run(cfg, params, batch, "causal")),
        "topk": np.asarray(run(cfg, params, batch, "topk")),
        "train": train,
        "rate": np.array(RATE),
        "losses": _losses(cfg, params, train),
    }


def _best(logits: jax.Array, place: int) -> np.ndarray:
    return np.asarray(logits)[:, place - 1].argmax(-1)


def _batch(rows: np.ndarray, mask: np.ndarray) -> Batch:
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    return Batch(*(jnp.asarray(a, jnp.int32) for a in (rows, rows, mask, positions)))


def _logits(cfg: ModelConfig, params: Params, batch: Batch, mode: str) -> jax.Array:
    return unembed(cfg, params, forward(cfg, params, batch, Route(mode=mode)).hidden)


def _losses(cfg: ModelConfig, params: Params, rows: np.ndarray) -> np.ndarray:
    """The training loss before and after a step of plain gradient descent."""
    targets = np.concatenate([rows[:, 1:], np.full((len(rows), 1), IGNORE)], axis=1)
    batch = Batch(jnp.asarray(rows, jnp.int32), jnp.asarray(targets, jnp.int32))
    run = TrainConfig(model=cfg, batch_size=TRAIN[0], seq_len=TRAIN[1])
    counts = batch_counts(cfg, batch, capacity_tokens(cfg, TRAIN[1]))

    @jax.jit
    def step(params: Params):
        (loss, _), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            params, run, batch, Route(), counts
        )
        return loss, jax.tree.map(lambda p, g: p - RATE * g, params, grads)

    before, moved = step(params)
    return np.array([before, step(moved)[0]], np.float64)
