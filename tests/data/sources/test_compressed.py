"""Compressed files: every form by its first bytes, in one frame or several, whole or damaged."""

import bz2
import functools
import gzip
import io
import itertools
import lzma
import random

import pytest
import zstandard

from mor_jax.data.sources import compressed
from mor_jax.data.sources.documents import open_documents

COMPRESS = {
    "gzip": gzip.compress,
    "zstd": zstandard.ZstdCompressor(write_checksum=True).compress,
    "xz": lzma.compress,
    "bzip2": functools.partial(bz2.compress, compresslevel=1),
}
TEXTS = [f"document {i} of some words" for i in range(40)]
LINES = [f'{{"text": "{text}"}}\n'.encode() for text in TEXTS]
# Frames of the zstd format that hold notes, as pzstd writes them before each frame of data.
NOTE = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"note"

forms = pytest.mark.parametrize("form", COMPRESS)


def frames(form, *cuts):
    """The lines in frames that end at `cuts`, not all of them at the end of a line."""
    raw = b"".join(LINES)
    bounds = [0, *cuts, len(raw)]
    return [COMPRESS[form](raw[a:b]) for a, b in itertools.pairwise(bounds)]


def read(path, start=0):
    return list(open_documents(f"jsonl:{path}").read(start))


@forms
def test_read_whatever_the_name_from_any_line(tmp_path, form):
    path = tmp_path / "corpus.jsonl"
    for contents in (frames(form), frames(form, 100, 101, 900), frames(form, 900, 900)):
        path.write_bytes(b"".join(contents))
        assert read(path) == TEXTS
        assert read(path, 17) == TEXTS[17:]
    path.write_bytes(COMPRESS[form](b""))
    assert read(path) == []


def test_other_names_and_whole_text_files(tmp_path):
    (tmp_path / "plain.jsonl.gz").write_bytes(b"".join(LINES))
    assert read(tmp_path / "plain.jsonl.gz") == TEXTS
    for form, compress in COMPRESS.items():
        (tmp_path / f"{form}.txt").write_bytes(compress("naïve\n".encode() * 9))
    source = open_documents(f"text:{tmp_path}/*.txt")
    assert list(source.read(0)) == ["naïve\n" * 9] * 4


def test_padding_notes_and_large_windows(tmp_path):
    path = tmp_path / "x"
    one, two = frames("gzip", 300)
    path.write_bytes(one + b"\0" * 100 + two + b"\0" * 20_000)
    assert read(path) == TEXTS
    one, two = frames("zstd", 300)
    path.write_bytes(NOTE + one + NOTE + two)
    assert read(path) == TEXTS
    # More than the 128 MiB that the library allows by itself.
    window = zstandard.ZstdCompressionParameters.from_level(1, window_log=28, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=window).compressobj()
    path.write_bytes(compressor.compress(b"".join(LINES)) + compressor.flush())
    assert read(path) == TEXTS


@forms
def test_a_cut_file_is_told_with_its_line(tmp_path, form):
    path = tmp_path / "x.jsonl"
    one, two = frames(form, 2 * len(LINES[0]))
    for kept in (len(two) - 1, len(two) // 2, 5, 1):
        path.write_bytes(one + two[:kept])
        with pytest.raises(ValueError, match=rf"file='.*x\.jsonl:\d+': .*its {form} data are"):
            read(path)
    path.write_bytes(one + two[:1])
    with pytest.raises(ValueError, match=r"x\.jsonl:3': cannot be read"):
        read(path)


@forms
def test_damage_is_told_and_nothing_behind_it_is_dropped(tmp_path, form):
    """The libraries' own file objects end in silence where a second frame does not begin well."""
    path = tmp_path / "x.jsonl"
    one, two = frames(form, 2 * len(LINES[0]))
    middle = len(two) // 2
    for second in (
        b"no frame at all, but long enough to be one",
        b"x",
        two[:middle] + bytes(byte ^ 255 for byte in two[middle : middle + 9]) + two[middle + 9 :],
    ):
        path.write_bytes(one + second)
        with pytest.raises(ValueError, match=rf"x\.jsonl:\d+': cannot be read \(its {form} data"):
            read(path)


@forms
def test_nothing_is_read_long_before_it_is_needed(form):
    class Counting(io.BytesIO):
        taken = 0

        def read(self, size=-1):
            assert 0 < size <= 2**20
            piece = super().read(size)
            self.taken += len(piece)
            return piece

    # Random digits hardly compress.
    raw = bytes(byte % 10 + 48 for byte in random.Random(0).randbytes(400_000))
    stream = Counting(COMPRESS[form](raw))
    whole = len(stream.getvalue())
    with compressed.decompressed(stream) as opened:
        assert opened.read(10) == raw[:10]
        assert stream.taken < whole * 0.7
        assert opened.read() == raw[10:]
    assert stream.closed
