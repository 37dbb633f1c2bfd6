"""Where documents come from: the standard library, text, JSONL and parquet files, TFDS.

A source is a fixed order of documents that can be read from any one onwards. A place that holds
no text (an empty line, a file of the standard library in another encoding) is an empty document;
those are dropped later, so that numbering never depends on content.
"""

import dataclasses
import functools
import glob
import gzip
import hashlib
import json
import os
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from mor_jax.config import check, fail
from mor_jax.data.optional import need

STDLIB_SUFFIXES = frozenset({".py", ".txt", ".rst", ".md", ".html"})
STDLIB_SKIPPED = frozenset({"site-packages", "dist-packages", "__pycache__"})
KINDS = ("stdlib", "text:GLOB", "jsonl:GLOB", "parquet:GLOB", "tfds:NAME[:SPLIT]", "shards:DIR")


@dataclasses.dataclass(frozen=True)
class Documents:
    """The documents of one source.

    setting: what errors call it, such as `data.sources[0]`.
    spec: as configured.
    identity: hash of the names and sizes behind it, without the folder they are in.
    size: bytes of its files, 0 where that is not known.
    read: `read(start)` yields the texts from document `start` onwards.
    """

    setting: str
    spec: str
    identity: str
    size: int
    read: Callable[[int], Iterator[str]]


def open_documents(spec: str, text_key: str = "text", setting: str = "data.sources") -> Documents:
    """The documents of a source that holds text; `shards:` is opened elsewhere.

    `text_key` names the field of a JSONL line, the column of a parquet file or the feature of a
    TFDS example. Raises `ValueError` if the source does not exist or has no document.
    """
    kind, _, rest = spec.partition(":")
    if kind == "tfds":
        # Deferred: tensorflow_datasets takes most of a second to import.
        from mor_jax.data import tfds_source

        return Documents(setting, spec, *tfds_source.open_examples(rest, text_key, setting, spec))
    if kind == "stdlib":
        check(not rest, setting, spec, "takes no argument", "Write it as 'stdlib'")
        root = Path(sysconfig.get_path("stdlib"))
        files, reader = _stdlib_files(root), _read_stdlib
        rule = f"the running Python keeps no source files in {root}"
        check(bool(files), setting, spec, rule, "Use text:GLOB with files of your own")
    else:
        readers = {"text": _read_text, "jsonl": _read_jsonl, "parquet": _read_parquet}
        rule = f"unknown source; there are {', '.join(KINDS)}"
        check(kind in readers, setting, spec, rule, f"Did you mean 'text:{spec}'?")
        root, files = _matching(rest, setting, spec)
        reader = readers[kind]
    if kind == "parquet":
        need("pyarrow", setting, spec)
    names = [(os.path.relpath(file, root), os.path.getsize(file)) for file in files]
    identity = hashlib.sha256(repr((kind, names)).encode()).hexdigest()[:32]
    size = sum(size for _, size in names)
    return Documents(setting, spec, identity, size, functools.partial(reader, files, text_key))


@functools.cache
def _stdlib_files(root: Path) -> list[Path]:
    found = []
    for folder, inside, names in os.walk(root):
        inside[:] = set(inside) - STDLIB_SKIPPED
        texts = (name for name in names if os.path.splitext(name)[1] in STDLIB_SUFFIXES)
        paths = (os.path.join(folder, name) for name in texts)
        found += [path for path in paths if os.path.isfile(path)]
    return [Path(path) for path in sorted(found)]


def _matching(pattern: str, setting: str, spec: str) -> tuple[Path, list[Path]]:
    pattern = os.path.expanduser(pattern)
    if os.path.isdir(pattern):
        kind = spec.partition(":")[0]
        rule = "is a directory, not a file or a pattern"
        fail(setting, spec, rule, f"Try '{kind}:{os.path.join(pattern, '**', '*')}'")
    files = sorted(Path(name) for name in glob.glob(pattern, recursive=True))
    files = [file for file in files if file.is_file()]
    rule = f"matches no file (looked from {os.getcwd()})"
    check(bool(files), setting, spec, rule, "Check the path; ** matches folders at any depth")
    fixed = pattern.split("*")[0].split("?")[0].split("[")[0]
    return Path(os.path.dirname(fixed) or "."), files


