"""Parses nested plain values into frozen dataclasses; raises all configuration errors."""

import copy
import dataclasses
import difflib
import math
import sys
import types
import typing
from collections.abc import Sequence
from typing import Any, Literal

from mor_jax.config.old_names import rename_hint


def fail(path: str, value: Any, rule: str, fix: str) -> typing.NoReturn:
    """Raises `ValueError` in the common form of all configuration errors."""
    raise ValueError(f"{path}={value!r}: {rule}. {fix}")


def check(ok: bool, path: str, value: Any, rule: str, fix: str) -> None:
    """Raises `ValueError` through `fail` unless `ok`."""
    if not ok:
        fail(path, value, rule, fix)


_ARTICLES = {"int": "an int"}


def parse(cls: type, values: dict[str, Any], path: str) -> Any:
    """Builds dataclass `cls` from plain values. Raises `ValueError` on unknown keys or types."""
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            if hint := rename_hint(f"{path}{key}"):
                fail(f"{path}{key}", values[key], "unknown setting", hint)
            closest = difflib.get_close_matches(key, hints, n=1, cutoff=0.0)[0]
            rule = f"unknown setting; there are {', '.join(sorted(hints))}"
            fail(f"{path}{key}", values[key], rule, f"Did you mean {path}{closest}?")
    return cls(**{k: _convert(hints[k], v, f"{path}{k}") for k, v in values.items()})


def _convert(hint: Any, value: Any, path: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        rule = "must be a group of settings"
        check(isinstance(value, dict), path, value, rule, "Set its members instead")
        return parse(typing.cast(type, hint), value, f"{path}.")
    if origin is Literal:
        closest = difflib.get_close_matches(str(value), [str(a) for a in args], n=1, cutoff=0.0)
        check(value in args, path, value, f"must be one of {args}", f"Did you mean {closest[0]!r}?")
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        return _convert(next(a for a in args if a is not type(None)), value, path)
    if origin is tuple:
        ok = isinstance(value, (list, tuple))
        check(ok, path, value, "must be a list of values", "Write it like (1.0, 0.5)")
        return tuple(_convert(args[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        rule = f"must be a float of at most {sys.float_info.max:.3g}"
        check(abs(value) <= sys.float_info.max, path, value, rule, "Write fewer digits")
        return float(value)
    check(value == value, path, value, "must be a number, not NaN", "Give a value")
    ok = type(value) is hint
    expected, got = (_ARTICLES.get(t.__name__, f"a {t.__name__}") for t in (hint, type(value)))
    check(ok, path, value, f"must be {expected}", f"Got {got}")
    return value


def flatten_settings(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested plain values by their dotted paths."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        leaves |= flatten_settings(value, f"{path}.") if isinstance(value, dict) else {path: value}
    return leaves


def with_settings(tree: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """A copy of nested plain values with `settings`, by their dotted paths, replaced."""
    copied = copy.deepcopy(tree)
    for setting, value in settings.items():
        *groups, leaf = setting.split(".")
        group = copied
        for name in groups:
            group = group[name]
        group[leaf] = value
    return copied


def parse_bytes(path: str, text: str) -> int:
    """`2GB`, `500MB` or a plain number -> bytes. Raises `ValueError` on anything else."""
    units = {"GB": 10**9, "MB": 10**6, "KB": 10**3}
    number, unit = text.strip().upper(), 1
    for suffix, factor in units.items():
        if number.endswith(suffix):
            number, unit = number.removesuffix(suffix), factor
    try:
        return int(float(number) * unit)
    except (ValueError, OverflowError) as error:
        fail(path, text, f"must be a number of bytes, such as 2GB or 500MB ({error})", "Try 2GB")


LARGEST = 2**31 - 1
"""Largest integer setting: counts on devices have 32 bits."""

_LARGEST_SEED = 2**32 - 1
_FLOAT32_RANGE = 3.4e38, 1.2e-38


def check_numbers(values: dict[str, Any], unbounded: Sequence[str] = ()) -> None:
    """Raises `ValueError` if a number among nested settings does not fit into 32 bits.

    unbounded: paths of settings that may be arbitrarily large, or infinite.
    """
    for path, value in flatten_settings(values).items():
        if path in unbounded and (value == math.inf or (isinstance(value, int) and value > 0)):
            continue
        for i, item in enumerate(value if isinstance(value, (list, tuple)) else ()):
            _check_number(f"{path}[{i}]", item)
        _check_number(path, value)


def _check_number(path: str, value: Any) -> None:
    if isinstance(value, float):
        most, least = _FLOAT32_RANGE
        rule = f"must have a magnitude between {least:g} and {most:g}, the range of float32"
        ok = value == 0 or least <= abs(value) <= most
        check(ok, path, value, rule, "Try a value closer to 1")
    elif isinstance(value, int):
        most = _LARGEST_SEED if path.endswith("seed") else LARGEST
        bits = "32 bits, unsigned" if most == _LARGEST_SEED else "32 bits"
        check(value <= most, path, value, f"must be at most {most}, {bits}", f"Try {most}")
        check(value >= -LARGEST, path, value, f"must be at least {-LARGEST}, {bits}", "Try 0")


def check_positive(path: str, cfg: Any, *names: str) -> None:
    """Raises `ValueError` unless the settings `names` of the group at `path` are above 0."""
    for name in names:
        value = getattr(cfg, name)
        check(value > 0, f"{path}.{name}", value, "must be greater than 0", "Try a positive value")


def check_not_negative(path: str, cfg: Any, *names: str) -> None:
    """Raises `ValueError` if one of the settings `names` of the group at `path` is below 0."""
    for name in names:
        value = getattr(cfg, name)
        fix = "Try 0" if name.endswith("seed") else "Use 0 or more"
        check(value >= 0, f"{path}.{name}", value, "must not be negative", fix)
