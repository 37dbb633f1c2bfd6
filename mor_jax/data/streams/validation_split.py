"""The split into training and validation documents.

The split of a document depends only on a hash of its text, not on order, paths or other documents,
so duplicates of a text are never in both splits.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

from mor_jax.config.parsing import check

_RANGE = 2**64


def text_hash(text: str) -> int:
    """A 64-bit hash of the text, uniform over 0 .. 2**64 - 1."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def is_validation(hashed: int, share: float) -> bool:
    """Whether a document with this `text_hash` is in the validation split of `share` in [0, 1]."""
    return hashed < share * _RANGE


def validation_mask(hashes: Sequence[int], share: float, setting: str, spec: str) -> np.ndarray:
    """Which documents of a source are validation documents, bool [documents].

    If `is_validation` would leave a split empty, as in a small source, that split gets the document
    closest to the threshold. Raises `ValueError` without two distinct documents.
    """
    distinct = np.unique(np.array(hashes, np.uint64))
    rule = f"has {len(distinct)} distinct non-empty documents; needs two, one for training and one "
    rule += "for validation"
    fix = "Add documents, or split the file: each file (text) or record (jsonl, parquet) is one"
    check(len(distinct) >= 2, setting, spec, rule, fix)
    count = sum(is_validation(int(h), share) for h in distinct)
    limit = distinct[min(max(count, 1), len(distinct) - 1) - 1]
    return np.array(hashes, np.uint64) <= limit