def _read_bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        fail("file", str(file), f"cannot be read ({error.strerror})", "Check its permissions")


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        rule = f"is not UTF-8: byte {raw[error.start]:#04x} at offset {error.start}"
        fail("file", where, rule, "Convert it, such as with iconv -f latin1 -t utf-8")


def _read_stdlib(files: list[Path], text_key: str, start: int) -> Iterator[str]:
    for file in files[start:]:
        try:
            text = _read_bytes(file).decode("utf-8")
        except UnicodeDecodeError:
            # Some tests of Python itself are in other encodings on purpose.
            text = ""
        yield "" if "\0" in text else text


def _read_text(files: list[Path], text_key: str, start: int) -> Iterator[str]:
    for file in files[start:]:
        text = _decode(_read_bytes(file), str(file))
        at = text.find("\0")
        rule = f"holds a NUL character at offset {at}, so it is no text"
        check(at < 0, "file", str(file), rule, "Leave binary files out of the pattern")
        yield text


def _read_jsonl(files: list[Path], text_key: str, start: int) -> Iterator[str]:
    lines = ((file, number, line) for file in files for number, line in _lines(file))
    for file, number, line in islice(lines, start, None):
        where = f"{file}:{number}"
        if not line.strip():
            yield ""
            continue
        try:
            record = json.loads(_decode(line, where))
        except json.JSONDecodeError as error:
            rule = f"is not one JSON value ({error.msg} at column {error.colno})"
            fail("line", where, rule, "Write one object a line")
        rule = f"must be an object, not {type(record).__name__}"
        fix = 'Write lines such as {"text": "..."}'
        check(isinstance(record, dict), "line", where, rule, fix)
        require_field(text_key, list(record), where)
        yield as_text(record[text_key], text_key, where)


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    opener = gzip.open if file.suffix == ".gz" else open
    try:
        with opener(file, "rb") as stream:
            yield from enumerate(stream, 1)
    # The last two are what a damaged or truncated .gz raises.
    except (OSError, EOFError, zlib.error) as error:
        rule = f"cannot be read ({error})"
        fail("file", str(file), rule, "Check its permissions and that it is complete")


def _read_parquet(files: list[Path], text_key: str, start: int) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet

    for file in files:
        try:
            table = parquet.ParquetFile(file)
        except (OSError, pyarrow.ArrowInvalid) as error:
            fail("file", str(file), f"is no parquet file ({error})", "Check that it is complete")
        with table:
            require_field(text_key, table.schema_arrow.names, str(file))
            for group in range(table.num_row_groups):
                rows = table.metadata.row_group(group).num_rows
                skipped, start = min(start, rows), start - min(start, rows)
                if skipped < rows:
                    column = table.read_row_group(group, columns=[text_key]).column(0)
                    for row in range(skipped, rows):
                        where = f"{file}, row {row} of group {group}"
                        yield as_text(column[row].as_py(), text_key, where)


def require_field(text_key: str, names: list[str], where: str) -> None:
    """Raises `ValueError` unless the record or table at `where`, with fields `names`, has it."""
    rule = f"{where} has no such field, only {sorted(names)}"
    check(text_key in names, "data.text_key", text_key, rule, "Name the field that holds the text")


def as_text(value: Any, text_key: str, where: str) -> str:
    """What field `text_key` of the record at `where` holds, as text; null is empty.

    Raises `ValueError` if it is no text or not UTF-8.
    """
    if value is None:
        return ""
    if isinstance(value, bytes):
        return _decode(value, where)
    rule = f"holds {type(value).__name__} in {where}, not text"
    check(isinstance(value, str), "data.text_key", text_key, rule, "Name a field of text")
    if value.isascii():
        return value
    # JSON can spell half of a surrogate pair, which no encoding of text can hold.
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
