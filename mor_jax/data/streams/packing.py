"""Packing: rows of a token stream as a pure function of the row's number."""

import numpy as np

from mor_jax.config.parsing import check
from mor_jax.data.streams.token_streams import TokenStream

Row = dict[str, np.ndarray]


class PackedSequences:
    """All full rows of a stream, by index.

    Row i covers positions i * length .. (i+1) * length; its last token is the first of row i + 1,
    so that every position has a target and every token but the stream's first is one once. What
    is left at the end and fills no row is dropped.
    """

    def __init__(self, stream: TokenStream, length: int, document_mask: bool) -> None:
        split_rule = f"has {len(stream)} tokens, but one row of length={length} needs {length + 1}"
        fix = "Shorten the rows, add text, or change data.validation_fraction if it is the "
        fix += "held-out split"
        check(len(stream) > length, stream.setting, stream.name, split_rule, fix)
        self._stream = stream
        self._length = length
        self._within = document_mask

    def __len__(self) -> int:
        return (len(self._stream) - 1) // self._length

    def __getitem__(self, index: int) -> Row:
        """`tokens` and `targets`, int32 [length]; `segments` and `positions` if within documents.

        Documents of a row are numbered from 1. A document that began in an earlier row goes on as
        document 1, at position 0: only differences of positions matter to rotary embeddings.
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


def rows_per_host(rows: int, count: int) -> np.ndarray:
    """`count` different row numbers spread evenly over 0 .. rows - 1, ascending; all if fewer."""
    count = min(count, rows)
    return np.arange(count, dtype=np.int64) * rows // max(count, 1)
