"""Upcycling: a plain pretrained model becomes the start of a recursive or a routed one.

Which layers a shared slot takes is up to a strategy (`init_strategies.py`); routers start as in a
fresh model. What comes out has to be trained on before it is of use.
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

# The routers that the paper found best of each kind.
ROUTERS: dict[Routing, RouterConfig] = {
    "none": RouterConfig(),
    "expert": RouterConfig(kind="expert", activation="sigmoid", alpha=0.1),
    "token": RouterConfig(kind="token", activation="softmax", alpha=1.0, z_loss_coeff=1e-5),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpcycleOptions:
    """What a plain model is to become.

    init: where shared layers come from, one of `STRATEGIES`. seed: of the strategy `random` and of
    new routers.
    """

    recursions: int
    sharing: Sharing = "middle_cycle"
    init: Strategy = "stepwise"
    routing: Routing = "none"
    kv: KVMode = "recursion"
    share_norms: bool = True
    seed: int = 0


def parse_upcycle(text: str) -> UpcycleOptions:
    """`recursions=3,sharing=middle_cycle,init=stepwise` and so on, keys as in `UpcycleOptions`.

    Raises:
        ValueError: an unknown key or choice, a key given twice, or no `recursions`.
    """
    found: dict[str, Any] = {}
    for item in filter(None, (item.strip() for item in text.split(","))):
        key, equals, value = item.partition("=")
        if key not in _KEYS:
            near = difflib.get_close_matches(key, _KEYS, n=1, cutoff=0.0)[0]
            fail("upcycle", item, f"takes {', '.join(_KEYS)}", f"Did you mean {near}=...?")
        check(key not in found, "upcycle", item, f"{key} is given twice", "Give it once")
        check(bool(equals), "upcycle", item, "has no value", f"Write {key}=...")
        found[key] = _KEYS[key](f"upcycle.{key}", value)
    example = "Try 'recursions=3,sharing=middle_cycle,init=stepwise'"
    check("recursions" in found, "upcycle", text, "does not say how many recursions", example)
    return UpcycleOptions(**found)


def upcycled_config(plain: ModelConfig, wish: UpcycleOptions) -> ModelConfig:
    """The configuration that `plain` is upcycled to.

    Raises:
        ValueError: `plain` is not plain or too shallow, or the wish is of no possible model.
    """
    rule = "only a plain model can be upcycled"
    check(plain.sharing == "none", "model.sharing", plain.sharing, rule, "Import it as it is")
    cfg = dataclasses.replace(
        plain,
        num_layers=len(_selection(plain, wish).effective),
        sharing=wish.sharing,
        num_recursions=wish.recursions,
        share_norms=wish.share_norms,
        kv_mode=wish.kv,
        router=ROUTERS[wish.routing],
    )
    cfg.validate("upcycle")
    return cfg


def upcycle(
    plain: ModelConfig, cfg: ModelConfig, params: LazyArrays, wish: UpcycleOptions
) -> LazyArrays:
    """Parameters of `cfg`, which is `upcycled_config(plain, wish)`, from those of `plain`.

    Routers are drawn as in a fresh model, N(0, init_std^2) and zeros for a bias, from `wish.seed`.
    """
    shared = share_layers(params, cfg, _selection(plain, wish))
    shapes = array_shapes(cfg, mor_entries(cfg))
    routers = {name: ArraySpec(shape) for name, shape in shapes.items() if name not in shared.specs}

    def read(name: str) -> np.ndarray:
        if name in routers:
            return _fresh(name, routers[name].shape, cfg.init_std, wish.seed)
        return shared.read(name)

    return LazyArrays(params.where, {**shared.specs, **routers}, read)


def upcycle_notes(plain: ModelConfig, wish: UpcycleOptions) -> list[str]:
    """What a reader should know of it: layers that do not fit, layers that were taken."""
    chosen = _selection(plain, wish)
    ends = " and the first and the last by themselves" if chosen.ends else ""
    slots = ", ".join("+".join(map(str, slot)) for slot in chosen.slots)
    routers = "" if wish.routing == "none" else f"; {wish.routing}-choice routers are new"
    notes = [
        f"upcycled to {wish.sharing}: {len(chosen.slots)} shared layers run {wish.recursions} "
        f"times{ends}; {wish.init}: they come from layers {slots} (from 0){routers}"
    ]
    if len(chosen.kept) != plain.num_layers:
        rest = sorted(set(range(plain.num_layers)) - set(chosen.kept))
        notes.append(
            f"{plain.num_layers} layers do not fit {wish.sharing} with {wish.recursions} "
            "recursions: "
            f"{len(chosen.kept)} evenly spaced ones stand for them, without {_listed(rest)}"
        )
    return notes


def _selection(plain: ModelConfig, wish: UpcycleOptions) -> Selection:
    return select_layers(wish.sharing, plain.num_layers, wish.recursions, wish.init, wish.seed)


def _listed(layers: list[int]) -> str:
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"


def _fresh(name: str, shape: tuple[int, ...], std: float, seed: int) -> np.ndarray:
    if name == "router.bias":
        return np.zeros(shape, np.float32)
    # Each array has a stream of its own, so that the order of reading does not matter.
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    return std * rng.standard_normal(shape, np.float32)


def _from(low: int) -> Callable[[str, str], int]:
    def convert(path: str, text: str) -> int:
        ok = text.isdecimal() and int(text) >= low
        check(ok, path, text, f"must be a whole number from {low} on", "Try 3")
        return int(text)

    return convert


def _yes(path: str, text: str) -> bool:
    check(text in ("true", "false"), path, text, "must be true or false", "Try 'true'")
    return text == "true"


def _choice(choices: tuple[str, ...]) -> Callable[[str, str], str]:
    def convert(path: str, text: str) -> str:
        near = difflib.get_close_matches(text, choices, n=1, cutoff=0.0)[0]
        check(text in choices, path, text, f"must be one of {choices}", f"Did you mean {near!r}?")
        return text

    return convert


_KEYS: dict[str, Callable[[str, str], Any]] = {
    "recursions": _from(1),
    "sharing": _choice(tuple(name for name in get_args(Sharing) if name != "none")),
    "init": _choice(STRATEGIES),
    "routing": _choice(get_args(Routing)),
    "kv": _choice(get_args(KVMode)),
    "share_norms": _yes,
    "seed": _from(0),
}


__all__ = [
    "ROUTERS",
    "UpcycleOptions",
    "parse_upcycle",
    "upcycle",
    "upcycle_notes",
    "upcycled_config",
]
