"""Reads pre-tokenised shards: their manifest and token stream.

A directory of shards holds, for each split and number,

    train-00000.array_record    tokens, `RECORD_TOKENS` per record, the last record shorter
    train-00000.documents.npy   int64, position in this shard after each document's EOS

and also the tokenizer's files and, written last, `manifest.json`. Documents are never split between
shards; a stream is the concatenation of its shards.
"""

import functools
import hashlib
import json
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from mor_jax.config.parsing import check, fail
from mor_jax.data.streams.token_streams import TokenStream
from mor_jax.data.tokenizers.base import Tokenizer

FORMAT = 1
RECORD_TOKENS = 4096
MANIFEST = "manifest.json"
SPLITS = ("train", "heldout")

_REPAIR = "Run mor prepare-data with the same settings: it rewrites damaged shards"


def read_manifest(directory: Path, setting: str, spec: str) -> dict[str, Any]:
    """The manifest of a directory of shards. Raises `ValueError` if it is missing or invalid."""
    rule = "is read by index, so it must be a local or mounted directory"
    fix = "Copy it: gcloud storage cp -r gs://BUCKET/DIR ."
    check("://" not in spec, setting, spec, rule, fix)
    fix = f"Run mor prepare-data --output={directory}"
    path = directory / MANIFEST
    check(directory.is_dir(), setting, spec, f"{directory} is not a directory", fix)
    rule = f"{directory} has no {MANIFEST}: it was never prepared, or the preparation was stopped"
    check(path.is_file(), setting, spec, rule, f"{fix} (it resumes where it stopped)")
    try:
        manifest = json.loads(path.read_text())
    except ValueError as error:
        rule = f"{path} is not JSON ({error})"
        fail(setting, spec, rule, "Copy or prepare the directory again")
    version = manifest.get("format") if isinstance(manifest, dict) else None
    rule = f"{path} has format {version!r}; this version reads {FORMAT}"
    check(version == FORMAT, setting, spec, rule, "Prepare the directory again")
    problem = _format_problem(manifest)
    rule = f"{path} is damaged: {problem}"
    check(problem is None, setting, spec, rule, "Copy or prepare the directory again")
    return manifest


def _format_problem(manifest: dict[str, Any]) -> str | None:
    """What is missing or invalid in a manifest; None if it is valid."""
    try:
        wrote = manifest["tokenizer"]
        texts = [wrote["fingerprint"], wrote["name"], wrote["file"] or ""]
        shards = [shard for split in SPLITS for shard in manifest["splits"][split]["shards"]]
        texts += [shard[key] for shard in shards for key in ("file", "documents_file", "sha256")]
        counts = [shard[key] for shard in shards for key in ("tokens", "bytes", "documents_bytes")]
        dtype = manifest["dtype"]
    except (KeyError, TypeError) as error:
        return f"an entry is missing or has the wrong type ({error})"
    wrong = [repr(value) for value in texts if not isinstance(value, str)]
    wrong += [repr(n) for n in counts if type(n) is not int or n < 0]
    wrong += [repr(dtype)] if dtype not in ("uint16", "uint32") else []
    return f"entries have invalid values ({', '.join(wrong[:3])})" if wrong else None


def check_tokenizer(manifest: dict[str, Any], tokenizer: Tokenizer, spec: str) -> None:
    """Raises `ValueError` unless the shards were written with `tokenizer`."""
    recorded = manifest["tokenizer"]
    rule = f"is not the tokenizer of {spec}: fingerprint {tokenizer.fingerprint}, expected "
    rule += recorded["fingerprint"]
    path = f"{spec.partition(':')[2]}/{recorded['file']}" if recorded["file"] else recorded["name"]
    ok = recorded["fingerprint"] == tokenizer.fingerprint
    check(ok, "data.tokenizer", tokenizer.name, rule, f"Set data.tokenizer={path!r}")


