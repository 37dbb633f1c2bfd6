"""Which documents are held out for evaluation.

A document's side follows from a hash of its text alone: it does not depend on order, on paths or
on other documents, and a text that occurs twice is never on both sides.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

from mor_jax.config.parsing import check

_RANGE = 2**64


def text_hash(text: str) -> int:
    """64 bits that depend on the text alone, evenly spread over 0 .. 2**64 - 1."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def is_validation(hashed: int, share: float) -> bool:
    """Whether a document with this `text_hash` belongs to the held-out `share` in [0, 1]."""
    return hashed < share * _RANGE


def validation_mask(hashes: Sequence[int], share: float, setting: str, spec: str) -> np.ndarray:
    """Which of a corpus's documents are held out, bool [documents].

    In a corpus so small that `is_validation` would leave a side empty, that side gets the document
    nearest to the limit. Raises `ValueError` if there are not two different documents.
    """
    different = np.unique(np.array(hashes, np.uint64))
    rule = f"has {len(different)} different documents that are not empty; two are needed, one to "
    rule += "train on and one to hold out"
    fix = "Add documents, or split the file: each file (text) or record (jsonl, parquet) is one"
    check(len(different) >= 2, setting, spec, rule, fix)
    wanted = sum(is_validation(int(h), share) for h in different)
    limit = different[min(max(wanted, 1), len(different) - 1) - 1]
    return np.array(hashes, np.uint64) <= limit
