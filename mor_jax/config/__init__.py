"""Configuration: frozen dataclasses of all settings, their parsing and validation."""

from mor_jax.config.model import (
    Attention,
    KVMode,
    ModelConfig,
    Remat,
    RopeScaling,
    RouterConfig,
    Sharing,
)
from mor_jax.config.train import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    HostsConfig,
    LogConfig,
    MeshConfig,
    OptimConfig,
    ProfileConfig,
    ShardingConfig,
    TrainConfig,
)

__all__ = [
    "Attention",
    "CheckpointConfig",
    "DataConfig",
    "EvalConfig",
    "HostsConfig",
    "KVMode",
    "LogConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimConfig",
    "ProfileConfig",
    "Remat",
    "RopeScaling",
    "RouterConfig",
    "ShardingConfig",
    "Sharing",
    "TrainConfig",
]
