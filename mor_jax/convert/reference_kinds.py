"""Types of the reference's options, so that a message can name the option that is wrong."""

import math
from collections.abc import Mapping
from typing import Any

from mor_jax.config.parsing import check, fail

_BOOLS = {"enable", "ln_share", "rand_router", "z_loss", "include_first", "update_cache"}
_INTS = {"base_depth", "num_recursion", "cap_warmup_step", "bal_warmup_step"}
_FLOATS = {"z_coeff", "temp", "alpha", "coeff", "u"}
_STRINGS = {
    *("sharing", "initialization", "type", "router_type", "router_func"),
    *("sampling", "balancing", "gating"),
}
# Options that may not be null; null means the reference's default elsewhere.
_REQUIRED = {"recursive.num_recursion", "recursive.sharing"}
_LARGEST = {"num_recursion": 10**4, "base_depth": 10**4}
"""More is a typing error: the names of so many layers would not fit into memory."""


def check_group(path: str, value: Any) -> None:
    """Raises `ValueError` unless `value` is a group of options, or None."""
    ok = value is None or isinstance(value, Mapping)
    check(ok, path, value, "must be a group of options", "Write its options below it")


def check_option(path: str, value: Any) -> None:
    """Raises `ValueError` unless the option at `path` (`mor.expert.alpha`) can have `value`."""
    name = path.rpartition(".")[2]
    if value is None and name not in _FLOATS and path not in _REQUIRED:
        return
    if name in _BOOLS:
        check(type(value) is bool, path, value, "must be true or false", "Write it without quotes")
    elif name in _INTS:
        most = _LARGEST.get(name, 2**53)
        # Steps may be written as 1e3; sizes must be integers.
        steps = name not in _LARGEST and type(value) is float and value.is_integer()
        whole = type(value) is int or steps
        least = int(path in _REQUIRED)
        rule = f"must be a whole number from {least} to {most}"
        check(whole and least <= value <= most, path, value, rule, "Write the number out")
    elif name in _FLOATS:
        finite_number(path, value)
    elif name in _STRINGS:
        check(isinstance(value, str), path, value, "must be a name", "Write a word")
    elif name == "capacity":
        capacity_fractions(path, value)


def finite_number(path: str, value: Any) -> float:
    """A finite number, also one that YAML parses as a string (1e-5).

    Raises `ValueError` for anything else.
    """
    rule, fix = "must be a number", "Write it like 0.001"
    check(type(value) in (int, float, str), path, value, rule, fix)
    try:
        number = float(value)
    except (ValueError, OverflowError):
        fail(path, value, rule, fix)
    check(math.isfinite(number), path, value, rule, fix)
    return number


def capacity_fractions(path: str, value: Any) -> tuple[float, ...]:
    """Fractions of tokens from "1.0,0.5", a number or a list of numbers.

    Raises `ValueError` for anything else.
    """
    values = value if isinstance(value, (list, tuple)) else str(value).split(",")
    return tuple(finite_number(path, fraction) for fraction in values)
