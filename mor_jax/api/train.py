"""`mor_jax.train`: trains a model from a configuration."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from mor_jax.api.source import check_path
from mor_jax.config import TrainConfig
from mor_jax.config.parsing import check
from mor_jax.config.shipped import read_config
from mor_jax.runtime import platform


@runtime_checkable
class HasDict(Protocol):
    """A `ConfigDict` of ml_collections, or anything else with its `to_dict`."""

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values."""
        ...


Config = str | Mapping[str, Any] | TrainConfig | HasDict


def train(
    config: Config,
    workdir: str | os.PathLike[str],
    *,
    settings: Mapping[str, Any] | None = None,
    allow_changes: Sequence[str] = (),
) -> dict[str, Any]:
    """Trains a model in `workdir`, or resumes the run there; the same as `mor train`.

    Args:
        config: the name of a shipped configuration with its choices (`"mor:size=360m"`), the path
            of a configuration file, a `ConfigDict`, a `TrainConfig`, or nested plain values.
        workdir: the run directory.
        settings: changes to the configuration by dotted path, such as `{"optim.lr": 1e-3}`.
        allow_changes: settings that may differ from the run's last start.

    Returns:
        The last evaluation: `loss_causal` and other means over the validation text, in nats per
        token; see `mor_jax.training.evaluator.Evaluator`.

    Raises:
        ValueError: a setting, the data or the directory does not fit; nothing was changed.
        Stopped: a signal ended the run early; the same call resumes it.
        Diverged: too many steps in a row were not finite, also after one rollback.
    """
    check_path("workdir", workdir)
    platform.use_cpu_without_accelerator()
    cfg = train_config(config, settings or {})
    from mor_jax.training.trainer import fit

    return fit(cfg, os.fspath(workdir), allow_changes)


def train_config(config: Config, settings: Mapping[str, Any]) -> TrainConfig:
    """The typed configuration with `settings` changed. Raises `ValueError` on any misfit."""
    if isinstance(config, str):
        values = read_config(config)
    elif isinstance(config, Mapping):
        values = dict(config)
    else:
        values = config.to_dict()
    check(bool(values), "config", config, "is empty", "Give a name, such as 'mor:recursions=2'")
    for path, value in settings.items():
        values = _with(values, path.split("."), value, path)
    return TrainConfig.from_dict(values)


def _with(values: Mapping[str, Any], keys: list[str], value: Any, path: str) -> dict[str, Any]:
    """A copy of nested `values` with one changed."""
    first, *rest = keys
    if not rest:
        return {**values, first: value}
    group = values.get(first)
    ok = isinstance(group, Mapping)
    check(ok, path, value, f"there is no group {first!r} of settings", f"Groups: {_groups(values)}")
    assert isinstance(group, Mapping)
    return {**values, first: _with(group, rest, value, path)}


def _groups(values: Mapping[str, Any]) -> str:
    return ", ".join(sorted(key for key, value in values.items() if isinstance(value, Mapping)))
