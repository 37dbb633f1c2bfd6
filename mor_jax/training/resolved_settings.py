"""Settings whose default depends on the platform: resolved once, when a run starts.

Capacities decide which tokens a model learned to select, so they belong to the run and not to the
machine that evaluates or resumes it: the run directory records them.
"""

import dataclasses
from collections.abc import Sequence

from etils import epath

from mor_jax.checkpoint import run_dir
from mor_jax.config import TrainConfig
from mor_jax.models.routing.router import kernel_multiple


def resolve_settings(cfg: TrainConfig, platform: str) -> TrainConfig:
    """`cfg` with `model.router.capacity_multiple` resolved for a platform.

    platform: see `mesh.platform`, or `gpu`. An explicit value does not change.
    """
    router = cfg.model.router
    if router.kind == "none" or router.capacity_multiple is not None:
        return cfg
    return _with_multiple(cfg, kernel_multiple(platform, cfg.seq_len))


def resolve_settings_in(
    directories: Sequence[epath.PathLike], cfg: TrainConfig, platform: str
) -> TrainConfig:
    """The same, but the first of `directories` that holds a run decides.

    A run older than the setting has the value 1.

    Raises:
        ValueError: a directory has other contents than a run.
    """
    open_ = cfg.model.router.kind != "none" and cfg.model.router.capacity_multiple is None
    for directory in directories if open_ else ():
        held = run_dir.read_values(directory)
        if held is not None:
            there = held["model"].get("router", {}).get("capacity_multiple", 1)
            return resolve_settings(cfg, platform) if there is None else _with_multiple(cfg, there)
    return resolve_settings(cfg, platform)


def _with_multiple(cfg: TrainConfig, multiple: int) -> TrainConfig:
    router = dataclasses.replace(cfg.model.router, capacity_multiple=multiple)
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, router=router))


__all__ = ["resolve_settings", "resolve_settings_in"]
