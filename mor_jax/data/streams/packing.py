"""Packing: sequences of a token stream as a pure function of their index."""

import numpy as np

from mor_jax.config.parsing import check
from mor_jax.data.streams.token_streams import TokenStream

Row = dict[str, np.ndarray]


class PackedSequences:
    """All full sequences of a stream, by index.

    Sequence i covers positions i * length .. (i+1) * length; its last token is the first of
    sequence i + 1, so every position has a target, and every token except the stream's first is a
    target exactly once. A remainder shorter than a sequence is dropped.
    """

    def __init__(self, stream: TokenStream, length: int, document_mask: bool) -> None:
        rule = f"has {len(stream)} tokens, but one sequence of seq_len={length} needs {length + 1}"
        fix = "Lower seq_len, add text, or raise data.validation_fraction if it is the "
        fix += "validation split"
        check(len(stream) > length, stream.setting, stream.name, rule, fix)
        self._stream = stream
        self._length = length
        self._within = document_mask

    def __len__(self) -> int:
        return (len(self._stream) - 1) // self._length

    def __getitem__(self, index: int) -> Row:
        """`tokens` and `targets`, int32 [length]; with a document mask `segments` and `positions`.

        Documents of a sequence are numbered from 1. A document that began in an earlier sequence
        continues as document 1 at position 0: rotary embeddings use only position differences.
        """
        start = int(index) * self._length
        chunk = self._stream.read(start, start + self._length + 1).astype(np.int32)
        row = {"tokens": chunk[:-1], "targets": chunk[1:]}
        if self._within:
            cuts = self._stream.cuts(start, start + self._length) - start
            starts = np.concatenate([[0], cuts]).astype(np.int32)
            marks = np.zeros(self._length, np.int32)
            marks[starts] = 1
            row["segments"] = np.cumsum(marks, dtype=np.int32)
            row["positions"] = np.arange(self._length, dtype=np.int32) - starts[row["segments"] - 1]
        return row


def evenly_spaced(rows: int, count: int) -> np.ndarray:
    """`count` distinct indices evenly spaced over 0 .. rows - 1, ascending; at most all of them."""
    count = min(count, rows)
    return np.arange(count, dtype=np.int64) * rows // max(count, 1)