class ShardStream(TokenStream):
    """The stream of one split of a directory of shards.

    Reads records by index and holds only the sizes of the shards in memory; the positions of
    documents are memory-mapped. Can be pickled.
    """

    def __init__(self, directory: Path, manifest: dict[str, Any], split: str, setting: str) -> None:
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        self.name = f"shards:{directory}"
        self.setting = setting
        shards = manifest["splits"][split]["shards"]
        self._documents = [directory / shard["documents_file"] for shard in shards]
        for shard in shards:
            self._check_size(directory / shard["file"], shard["bytes"])
            self._check_size(directory / shard["documents_file"], shard["documents_bytes"])
        counts = [shard["tokens"] for shard in shards]
        records = [-(-count // RECORD_TOKENS) for count in counts]
        # position of each shard's first token, and index of its first record
        self._first_token = np.cumsum([0, *counts], dtype=np.int64)
        self._first_record = np.cumsum([0, *records], dtype=np.int64)
        paths = [directory / shard["file"] for shard in shards]
        # With explicit record ranges, the library does not open every file now.
        ranges = [f"{path}[0:{n}]" for path, n in zip(paths, records, strict=True)]
        self._records = ArrayRecordDataSource(ranges) if ranges else None
        self._dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
        hashes = [shard["sha256"] for shard in shards]
        self.fingerprint = hashlib.sha256(repr((split, hashes)).encode()).hexdigest()[:32]

    def _check_size(self, path: Path, size: int) -> None:
        actual = path.stat().st_size if path.is_file() else None
        rule = f"{path} has {actual} bytes, expected {size}"
        check(actual == size, self.setting, self.name, rule, _REPAIR)

    def __len__(self) -> int:
        return int(self._first_token[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        """See `TokenStream.read`. Reads one or a few records of `RECORD_TOKENS` tokens."""
        parts = [self._read_shard(*part) for part in self._ranges(start, stop)]
        return np.concatenate(parts) if parts else np.empty(0, self._dtype)

    def _ranges(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Splits a range of positions into (shard, start in it, stop in it)."""
        ranges = []
        shard = int(np.searchsorted(self._first_token, start, side="right")) - 1
        while start < stop and shard < len(self._documents):
            base, end = self._first_token[shard : shard + 2].tolist()
            if start < end:
                ranges.append((shard, start - base, min(stop, end) - base))
            start, shard = max(start, end), shard + 1
        return ranges

    def _read_shard(self, shard: int, start: int, stop: int) -> np.ndarray:
        first, last = start // RECORD_TOKENS, (stop - 1) // RECORD_TOKENS
        base = int(self._first_record[shard])
        try:
            raw = b"".join(self._records[base + i] for i in range(first, last + 1))
        # The ArrayRecord library raises these on damage.
        except (RuntimeError, IndexError) as error:
            self._damaged(f"shard {shard}", error)
        skip = first * RECORD_TOKENS
        return np.frombuffer(raw, self._dtype)[start - skip : stop - skip]

    def cuts(self, start: int, stop: int) -> np.ndarray:
        """See `TokenStream.cuts`."""
        starts = [np.empty(0, np.int64)]
        for shard, _, _ in self._ranges(start, stop):
            base = self._first_token[shard]
            ends = self._ends(shard)
            first, last = np.searchsorted(ends, [start + 1 - base, stop - base])
            starts.append(ends[first:last] + base)
        return np.concatenate(starts)

    @functools.cached_property
    def _opened(self) -> dict[int, np.ndarray]:
        return {}

    def _ends(self, shard: int) -> np.ndarray:
        if shard not in self._opened:
            path = self._documents[shard]
            try:
                self._opened[shard] = np.load(path, mmap_mode="r")
            except (OSError, ValueError, EOFError) as error:
                self._damaged(str(path), error)
        return self._opened[shard]

    def _damaged(self, what: str, error: Exception) -> NoReturn:
        reason = " ".join(str(error).split()).partition(". ")[0][:200]
        fail(self.setting, self.name, f"{what} is damaged ({reason})", _REPAIR)

    def __getstate__(self) -> dict[str, Any]:
        # Pickling a memory map would copy the whole file.
        return {k: v for k, v in self.__dict__.items() if k != "_opened"}


def open_shards(
    spec: str, tokenizer: Tokenizer, setting: str = "data.sources"
) -> dict[str, ShardStream]:
    """Streams `train` and `heldout` of `shards:DIR`.

    Raises `ValueError` if the directory is incomplete, damaged or has another tokenizer.
    """
    directory = Path(spec.partition(":")[2]).expanduser()
    manifest = read_manifest(directory, setting, spec)
    check_tokenizer(manifest, tokenizer, spec)
    return {split: ShardStream(directory, manifest, split, setting) for split in SPLITS}
