"""What every pass needs: the model, its weights, and its cache's tables."""

import dataclasses

from mor_jax.config import ModelConfig
from mor_jax.models.decode.layer import Weights
from mor_jax.models.decode.paged_cache import BlockTables, KVCacheSpec
from mor_jax.types import Array, Float


@dataclasses.dataclass(frozen=True)
class Decoder:
    """thresholds: logits from which on expert-choice sends a token on. chunk: pages of a round."""

    geometry: KVCacheSpec
    weights: Weights
    tables: BlockTables
    thresholds: Float[Array, "r"]
    chunk: int

    @property
    def cfg(self) -> ModelConfig:
        """The model."""
        return self.geometry.cfg
