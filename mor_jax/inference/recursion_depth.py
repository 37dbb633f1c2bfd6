"""Test-time depth: a trained model run with fewer or more recursions than it was trained with."""

import dataclasses
import functools
import logging
from typing import Any

import jax.numpy as jnp

from mor_jax.config import ModelConfig
from mor_jax.config.parsing import check, fail
from mor_jax.types import Array, Params

Thresholds = tuple[float, ...] | None

_MAX_LAYERS = 1024
"""Effective layers of a model."""

_log = logging.getLogger(__name__)


@functools.cache
def _warn(trained: int, recursions: int) -> None:
    """Warns once about a depth far from the trained one."""
    message = "recursions=%d: more than twice the %d that were trained. Each costs as much as one "
    message += "that was, and what they do to the loss only a measurement tells: mor analyze "
    message += "depth --recursions=%d,%d"
    _log.warning(message, recursions, trained, trained, recursions)


def with_recursions(
    cfg: ModelConfig, params: Params, recursions: int, thresholds: Thresholds = None
) -> tuple[ModelConfig, Params, Thresholds]:
    """The model that runs its shared block `recursions` times, with its parameters and thresholds.

    Fewer: the later recursions go, their routers and norms with them; token-choice then weighs the
    depths that are left against each other. More: the block is run again, for expert-choice with
    the last recursion's router, capacity and threshold. `layers` follows. Nothing changes for the
    number that the model was trained with.

    Raises:
        ValueError: a vanilla model; more recursions than trained where each has parameters of its
            own (norms that are not shared, the depths of token-choice); too many layers.
    """
    rule, setting = "must be at least 1", "recursions"
    check(recursions >= 1, setting, recursions, rule, f"Try {cfg.num_recursions}")
    if recursions == cfg.num_recursions:
        return cfg, params, thresholds
    rule = "a vanilla model (sharing='none') runs its layers once"
    check(cfg.sharing != "none", setting, recursions, rule, "Leave it out")
    if recursions > cfg.num_recursions:
        _check_more(cfg, recursions)
    layers = cfg.shared_layers * recursions + 2 * cfg.is_middle
    rule = (
        f"makes {layers:,} layers; programs are compiled layer by layer, for {_MAX_LAYERS} at most"
    )
    max_recursions = (_MAX_LAYERS - 2 * cfg.is_middle) // cfg.shared_layers
    check(layers <= _MAX_LAYERS, setting, recursions, rule, f"Use at most {max_recursions}")
    if recursions > 2 * cfg.num_recursions:
        _warn(cfg.num_recursions, recursions)
    changed = dataclasses.replace(cfg, num_recursions=recursions, num_layers=layers)
    if cfg.router.kind == "expert":
        shares = _first(cfg.router.capacities(cfg.num_recursions), recursions)
        router = dataclasses.replace(cfg.router, capacity=shares)
        changed = dataclasses.replace(changed, router=router)
    changed.validate()
    new_thresholds = None if thresholds is None else _first(thresholds, recursions)
    return changed, _params(cfg, params, recursions), new_thresholds


def _check_more(cfg: ModelConfig, recursions: int) -> None:
    fix = f"Use at most {cfg.num_recursions}"
    if not cfg.share_norms:
        rule = "each recursion has norms of its own (share_norms=False), and more are not trained"
        fail("recursions", recursions, rule, fix)
    if cfg.router.kind == "token":
        rule = (
            f"token-choice scores the {cfg.num_recursions} depths it was trained with and no others"
        )
        fail("recursions", recursions, rule, fix)


def _first(values: tuple[float, ...], number: int) -> tuple[float, ...]:
    """The first `number` values, the last one again where there are fewer."""
    return values[:number] + values[-1:] * (number - len(values))


def _params(cfg: ModelConfig, params: Params, number: int) -> Params:
    changed = dict(params)
    if not cfg.share_norms:
        norms = {name: {"scale": params["shared"][name]["scale"][:, :number]} for name in _NORMS}
        changed["shared"] = {**params["shared"], **norms}
    if cfg.router.kind != "none":
        changed["router"] = {name: _router(cfg, x, number) for name, x in params["router"].items()}
    return changed


_NORMS = ("norm1", "norm2")


def _router(cfg: ModelConfig, part: Any, number: int) -> Any:
    """The routers `main` or `aux`, or the balancing bias, for `number` recursions."""
    if not isinstance(part, dict):
        return part[:number]
    # Only the joint router of token-choice shares its hidden layer between depths.
    if cfg.router.kind == "token" and cfg.router.arch == "mlp":
        return {**part, "out": part["out"][:, :number]}
    return {name: _rows(x, number) for name, x in part.items()}


def _rows(x: Array, number: int) -> Array:
    missing = number - x.shape[0]
    if missing <= 0:
        return x[:number]
    return jnp.concatenate([x, jnp.repeat(x[-1:], missing, axis=0)])
