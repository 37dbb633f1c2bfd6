"""The models that are compared: the paper's 360M shape, the same scaled down, and a tiny one."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

from mor_jax.config import ModelConfig, RouterConfig
from mor_jax.config.model import KVMode

Dtype = Literal["bfloat16", "float32"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a family of models: heads of 64 channels, a third as many for keys and values.

    layers: by recursions; 1 is the plain model. All recursions share one block between two layers
    of their own.
    """

    width: int
    mlp_width: int
    vocab_size: int
    layers: Mapping[int, int]


# 4 do not divide 30, so the paper gives that model two layers more.
_PAPER = {1: 32, 2: 32, 3: 32, 4: 34}
SHAPES = {
    "360m": Shape(width=960, mlp_width=2560, vocab_size=49152, layers=_PAPER),
    # The output matrix has the same part of all weights as in the full shape.
    "scaled": Shape(width=384, mlp_width=1024, vocab_size=19712, layers=_PAPER),
    "scaled-vocab": Shape(width=384, mlp_width=1024, vocab_size=49152, layers=_PAPER),
    "quick": Shape(width=192, mlp_width=512, vocab_size=512, layers={1: 6, 2: 6, 3: 8, 4: 10}),
}


def plain(shape: Shape, dtype: Dtype, *, deep: bool = False) -> ModelConfig:
    """The model without recursions. deep: with the layers of 4 recursions."""
    heads = shape.width // 64
    cfg = ModelConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.width,
        num_layers=shape.layers[4 if deep else 1],
        num_heads=heads,
        num_kv_heads=heads // 3,
        head_dim=64,
        intermediate_size=shape.mlp_width,
        max_seq_len=1024,
        dtype=dtype,
    )
    cfg.validate()
    return cfg


def mor(shape: Shape, recursions: int, kv: KVMode, dtype: Dtype) -> ModelConfig:
    """Mixture-of-Recursions with expert-choice routing, middle-cycle, as in the paper's tables."""
    cfg = dataclasses.replace(
        plain(shape, dtype),
        num_layers=shape.layers[recursions],
        sharing="middle_cycle",
        num_recursions=recursions,
        kv_mode=kv,
        router=RouterConfig(kind="expert"),
    )
    cfg.validate()
    return cfg


def family(shape: Shape, dtype: Dtype) -> dict[str, ModelConfig]:
    """All models by name, the plain one first."""
    models = {"plain": plain(shape, dtype)}
    deep = plain(shape, dtype, deep=True)
    models[f"plain, {deep.num_layers} layers"] = deep
    for recursions in (2, 3, 4):
        models[f"MoR-{recursions}"] = mor(shape, recursions, "recursion", dtype)
        models[f"MoR-{recursions}, shared KV"] = mor(shape, recursions, "shared", dtype)
    return models
