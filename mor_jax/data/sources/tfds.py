"""Documents from TensorFlow Datasets, read without TensorFlow.

ArrayRecord files are read by index; TFRecord files have no index and are read sequentially.
"""

import functools
import hashlib
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mor_jax.config.optional_import import require_package
from mor_jax.config.parsing import check, fail
from mor_jax.data.sources.records import Field
from mor_jax.data.sources.skipped_records import SkippedRecords

# name, version (it starts with a digit) and split (it does not)
_FORM = re.compile(r"(?P<name>[^:]+(:\d[\d.*]*)?)(:(?P<split>[A-Za-z_].*))?")
_CRC32C = 0x82F63B78


def open_examples(
    rest: str, field: Field, setting: str, spec: str
) -> tuple[str, int, Callable[[int, SkippedRecords], Iterator[str]]]:
    """Identity, bytes and reader of `NAME[:SPLIT]` or `DIR[:SPLIT]`; the split defaults to `train`.

    A dataset that is not on this machine is downloaded and prepared by TFDS. Raises `ValueError`
    on an unknown dataset, split, feature or file format.
    """
    form = _FORM.fullmatch(rest)
    fix = "Write tfds:NAME, tfds:NAME:SPLIT or tfds:DIR:SPLIT"
    if form is None:
        fail(setting, spec, "is not the name of a dataset", fix)
    builder = _builder(form["name"], form["split"], setting, spec)
    split = form["split"] or "train"
    try:
        files = builder.info.splits[split].file_instructions
        # The size of a slice of a split is unknown.
        size = getattr(builder.info.splits[split], "num_bytes", 0) or 0
    except (ValueError, KeyError) as error:
        known = sorted(builder.info.splits)
        fail(setting, spec, f"has no split {split!r} ({error})", f"Choose one of {known}")
    field.require(list(builder.info.features), spec)
    identity = repr((builder.info.full_name, split, [(f.skip, f.take) for f in files]))
    records = _records(builder.info.file_format.value, files, setting, spec)
    read = functools.partial(_read, records, builder.info.features, field, spec)
    return hashlib.sha256(identity.encode()).hexdigest()[:32], size, read


def _builder(name: str, split: str | None, setting: str, spec: str) -> Any:
    tfds = require_package("tensorflow_datasets", setting, spec)
    folder = Path(name).expanduser()
    if folder.is_dir():
        rule = f"{folder} is not a prepared dataset: it has no dataset_info.json"
        fix = "Give the directory of one version, such as DIR/NAME/1.0.0"
        check((folder / "dataset_info.json").exists(), setting, spec, rule, fix)
        return tfds.builder_from_directory(folder)
    try:
        builder = tfds.builder(name)
    except tfds.core.DatasetNotFoundError:
        rule = "is neither a dataset that TFDS knows nor a directory"
        fail(setting, spec, rule, "See tfds.list_builders() for the names")
    # Unknown configuration or version.
    except (AssertionError, ValueError) as error:
        why = str(error).strip().splitlines()[0]
        fail(setting, spec, f"cannot be opened ({why})", "Write tfds:NAME/CONFIG:VERSION:SPLIT")
    if not builder.is_prepared():
        unsure = ""
        if split is not None:
            known = declared_splits(builder)
            names = [part.partition("[")[0] for part in split.split("+")]
            ok = known is None or all(part in (*known, "all") for part in names)
            check(ok, setting, spec, f"has no split {split!r}", f"Choose one of {known}")
            if known is None:
                unsure = f"it may have no split {split!r}, which is known once it is prepared; "
        _download(builder, unsure, setting, spec)
    return builder


class _NoDownloads:
    """Replaces TFDS's download manager: every download is a path that does not exist."""

    manual_dir = Path("/nonexistent")

    def download(self, urls: Any) -> Any:
        if isinstance(urls, dict):
            return {name: self.download(url) for name, url in urls.items()}
        if isinstance(urls, (list, tuple)):
            return [self.download(url) for url in urls]
        return self.manual_dir

    download_and_extract = extract = download

    def iter_archive(self, archive: Any) -> Iterator[Any]:
        return iter(())


def declared_splits(builder: Any) -> list[str] | None:
    """Splits of a dataset that is not prepared; None if its builder cannot tell without files."""
    if known := sorted(builder.info.splits):
        return known
    try:
        generators = builder._split_generators(_NoDownloads())
    # The builder needs the files: the splits are known only once the dataset is prepared.
    except (ImportError, OSError, LookupError, TypeError, ValueError, AttributeError):
        return None
    return sorted(str(getattr(part, "name", part)) for part in generators)


def _download(builder: Any, unsure: str, setting: str, spec: str) -> None:
    try:
        builder.download_and_prepare(file_format="array_record")
    except ImportError as error:
        rule = f"{unsure}preparing it needs a package that is missing ({error})"
        missing = (error.name or "tensorflow").partition(".")[0].replace("_", "-")
        needed = " ".join(sorted({missing, "tensorflow"}))
        fail(setting, spec, rule, f"Run pip install {needed}, needed only to prepare the dataset")
    except OSError as error:
        rule = f"{unsure}it cannot be downloaded to {builder.data_dir} ({error})"
        fail(setting, spec, rule, "Prepare it where there is network access and give its directory")


def _records(kind: str, files: Any, setting: str, spec: str) -> Callable[[int], Iterator[bytes]]:
    if kind == "array_record":
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        source = ArrayRecordDataSource(files)
        return lambda start: (source[i] for i in range(start, len(source)))
    rule = f"its files are {kind}; only array_record and tfrecord can be read"
    fix = "Prepare it with file_format='array_record'"
    check(kind == "tfrecord", setting, spec, rule, fix)
    return functools.partial(_tfrecord_records, files)


def _tfrecord_records(files: Any, start: int) -> Iterator[bytes]:
    for file in files:
        skipped = min(start, file.take)
        start -= skipped
        if skipped < file.take:
            first, last = file.skip + skipped, file.skip + file.take
            for index, record in enumerate(read_tfrecord(Path(file.filename), last)):
                if index >= first:
                    yield record


def read_tfrecord(path: Path, count: int) -> Iterator[bytes]:
    """The first `count` records of a TFRecord file.

    Each is a length (uint64), the masked CRC-32C of the length, the bytes, and their CRC. The
    length's checksum is verified; the content's is left to the parser. Raises `ValueError` on a
    damaged or truncated file.
    """
    with path.open("rb") as stream:
        for index in range(count):
            head = stream.read(12)
            size = int.from_bytes(head[:8], "little")
            whole = len(head) == 12 and struct.unpack("<I", head[8:])[0] == _masked_crc(head[:8])
            record = stream.read(size) if whole else b""
            ok = whole and len(record) == size and len(stream.read(4)) == 4
            rule = f"record {index} of {count} is damaged or cut short"
            check(ok, "file", str(path), rule, "Copy or prepare the dataset again")
            yield record


def _masked_crc(raw: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in raw:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (_CRC32C if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def _read(
    records: Callable[[int], Iterator[bytes]],
    features: Any,
    field: Field,
    spec: str,
    start: int,
    skipped_records: SkippedRecords,
) -> Iterator[str]:
    for index, record in enumerate(records(start), start):
        example = features.deserialize_example_np(record)
        yield field.text(example[field.name], f"{spec}, example {index}", skipped_records)
