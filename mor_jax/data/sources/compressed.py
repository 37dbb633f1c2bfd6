"""Streams of compressed files, recognised by their first bytes, not by name.

The file objects of the libraries stop silently at damage after the first frame (bz2, lzma) or at
a truncation (zstandard). Here every byte of a file must belong to a complete frame.
"""

import bz2
import dataclasses
import io
import lzma
import re
import zlib
from collections.abc import Callable
from typing import Any

import zstandard

HEAD = 512
"""Bytes needed to recognise a format."""

_CHUNK = 2**14
"""Compressed bytes decompressed at once: a few bytes may expand a thousandfold."""

_BUFFER = 2**20
_LARGEST_WINDOW = 2**31
"""What `zstd --long=31` writes; the library's own limit is 128 MiB."""


_ERRORS = (OSError, zlib.error, lzma.LZMAError, zstandard.ZstdError)
"""What the decoders raise on damage."""


def _zstd() -> Any:
    return zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW).decompressobj()


@dataclasses.dataclass(frozen=True)
class Compression:
    """A compression format. start: of every frame. decoder: of one frame, as in module `bz2`.

    padding: whether zeros may follow a frame.
    """

    name: str
    start: re.Pattern[bytes]
    decoder: Callable[[], Any]
    padding: bool = False


FORMS = (
    Compression("gzip", re.compile(rb"\x1f\x8b\x08"), lambda: zlib.decompressobj(wbits=31), True),
    # The second pattern is a skippable frame of metadata, such as the sizes that pzstd writes.
    Compression("zstd", re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"), _zstd),
    Compression(
        "xz", re.compile(rb"\xfd7zXZ\x00"), lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ), True
    ),
    Compression("bzip2", re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"), bz2.BZ2Decompressor),
)


def compression_of(head: bytes) -> Compression | None:
    """How a file that begins with `head` is compressed; None if it is not."""
    return next((form for form in FORMS if form.start.match(head)), None)


def decompressed(stream: Any) -> io.BufferedReader:
    """The contents of an open binary stream, decompressed if they are compressed.

    Closing it closes `stream`. Reading raises `OSError` on a damaged or truncated file.
    """
    head = b""
    while len(head) < HEAD and (more := stream.read(HEAD - len(head))):
        head += more
    return io.BufferedReader(_DecompressedChunks(stream, head, compression_of(head)), _BUFFER)


class _DecompressedChunks(io.RawIOBase):
    """A stream whose first bytes were read already, decompressed chunk by chunk."""

    def __init__(self, stream: Any, head: bytes, form: Compression | None) -> None:
        self._stream = stream
        self._rest = head
        self._form = form
        self._decoder: Any = None
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            chunk = self._next()
            if chunk is None:
                return 0
            self._ready = memoryview(chunk)
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _next(self) -> bytes | None:
        """The next chunk, which may be empty; None at the end."""
        raw = self._rest or self._stream.read(_CHUNK if self._form else _BUFFER)
        self._rest = b""
        if self._form is None:
            return raw or None
        if self._decoder is None:
            # No frame is open: the end of the file, zero padding, or the next frame.
            whole = not raw
            raw = raw.lstrip(b"\0") if self._form.padding else raw
            if not raw:
                return None if whole else b""
            self._decoder = self._form.decoder()
        elif not raw:
            raise OSError(f"its {self._form.name} data are cut short")
        return self._decompress(raw, self._form.name)

    def _decompress(self, raw: bytes, name: str) -> bytes:
        try:
            chunk = self._decoder.decompress(raw)
        except _ERRORS as error:
            raise OSError(f"its {name} data are damaged: {error}") from error
        if self._decoder.eof:
            self._rest = self._decoder.unused_data
            self._decoder = None
        return chunk
