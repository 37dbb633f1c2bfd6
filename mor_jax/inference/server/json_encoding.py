"""JSON encoding, whole or in parts.

Encoding blocks the event loop. A response may have tens of megabytes, so it is built and encoded in
small parts.
"""

import itertools
import json
from collections.abc import Iterator
from typing import Any

# Items of an iterator that are encoded at a time.
_ITEMS_PER_PART = 16


def encode(value: Any) -> bytes:
    """Compact JSON in UTF-8. Iterators become lists."""
    text = json.dumps(
        value, ensure_ascii=False, separators=(",", ":"), allow_nan=False, default=_to_list
    )
    return text.encode()


def iter_encode(value: Any) -> Iterator[bytes]:
    """The same bytes as `encode`, in parts of at most a few items of an iterator."""
    if isinstance(value, dict):
        yield b"{"
        for i, (name, inner) in enumerate(value.items()):
            yield (b"," if i else b"") + encode(name) + b":"
            yield from iter_encode(inner)
        yield b"}"
    elif isinstance(value, list):
        yield b"["
        for i, inner in enumerate(value):
            yield b"," if i else b""
            yield from iter_encode(inner)
        yield b"]"
    elif isinstance(value, Iterator):
        yield b"["
        separator = b""
        while items := list(itertools.islice(value, _ITEMS_PER_PART)):
            yield separator + encode(items)[1:-1]
            separator = b","
        yield b"]"
    else:
        yield encode(value)


def _to_list(value: Any) -> list[Any]:
    if not isinstance(value, Iterator):
        raise TypeError(f"{type(value).__name__} cannot be encoded as JSON")
    return list(value)
