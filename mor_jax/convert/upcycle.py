"""Upcycling: initialises a recursive or routed model from a pretrained vanilla one.

A strategy selects the source layers of each shared slot (`init_strategies.py`); routers are
initialised as in a new model. The result needs further training (uptraining) to be useful.
"""

import dataclasses
import difflib
import zlib
from collections.abc import Callable
from typing import Any, Literal, get_args

import numpy as np

from mor_jax.checkpoint.lazy_arrays import ArraySpec, LazyArrays
from mor_jax.config import KVMode, ModelConfig, RouterConfig, Sharing
from mor_jax.config.parsing import check, fail
from mor_jax.convert.init_strategies import (
    STRATEGIES,
    Selection,
    Strategy,
    select_layers,
    share_layers,
)
from mor_jax.convert.names import array_shapes, mor_entries

Routing = Literal["none", "expert", "token"]

# The router of each kind that performs best in the paper.
ROUTERS: dict[Routing, RouterConfig] = {
    "none": RouterConfig(),
    "expert": RouterConfig(kind="expert", activation="sigmoid", alpha=0.1),
    "token": RouterConfig(kind="token", activation="softmax", alpha=1.0, z_loss_coeff=1e-5),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpcycleOptions:
    """The recursive model to create.

    init: strategy that selects the source of shared layers, one of `STRATEGIES`. seed: for the
    strategy `random` and for new routers.
    """

    recursions: int
    sharing: Sharing = "middle_cycle"
    init: Strategy = "stepwise"
    routing: Routing = "none"
    kv: KVMode = "recursion"
    share_norms: bool = True
    seed: int = 0


def parse_upcycle(text: str) -> UpcycleOptions:
    """Parses `recursions=3,sharing=middle_cycle,init=stepwise`; keys as in `UpcycleOptions`.

    Raises:
        ValueError: an unknown key or choice, a key given twice, or no `recursions`.
    """
    options: dict[str, Any] = {}
    for item in filter(None, (item.strip() for item in text.split(","))):
        key, equals, value = item.partition("=")
        if key not in _KEYS:
            near = difflib.get_close_matches(key, _KEYS, n=1, cutoff=0.0)[0]
            rule = f"unknown key; known are {', '.join(_KEYS)}"
            fail("upcycle", item, rule, f"Did you mean {near}=...?")
        check(key not in options, "upcycle", item, f"{key} is given twice", "Give it once")
        check(bool(equals), "upcycle", item, "has no value", f"Write {key}=...")
        options[key] = _KEYS[key](f"upcycle.{key}", value)
    example = "Try 'recursions=3,sharing=middle_cycle,init=stepwise'"
    check("recursions" in options, "upcycle", text, "does not say how many recursions", example)
    return UpcycleOptions(**options)


def upcycled_config(vanilla: ModelConfig, options: UpcycleOptions) -> ModelConfig:
    """The configuration that `vanilla` is upcycled to.

    Raises:
        ValueError: `vanilla` shares layers or has too few, or the options do not fit together.
    """
    rule = "only a model without shared layers can be upcycled"
    sharing, fix = vanilla.sharing, "Import it without --upcycle"
    check(sharing == "none", "model.sharing", sharing, rule, fix)
    cfg = dataclasses.replace(
        vanilla,
        num_layers=len(_selection(vanilla, options).effective),
        sharing=options.sharing,
        num_recursions=options.recursions,
        share_norms=options.share_norms,
        kv_mode=options.kv,
        router=ROUTERS[options.routing],
    )
    cfg.validate("upcycle")
    return cfg


def upcycle(
    vanilla: ModelConfig, cfg: ModelConfig, params: LazyArrays, options: UpcycleOptions
) -> LazyArrays:
    """Parameters of `cfg`, which is `upcycled_config(vanilla, options)`, from those of `vanilla`.

    Routers are initialised as in a new model: N(0, init_std^2), and zeros for a bias, from
    `options.seed`.
    """
    shared = share_layers(params, cfg, _selection(vanilla, options))
    shapes = array_shapes(cfg, mor_entries(cfg))
    routers = {name: ArraySpec(shape) for name, shape in shapes.items() if name not in shared.specs}

    def read(name: str) -> np.ndarray:
        if name in routers:
            return _initial_router(name, routers[name].shape, cfg.init_std, options.seed)
        return shared.read(name)

    return LazyArrays(params.where, {**shared.specs, **routers}, read)


def upcycle_notes(vanilla: ModelConfig, options: UpcycleOptions) -> list[str]:
    """Notes for the report: the source layers, and the layers that do not fit the scheme."""
    chosen = _selection(vanilla, options)
    ends = ", plus an unshared first and last layer" if chosen.ends else ""
    slots = ", ".join("+".join(map(str, slot)) for slot in chosen.slots)
    routers = "" if options.routing == "none" else f"; new {options.routing}-choice routers"
    notes = [
        f"upcycled to {options.sharing}: {len(chosen.slots)} shared layers run "
        f"{options.recursions} times{ends}; {options.init}: initialised from layers {slots} "
        f"(counted from 0){routers}"
    ]
    if len(chosen.source_layers) != vanilla.num_layers:
        dropped = sorted(set(range(vanilla.num_layers)) - set(chosen.source_layers))
        notes.append(
            f"{vanilla.num_layers} layers do not fit {options.sharing} with {options.recursions} "
            f"recursions: {len(chosen.source_layers)} evenly spaced ones are used, without "
            f"{_listed(dropped)}"
        )
    return notes


def _selection(vanilla: ModelConfig, options: UpcycleOptions) -> Selection:
    return select_layers(
        options.sharing, vanilla.num_layers, options.recursions, options.init, options.seed
    )


def _listed(layers: list[int]) -> str:
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"


def _initial_router(name: str, shape: tuple[int, ...], std: float, seed: int) -> np.ndarray:
    if name == "router.bias":
        return np.zeros(shape, np.float32)
    # Each array has its own random stream, so that the order of reading does not matter.
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    return std * rng.standard_normal(shape, np.float32)


def _at_least(low: int) -> Callable[[str, str], int]:
    def convert(path: str, text: str) -> int:
        ok = text.isdecimal() and int(text) >= low
        check(ok, path, text, f"must be a whole number from {low} up", "Try 3")
        return int(text)

    return convert


def _flag(path: str, text: str) -> bool:
    check(text in ("true", "false"), path, text, "must be true or false", "Try 'true'")
    return text == "true"


def _choice(choices: tuple[str, ...]) -> Callable[[str, str], str]:
    def convert(path: str, text: str) -> str:
        near = difflib.get_close_matches(text, choices, n=1, cutoff=0.0)[0]
        check(text in choices, path, text, f"must be one of {choices}", f"Did you mean {near!r}?")
        return text

    return convert


_KEYS: dict[str, Callable[[str, str], Any]] = {
    "recursions": _at_least(1),
    "sharing": _choice(tuple(name for name in get_args(Sharing) if name != "none")),
    "init": _choice(STRATEGIES),
    "routing": _choice(get_args(Routing)),
    "kv": _choice(get_args(KVMode)),
    "share_norms": _flag,
    "seed": _at_least(0),
}


__all__ = [
    "ROUTERS",
    "UpcycleOptions",
    "parse_upcycle",
    "upcycle",
    "upcycle_notes",
    "upcycled_config",
]
