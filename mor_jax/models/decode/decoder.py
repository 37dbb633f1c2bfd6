"""Arguments of every decoding pass: the model, its weights, and the block tables."""

import dataclasses

from mor_jax.config import ModelConfig
from mor_jax.models.decode.layer import Weights
from mor_jax.models.decode.paged_cache import BlockTables, KVCacheSpec
from mor_jax.types import Array, Float


@dataclasses.dataclass(frozen=True)
class Decoder:
    """thresholds: least logits of tokens that expert-choice selects. chunk: pages per round."""

    geometry: KVCacheSpec
    weights: Weights
    tables: BlockTables
    thresholds: Float[Array, "r"]
    chunk: int

    @property
    def cfg(self) -> ModelConfig:
        """The model."""
        return self.geometry.cfg
