"""Readers of files: a document is a text file, a line of JSONL or a row of parquet.

A reader takes the files, the field of the text, the index of the first document, and the counts of
what it skips or replaces.
"""

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from mor_jax.config.parsing import check, fail
from mor_jax.data.sources import compressed, object_store
from mor_jax.data.sources.files import File, lines
from mor_jax.data.sources.records import MARK, Field, check_head, decode, file_text
from mor_jax.data.sources.skipped_records import SkippedRecords


def read_stdlib(
    files: Sequence[File], field: Field, start: int, skipped_records: SkippedRecords
) -> Iterator[str]:
    """Files of the standard library; those not in UTF-8 or with NUL are empty documents."""
    for file in files[start:]:
        try:
            with file.stream() as stream:
                text = stream.read().decode("utf-8")
        except OSError as error:
            fail("file", file.name, f"cannot be read ({error.strerror})", "Check its permissions")
        except UnicodeDecodeError:
            # Some of Python's own tests use other encodings on purpose.
            text = ""
        yield "" if "\0" in text else text


def read_text(
    files: Sequence[File], field: Field, start: int, skipped_records: SkippedRecords
) -> Iterator[str]:
    """Whole files."""
    for file in files[start:]:
        raw = b"".join(line for _, line in lines(file))
        yield file_text(raw, file.name, skipped_records)


def read_jsonl(
    files: Sequence[File], field: Field, start: int, skipped_records: SkippedRecords
) -> Iterator[str]:
    """One JSON object per line, a document each; an empty line is an empty document."""
    numbered = ((file, number, line) for file in files for number, line in lines(file))
    for file, number, line in islice(numbered, start, None):
        where = f"{file.name}:{number}"
        if number == 1:
            check_head(line[:512], where)
        # Concatenated files may have a byte order mark at any line.
        line = line.removeprefix(MARK)
        if not line.strip():
            yield ""
            continue
        record = _record(line, where)
        field.require(list(record), where)
        yield field.text(record[field.name], where, skipped_records)


def _record(line: bytes, where: str) -> dict[str, Any]:
    text = decode(line, where)
    fix = "Write one object per line, or exclude files that are not JSONL from the pattern"
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        # The error of a truncated value lies after the last character of its line.
        column = min(error.pos, len(text.rstrip())) + 1
        rule = f"is not one JSON value ({error.msg} at column {column})"
        # The value continues after the line, is a list, or shares its line with others.
        if error.pos >= len(text.rstrip()) or text.startswith("["):
            fix = "Write one object per line: jq -c . FILE, or jq -c '.[]' FILE for a list"
        elif "\r" in text.strip():
            fix = "End lines with a line feed, for example with tr '\\r' '\\n'"
        if not line.endswith(b"\n") and not error.msg.startswith("Extra"):
            rule += "; it is the last line, so the file may be cut short"
        fail("line", where, rule, fix)
    except RecursionError:
        fail("line", where, "nests brackets too deeply to be read", "Remove the line")
    except ValueError as error:
        # Python refuses integers of thousands of digits.
        rule = f"contains a number that cannot be read ({str(error).partition(';')[0]})"
        fail("line", where, rule, "Write such numbers as strings, or remove the field")
    rule = f"must be an object, not {type(record).__name__}"
    check(isinstance(record, dict), "line", where, rule, 'Write lines such as {"text": "..."}')
    return record


def read_parquet(
    files: Sequence[File], field: Field, start: int, skipped_records: SkippedRecords
) -> Iterator[str]:
    """One document per row, group after group; groups before `start` are not read."""
    import pyarrow
    from pyarrow import parquet

    for file in files:
        at = file.name
        try:
            with file.random() as opened, parquet.ParquetFile(opened) as table:
                field.require(table.schema_arrow.names, file.name)
                for group in range(table.num_row_groups):
                    at = f"{file.name}, group {group}"
                    rows = table.metadata.row_group(group).num_rows
                    skipped, start = min(start, rows), start - min(start, rows)
                    if skipped < rows:
                        column = table.read_row_group(group, columns=[field.name]).column(0)
                        for row in range(skipped, rows):
                            where = f"{file.name}, row {row} of group {group}"
                            yield field.text(column[row].as_py(), where, skipped_records)
        except (OSError, pyarrow.ArrowInvalid) as error:
            _refuse_parquet(file, at, error)


def _refuse_parquet(file: File, where: str, error: Exception) -> None:
    why = " ".join(str(error).split())
    if where != file.name:
        fail("file", where, f"cannot be read ({why})", "Copy the file again, or rewrite it")
    if isinstance(error, OSError) and error.errno is not None:
        why = object_store.reason(error)
        fail("file", where, f"cannot be read ({why})", "Check its permissions")
    with file.random() as opened:
        form = compressed.compression_of(opened.read(compressed.HEAD))
    if form is not None:
        rule = f"is compressed with {form.name} as a whole, so random access is impossible"
        fail("file", where, rule, "Decompress it: parquet compresses its columns itself")
    fail("file", where, f"is not a parquet file ({why})", "Check that it is complete")
