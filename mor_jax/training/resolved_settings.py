"""Settings left open that follow from where a run trains: written out once, for good.

Capacities decide which tokens a model learned to choose, so they belong to the run and not to the
machine that evaluates or continues it: its directory holds the number.
"""

import dataclasses
from collections.abc import Sequence

from etils import epath

from mor_jax.checkpoint import run_dir
from mor_jax.config import TrainConfig
from mor_jax.models.routing.router import kernel_multiple


def resolve_settings(cfg: TrainConfig, platform: str) -> TrainConfig:
    """`cfg` with `model.router.capacity_multiple` written out as a platform likes it.

    platform: see `sharding.platform`; `gpu` does as well. What is given stays.
    """
    router = cfg.model.router
    if router.kind == "none" or router.capacity_multiple is not None:
        return cfg
    return _with_multiple(cfg, kernel_multiple(platform, cfg.seq_len))


def resolve_settings_in(
    directories: Sequence[epath.PathLike], cfg: TrainConfig, platform: str
) -> TrainConfig:
    """The same for a run in the first of `directories` that holds one, which decides.

    A run from before there was the setting kept exactly the tokens that its capacities say.

    Raises:
        ValueError: a directory holds something that is no run.
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
