"""Sources of documents: the standard library, text, JSONL and parquet files, datasets.

A source is a fixed sequence of documents that can be read from any index. An entry without text (an
empty line, a file of the standard library in another encoding) is an empty document; empty ones are
dropped later, so numbering never depends on content.
"""

import dataclasses
import difflib
import functools
import hashlib
import os
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

from mor_jax.config.optional_import import require_package
from mor_jax.config.parsing import check
from mor_jax.data.sources import file_readers
from mor_jax.data.sources.directories import kind_of
from mor_jax.data.sources.files import File, local_file, matching
from mor_jax.data.sources.records import Field
from mor_jax.data.sources.skipped_records import SkippedRecords

STDLIB_SUFFIXES = frozenset({".py", ".txt", ".rst", ".md", ".html"})
STDLIB_SKIPPED = frozenset({"site-packages", "dist-packages", "__pycache__"})
KINDS = (
    "stdlib",
    "text:GLOB",
    "jsonl:GLOB",
    "parquet:GLOB",
    "tfds:NAME[:SPLIT]",
    "hf:NAME[:SPLIT]",
    "shards:DIR",
)
_TABLES = ("csv", "tsv", "xls", "xlsx", "arrow", "feather", "orc", "avro", "sqlite", "h5", "hdf5")
_OTHER_NAMES = {"json": "jsonl", "ndjson": "jsonl", "txt": "text", "huggingface": "hf"}

Reader = Callable[[int, SkippedRecords], Iterator[str]]
"""Yields the texts from a document index on and counts what it skips or replaces."""


@dataclasses.dataclass(frozen=True)
class Documents:
    """The documents of one source.

    setting: its name in errors, such as `data.sources[0]`.
    spec: as configured.
    identity: hash of the names and sizes behind it, without the folder they are in.
    size: bytes of its files, 0 if unknown.
    """

    setting: str
    spec: str
    identity: str
    size: int
    reader: Reader
    _logged: set[str] = dataclasses.field(default_factory=set, compare=False)

    def read(self, start: int) -> Iterator[str]:
        """The texts from document `start` onwards.

        At the end, skipped and replaced content is logged once. Raises `ValueError` on content that
        cannot be read as text.
        """
        skipped_records = SkippedRecords()
        yield from self.reader(start, skipped_records)
        spec = f"{self.spec} from document {start} on" if start else self.spec
        skipped_records.log_warnings(self.setting, spec, self._logged)


def open_documents(spec: str, text_key: str = "text", setting: str = "data.sources") -> Documents:
    """The documents of a text source; `shards:` is opened by `data.shards`.

    `text_key` names the field of a JSONL line, the column of a parquet file or of a dataset, or
    the feature of a TFDS example. Raises `ValueError` if the source does not exist or has no
    document.
    """
    kind, _, rest = spec.partition(":")
    # From a command line, both are flags.
    field = Field(text_key, "--text-key" if setting.startswith("--") else "data.text_key")
    if kind == "tfds":
        # Deferred: tensorflow_datasets takes most of a second to import.
        from mor_jax.data.sources import tfds

        return Documents(setting, spec, *tfds.open_examples(rest, field, setting, spec))
    if kind == "hf":
        # Deferred: datasets takes two seconds.
        from mor_jax.data.sources import hf

        return Documents(setting, spec, *hf.open_rows(rest, field, setting, spec))
    if kind == "stdlib":
        check(not rest, setting, spec, "takes no argument", "Write it as 'stdlib'")
        root = Path(sysconfig.get_path("stdlib"))
        files, reader = _stdlib_files(root), file_readers.read_stdlib
        rule = f"this Python installation has no source files in {root}"
        check(bool(files), setting, spec, rule, "Use text:GLOB with files of your own")
    else:
        readers = {
            "text": file_readers.read_text,
            "jsonl": file_readers.read_jsonl,
            "parquet": file_readers.read_parquet,
        }
        rule = f"unknown source; the kinds are {', '.join(KINDS)}"
        check(kind in readers, setting, spec, rule, _meant(spec))
        check(bool(rest), setting, spec, "names no file", f"Write it as '{kind}:GLOB'")
        if kind == "parquet":
            require_package("pyarrow", setting, spec)
        files, reader = matching(rest, setting, spec), readers[kind]
    names = [(file.relative, file.size) for file in files]
    identity = hashlib.sha256(repr((kind, names)).encode()).hexdigest()[:32]
    size = sum(size for _, size in names)
    return Documents(setting, spec, identity, size, functools.partial(reader, files, field))


def _meant(spec: str) -> str:
    """The fix for a source of unknown kind."""
    if not spec:
        return "Try 'stdlib'"
    kind, colon, rest = spec.partition(":")
    if rest.startswith("//"):
        if kind == "gs":
            return f"Name the kind of its files: try {_with_kind(spec)!r}"
        return "Copy the files to this machine or to gs://, then write them as 'jsonl:GLOB'"
    if kind in _TABLES or os.path.splitext(spec)[1][1:].lower() in _TABLES:
        return "Tables are read as parquet: convert it, for example with pandas' to_parquet"
    kind = kind.lower()
    matches = difflib.get_close_matches(kind, [known.partition(":")[0] for known in KINDS], n=1)
    meant = _OTHER_NAMES.get(kind) or (matches[0] if matches else None)
    if colon:
        return f"Did you mean '{meant}:{rest}'?" if meant else "Write the texts as JSONL"
    if meant and kind.isalnum():
        return f"Did you mean {meant!r}?"
    return f"Did you mean {_with_kind(spec)!r}?"


def _with_kind(path: str) -> str:
    return f"{kind_of(path) or 'text'}:{path}"


@functools.cache
def _stdlib_files(root: Path) -> list[File]:
    paths = []
    for folder, inside, names in os.walk(root):
        inside[:] = set(inside) - STDLIB_SKIPPED
        texts = (name for name in names if os.path.splitext(name)[1] in STDLIB_SUFFIXES)
        candidates = (os.path.join(folder, name) for name in texts)
        paths += [path for path in candidates if os.path.isfile(path)]
    return [local_file(Path(path), root) for path in sorted(paths)]
