"""Small models and batches that every test file can use.

`TINY` maps a name to a `ModelConfig`: every sharing scheme, router and key/value mode at the
smallest size at which they still differ. A test over all variants reads

    @pytest.mark.parametrize("name", TINY)
    def test_something(name): cfg = TINY[name]

`PLAIN`, `RECURSIVE`, `EXPERT` and `TOKEN` are the names of each family.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from mor_jax.config import (
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    RouterConfig,
    TrainConfig,
)
from mor_jax.types import IGNORE, Batch

BASE = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=48,
    max_seq_len=64,
    dtype="float32",
    attention="xla",
    # Wider than the usual 0.02, so that outputs of such a small model are not all alike.
    init_std=0.1,
)
EXPERT_ROUTER = RouterConfig(kind="expert")
TOKEN_ROUTER = RouterConfig(kind="token", activation="softmax", alpha=1.0)


def _model(layers: int, recursions: int, sharing: str, **changes) -> ModelConfig:
    cfg = dataclasses.replace(
        BASE, num_layers=layers, num_recursions=recursions, sharing=sharing, **changes
    )
    cfg.validate()
    return cfg


def _expert(**changes) -> RouterConfig:
    return dataclasses.replace(EXPERT_ROUTER, **changes)


def _token(**changes) -> RouterConfig:
    return dataclasses.replace(TOKEN_ROUTER, **changes)


TINY: dict[str, ModelConfig] = {
    "plain": BASE,
    "plain_untied": dataclasses.replace(BASE, tie_embeddings=False),
    "cycle": _model(4, 2, "cycle"),
    "sequence": _model(4, 2, "sequence"),
    "middle_cycle": _model(6, 2, "middle_cycle"),
    "middle_sequence": _model(6, 2, "middle_sequence"),
    "middle_cycle_norms": _model(6, 2, "middle_cycle", share_norms=False),
    "middle_cycle_kv": _model(8, 3, "middle_cycle", kv_mode="shared"),
    "expert": _model(8, 3, "middle_cycle", router=EXPERT_ROUTER),
    "expert_cycle": _model(6, 3, "cycle", router=EXPERT_ROUTER),
    "expert_kv": _model(8, 3, "middle_cycle", kv_mode="shared", router=EXPERT_ROUTER),
    "expert_kv_update": _model(8, 3, "middle_cycle", kv_mode="shared_update", router=EXPERT_ROUTER),
    "expert_aux_router": _model(8, 3, "middle_cycle", router=_expert(causal_routing="aux_router")),
    "expert_mlp": _model(6, 2, "middle_cycle", router=_expert(arch="mlp", activation="tanh")),
    "expert_additive": _model(6, 2, "middle_cycle", router=_expert(gating="additive")),
    "token": _model(8, 3, "middle_cycle", router=TOKEN_ROUTER),
    "token_cycle": _model(6, 3, "cycle", router=TOKEN_ROUTER),
    "token_kv": _model(8, 3, "middle_cycle", kv_mode="shared", router=TOKEN_ROUTER),
    "token_loss_free": _model(8, 3, "middle_cycle", router=_token(load_balancing="loss_free")),
    "token_mlp": _model(
        6, 2, "middle_cycle", router=_token(arch="mlp", activation="sigmoid", alpha=0.1)
    ),
}

PLAIN = tuple(n for n, c in TINY.items() if c.sharing == "none")
EXPERT = tuple(n for n, c in TINY.items() if c.router.kind == "expert")
TOKEN = tuple(n for n, c in TINY.items() if c.router.kind == "token")
RECURSIVE = tuple(n for n, c in TINY.items() if c.sharing != "none" and c.router.kind == "none")


def train_config(name: str = "expert", **changes) -> TrainConfig:
    """A run of 8 steps of 4 rows of 16 tokens with model `TINY[name]`; `changes` replace fields."""
    cfg = TrainConfig(
        steps=8,
        batch_size=4,
        seq_len=16,
        loss_chunk_size=32,
        model=TINY[name],
        optim=OptimConfig(lr=1e-2, warmup_steps=2, decay_steps=2),
        data=DataConfig(),
        eval=EvalConfig(interval=None, batches=1, batch_size=4, prompt="", completion_tokens=0),
    )
    cfg = dataclasses.replace(cfg, **changes)
    cfg.validate()
    return cfg


def tokens(cfg: ModelConfig, batch: int = 2, length: int = 16, seed: int = 0) -> jax.Array:
    """Seeded random tokens, int32 [b l]."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.integers(0, cfg.vocab_size, (batch, length)), jnp.int32)


def batch(cfg: ModelConfig, batch: int = 2, length: int = 16, seed: int = 0) -> Batch:
    """A batch of random rows without padding; the last position carries no target."""
    ids = tokens(cfg, batch, length, seed)
    last = jnp.full((batch, 1), IGNORE, jnp.int32)
    targets = jnp.concatenate([ids[:, 1:], last], axis=1)
    return Batch(tokens=ids, targets=targets)
