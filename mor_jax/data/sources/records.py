"""Text from bytes and values of records: encodings, byte order marks, invalid characters."""

import codecs
import dataclasses
import re
from typing import Any

from mor_jax.config.parsing import check, fail
from mor_jax.data.sources.skipped_records import EMPTY, NUL, SURROGATE, SkippedRecords

MARK = codecs.BOM_UTF8
"""The byte order mark, which some editors put before UTF-8. It is not part of the text."""

_FEWEST = 4
"""Pairs of bytes needed to tell UTF-16 from a single NUL in a short text."""

_WIDE_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}

_FOREIGN = {
    b"PAR1": ("parquet", "Read it with 'parquet:...'"),
    b"ARROW1": ("an Arrow file", "Convert it to parquet, for example with pyarrow"),
    b"PK\x03\x04": ("a zip archive", "Unpack it, or compress each file with gzip or zstd"),
    b"7z\xbc\xaf": ("a 7z archive", "Unpack it, or compress each file with gzip or zstd"),
    b"Rar!\x1a": ("a rar archive", "Unpack it, or compress each file with gzip or zstd"),
    b"\x04\x22\x4d\x18": ("compressed with lz4", "Decompress it with lz4 -d, or use gzip or zstd"),
    b"]\x00\x00": ("in the legacy .lzma format", "Recompress it: xz -dc FILE | xz > FILE.xz"),
    b"\x1f\x9d": ("compressed with Unix compress", "Decompress it with gzip -d"),
    b"%PDF-": ("a PDF file", "Exclude it from the pattern, or extract its text first"),
}
_TAR = (257, b"ustar")
_CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]")

_NUL_SHARE = 0.01
"""Fraction of NULs above which bytes are not text: stray NULs are few, binary data has many."""


def check_head(head: bytes, where: str, setting: str = "file") -> None:
    """Raises `ValueError` if bytes that begin with `head` are recognisably not UTF-8 text.

    head: the first bytes, decompressed. setting: its name in errors, which also
    name other encodings and file formats that are recognised.
    """
    if _binary(head):
        for start, (name, fix) in _FOREIGN.items():
            check(not head.startswith(start), setting, where, f"is {name}, not text", fix)
        at, mark = _TAR
        fix = "Unpack it: each of its files is then read separately"
        check(head[at : at + len(mark)] != mark, setting, where, "is a tar archive", fix)
    encoding = next((name for start, name in _WIDE_MARKS.items() if head.startswith(start)), None)
    encoding = encoding or _without_mark(head)
    fix = f"Convert it: iconv -f {encoding} -t UTF-8"
    check(encoding is None, setting, where, f"is {encoding}, not UTF-8", fix)


def _binary(head: bytes) -> bool:
    """Whether no text begins with `head`. Some marks are letters, so texts may begin with them."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return True
    return _CONTROL.search(head) is not None


def _without_mark(head: bytes) -> str | None:
    """UTF-16 without a byte order mark: in western text every second byte is NUL."""
    pairs = len(head) // 2
    if pairs < _FEWEST:
        return None
    zeros = [head[start : 2 * pairs : 2].count(0) for start in (0, 1)]
    for few, many, name in ((0, 1, "UTF-16LE"), (1, 0, "UTF-16BE")):
        if zeros[many] > 0.6 * pairs and zeros[few] < 0.1 * pairs:
            return name
    return None


def decode(raw: bytes, where: str, setting: str = "file") -> str:
    """UTF-8 to text. Raises `ValueError` that names `setting`."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        rule = f"is not UTF-8: byte {raw[error.start]:#04x} at offset {error.start}"
        fail(setting, where, rule, "Convert it, for example with iconv -f latin1 -t utf-8")


def file_text(raw: bytes, where: str, skipped_records: SkippedRecords) -> str:
    """The text of a whole file. Raises `ValueError` if it is not text."""
    check_head(raw[:512], where)
    text = decode(raw.removeprefix(MARK), where)
    nuls = text.count("\0")
    rule = f"contains a NUL character at offset {text.find(chr(0))}, so it is not text"
    if nuls > 1:
        rule = f"{rule} ({nuls} of {len(text)} characters are NUL)"
    fix = "Exclude binary files from the pattern"
    check(nuls <= _NUL_SHARE * len(text), "file", where, rule, fix)
    return cleaned(text, where, skipped_records)


@dataclasses.dataclass(frozen=True)
class Field:
    """The field of a record, or column of a table, with the text. setting: its name in errors."""

    name: str
    setting: str = "data.text_key"

    def require(self, names: list[str], where: str) -> None:
        """Raises `ValueError` unless the record or table at `where`, of fields `names`, has it."""
        rule = f"{where} has no such field, only {sorted(names)}"
        fix = "Name the field that holds the text"
        check(self.name in names, self.setting, self.name, rule, fix)

    def text(self, value: Any, where: str, skipped_records: SkippedRecords) -> str:
        """What the field of the record at `where` holds, as text; null is empty.

        Raises `ValueError` if it is not text or not UTF-8.
        """
        if value is None:
            value = ""
        if isinstance(value, bytes):
            value = decode(value, where)
        rule = f"holds {type(value).__name__} in {where}, not text"
        ok = isinstance(value, str)
        check(ok, self.setting, self.name, rule, "Name a field that contains text")
        return cleaned(_without_surrogates(value, where, skipped_records), where, skipped_records)


def cleaned(text: str, where: str, skipped_records: SkippedRecords) -> str:
    """A document with NUL removed; removed characters and empty documents are counted."""
    if "\0" in text:
        skipped_records.add(NUL, where, text.count("\0"))
        text = text.replace("\0", "")
    if not text:
        skipped_records.add(EMPTY, where)
    return text


def _without_surrogates(text: str, where: str, skipped_records: SkippedRecords) -> str:
    """Replaces unpaired surrogates, which JSON can express but no text encoding can."""
    if text.isascii():
        return text
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:
        whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        count = whole.count("\ufffd") - text.count("\ufffd")
        if count:
            skipped_records.add(SURROGATE, where, count)
        return whole
