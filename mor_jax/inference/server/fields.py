"""Parses a request's JSON object and reads its fields, each with its type and range."""

import collections
import difflib
import json
import math
from typing import Any

from mor_jax.inference.server.errors import APIError, raise_error, require

# Most digits of an integer: parsing time grows faster than the length.
_MAX_DIGITS = 100


def parse_object(body: bytes) -> dict[str, Any]:
    """Parses a request's body as a JSON object. Raises `APIError` on anything else.

    Rejects lone surrogates, NaN and infinite numbers at any depth, because JSON has none, and
    duplicate names, because one of the values would be ignored.
    """
    try:
        values = json.loads(
            body.decode("utf-8"),
            parse_constant=_no_constant,
            parse_int=_integer,
            object_pairs_hook=_object,
        )
        _check_texts(values)
    except UnicodeDecodeError as error:
        raise APIError(
            400, f"the body is not UTF-8 (byte {error.start})", code="not_json"
        ) from None
    except RecursionError:
        raise APIError(400, "the body is nested too deeply", code="not_json") from None
    except ValueError as error:
        # A JSONDecodeError holds the whole text; the message repeats only the position.
        what = getattr(error, "msg", None) or str(error)
        line, column = getattr(error, "lineno", None), getattr(error, "colno", None)
        where = f" (line {line}, column {column})" if line else ""
        raise APIError(400, f"the body is not JSON: {what}{where}", code="not_json") from None
    if not isinstance(values, dict):
        raise APIError(400, "the body must be a JSON object", code="not_json")
    return values


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        duplicate = collections.Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"duplicate name {duplicate[:64]!r}")
    return values


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"a number has {len(digits)} digits, more than {_MAX_DIGITS}")
    return int(digits)


def _check_texts(values: Any) -> None:
    """Raises `ValueError` if a text in a JSON value cannot be written as UTF-8."""
    stack = [values]
    while stack:
        value = stack.pop()
        if isinstance(value, str):
            try:
                value.encode("utf-8")
            except UnicodeEncodeError:
                raise ValueError("a string has half of a surrogate pair") from None
        elif isinstance(value, dict):
            stack.extend(value)
            stack.extend(value.values())
        elif isinstance(value, list) and value and not _numbers(value):
            stack.extend(value)


def _numbers(values: list[Any]) -> bool:
    return all(type(value) is int for value in values)


class Fields:
    """The fields of a JSON object, read by name. null counts as left out.

    `reject_unknown` rejects fields that were never read: a misspelt or unsupported setting must not
    be ignored silently.
    """

    def __init__(self, values: dict[str, Any], path: str = "") -> None:
        self._values = values
        self._path = path
        self._known: set[str] = set()

    def take(self, name: str) -> Any:
        """The value as it is; None if it is left out."""
        self._known.add(name)
        return self._values.get(name)

    def text(self, name: str) -> str | None:
        """A string."""
        value = self.take(name)
        ok = value is None or isinstance(value, str)
        require(ok, self._path + name, value, "must be a string", "Put it in quotes")
        return value

    def boolean(self, name: str) -> bool:
        """true or false; false if it is left out."""
        value = self.take(name)
        ok = value is None or isinstance(value, bool)
        require(ok, self._path + name, value, "must be true or false", "Leave it out for false")
        return bool(value)

    def integer(self, name: str, low: int, high: int) -> int | None:
        """An integer in low .. high; None if it is left out."""
        value = self.take(name)
        ok = value is None or (type(value) is int and low <= value <= high)
        rule = f"must be a whole number in {low} .. {high}"
        require(ok, self._path + name, value, rule, "Leave it out for the default")
        return value

    def number(self, name: str, default: float) -> float:
        """A finite number."""
        value = self.take(name)
        if value is None:
            return default
        ok = type(value) in (int, float) and abs(value) < 1e30 and math.isfinite(value)
        rule = "must be a number below 1e30"
        require(ok, self._path + name, value, rule, f"Leave it out for {default}")
        return float(value)

    def group(self, name: str) -> "Fields":
        """The fields of a nested object; none if it is left out."""
        value = self.take(name)
        ok = value is None or isinstance(value, dict)
        require(ok, self._path + name, value, "must be an object", "Leave it out")
        return Fields(value or {}, f"{self._path}{name}.")

    def reject_unless(self, name: str, *values: Any) -> None:
        """Rejects a field that is not supported, unless it is null or one of `values`."""
        value = self.take(name)
        ok = value is None or any(value == v and type(value) is type(v) for v in values)
        require(ok, self._path + name, value, "is not supported by this server", "Leave it out")

    def reject_unknown(self, *empty_values: Any) -> None:
        """Rejects the first field that was never read, and suggests the closest known name.

        empty_values: values besides null that count as left out.
        """
        for name, value in self._values.items():
            if name not in self._known and value is not None and value not in empty_values:
                matches = difflib.get_close_matches(name, sorted(self._known), n=1)
                fix = f"Did you mean {matches[0]}?" if matches else "Leave it out"
                param = self._path + (name if len(name) <= 64 else name[:64] + "...")
                raise_error(param, value, "unknown setting", fix, code="unknown_parameter")
