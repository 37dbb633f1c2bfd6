"""What kinds of values the reference's options take, so that a wrong one is told by its name."""

import math
from collections.abc import Mapping
from typing import Any

from mor_jax.config.parsing import check, fail

_FLAGS = {"enable", "ln_share", "rand_router", "z_loss", "include_first", "update_cache"}
_WHOLE = {"base_depth", "num_recursion", "cap_warmup_step", "bal_warmup_step"}
_REAL = {"z_coeff", "temp", "alpha", "coeff", "u"}
_TEXT = {
    *("sharing", "initialization", "type", "router_type", "router_func"),
    *("sampling", "balancing", "gating"),
}
# Without these there is no model; elsewhere nothing means what the reference assumes.
_NEEDED = {"recursive.num_recursion", "recursive.sharing"}
_MOST = {"num_recursion": 10**4, "base_depth": 10**4}
"""More is a slip: names of so many layers would fill the memory."""


def check_group(path: str, value: Any) -> None:
    """Raises `ValueError` unless `value` is a group of options, or None."""
    ok = value is None or isinstance(value, Mapping)
    check(ok, path, value, "must be a group of options", "Write its options below it")


def check_option(path: str, value: Any) -> None:
    """Raises `ValueError` unless the option at `path` (`mor.expert.alpha`) can have `value`."""
    name = path.rpartition(".")[2]
    if value is None and name not in _REAL and path not in _NEEDED:
        return
    if name in _FLAGS:
        check(type(value) is bool, path, value, "must be true or false", "Write it without quotes")
    elif name in _WHOLE:
        most = _MOST.get(name, 2**53)
        # Steps may be written as 1e3; sizes are counted with.
        steps = name not in _MOST and type(value) is float and value.is_integer()
        whole = type(value) is int or steps
        least = int(path in _NEEDED)
        rule = f"must be a whole number from {least} to {most}"
        check(whole and least <= value <= most, path, value, rule, "Write the number out")
    elif name in _REAL:
        real(path, value)
    elif name in _TEXT:
        check(isinstance(value, str), path, value, "must be a name", "Write a word")
    elif name == "capacity":
        shares(path, value)


def real(path: str, value: Any) -> float:
    """A number, also one that YAML took for a text (1e-5). Raises `ValueError` for others."""
    rule, fix = "must be a number", "Write it like 0.001"
    check(type(value) in (int, float, str), path, value, rule, fix)
    try:
        found = float(value)
    except (ValueError, OverflowError):
        fail(path, value, rule, fix)
    check(math.isfinite(found), path, value, rule, fix)
    return found


def shares(path: str, value: Any) -> tuple[float, ...]:
    """Shares of tokens, told as "1.0,0.5", a lone number or a list of numbers."""
    listed = value if isinstance(value, (list, tuple)) else str(value).split(",")
    return tuple(real(path, share) for share in listed)
