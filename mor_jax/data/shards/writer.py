"""Writes a shard under a temporary name and renames it when it is complete."""

import dataclasses
import errno
import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from mor_jax.data.shards.reader import RECORD_TOKENS
from mor_jax.files import fsync, new_file

PARTIAL = ".partial"
# One record per group makes each record a single read. Tokens hardly compress.
_OPTIONS = "group_size:1,uncompressed"


@dataclasses.dataclass(frozen=True)
class Shard:
    """A complete shard on disk, as the manifest lists it."""

    file: str
    documents_file: str
    tokens: int
    documents: int
    bytes: int
    documents_bytes: int
    sha256: str


@contextmanager
def explain_write_errors(path: Path) -> Iterator[None]:
    """Turns a failure to write `path` into an `OSError` with a fix."""
    try:
        yield
    # The ArrayRecord library reports every failure as RuntimeError.
    except (OSError, RuntimeError) as error:
        free = shutil.disk_usage(path.parent).free
        code = error.errno if isinstance(error, OSError) and error.errno else errno.EIO
        rule = f"{path}: cannot be written ({error}); {free:,} bytes are free"
        fix = "Free space, then run the same command again: complete shards are kept"
        raise OSError(code, f"{rule}. {fix}") from error


def pair_hash(*paths: Path) -> str:
    """SHA-256 over the SHA-256 of each file's contents."""
    digests = []
    for path in paths:
        with path.open("rb") as stream:
            digests.append(hashlib.file_digest(stream, "sha256").digest())
    return hashlib.sha256(b"".join(digests)).hexdigest()


def write_file(path: Path, contents: bytes) -> None:
    """Writes a file atomically: it is absent or complete, even after a crash."""
    with explain_write_errors(path), new_file(path, path.with_name(path.name + PARTIAL)) as draft:
        draft.write_bytes(contents)


class ShardWriter:
    """Writes documents into one shard. `tokens`: its number of tokens, including EOS."""

    def __init__(self, directory: Path, stem: str, dtype: np.dtype, eos_id: int) -> None:
        from array_record.python.array_record_module import ArrayRecordWriter

        self._path = directory / f"{stem}.array_record"
        self._ends_path = directory / f"{stem}.documents.npy"
        self._partial = self._path.with_name(self._path.name + PARTIAL)
        self._dtype = dtype.newbyteorder("<")
        self._eos = np.array([eos_id], self._dtype)
        self._buffer: list[np.ndarray] = []
        self._buffered_tokens = 0
        self._ends: list[int] = []
        self.tokens = 0
        with explain_write_errors(self._path):
            self._writer = ArrayRecordWriter(str(self._partial), _OPTIONS)

    def add(self, tokens: np.ndarray) -> None:
        """Appends one document and its EOS."""
        self._buffer += [tokens.astype(self._dtype, copy=False), self._eos]
        self._buffered_tokens += len(tokens) + 1
        self.tokens += len(tokens) + 1
        self._ends.append(self.tokens)
        if self._buffered_tokens >= 16 * RECORD_TOKENS:
            self._flush(self._buffered_tokens // RECORD_TOKENS * RECORD_TOKENS)

    def _flush(self, count: int) -> None:
        if not self._buffer:
            return
        joined = np.concatenate(self._buffer)
        with explain_write_errors(self._path):
            for start in range(0, count, RECORD_TOKENS):
                self._writer.write(joined[start : min(start + RECORD_TOKENS, count)].tobytes())
        self._buffer = [joined[count:]]
        self._buffered_tokens = len(joined) - count

    def finish(self) -> Shard:
        """Writes the buffered tokens, renames both files and returns their description."""
        self._flush(self._buffered_tokens)
        with explain_write_errors(self._path):
            self._writer.close()
            fsync(self._partial)
        # np.save is deterministic.
        ends = np.array(self._ends, np.int64)
        with explain_write_errors(self._ends_path):
            partial = self._ends_path.with_name(self._ends_path.name + PARTIAL)
            with new_file(self._ends_path, partial) as draft, draft.open("wb") as stream:
                np.save(stream, ends)
            self._partial.replace(self._path)
        return Shard(
            file=self._path.name,
            documents_file=self._ends_path.name,
            tokens=self.tokens,
            documents=len(self._ends),
            bytes=self._path.stat().st_size,
            documents_bytes=self._ends_path.stat().st_size,
            sha256=pair_hash(self._path, self._ends_path),
        )
