"""Writes the missing shards of a preparation and reuses the existing ones.

Each complete shard has a part file with its start position, the start of the next shard and the
hash of its files. A part is reused if it starts where the previous one ended and its files are
intact, so a damaged shard is rewritten without touching the following ones.
"""

import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mor_jax.data.shards.prepare_config import PrepareConfig, Progress, Report
from mor_jax.data.shards.reader import MANIFEST, SPLITS
from mor_jax.data.shards.writer import PARTIAL, ShardWriter, pair_hash, write_file
from mor_jax.data.sources.documents import Documents
from mor_jax.data.streams.token_streams import encoded
from mor_jax.data.streams.validation_split import is_validation, text_hash
from mor_jax.data.tokenizers.base import Tokenizer

PARTS = "parts"
REPORT_SECONDS = 1.0

Place = tuple[int, int]
"""Index of a source, and of a document in it."""


def to_json(value: Any) -> bytes:
    """The file format of settings, parts and the manifest."""
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def clear_partial(output: Path) -> None:
    """Removes partial files of an interrupted preparation."""
    for leftover in output.rglob(f"*{PARTIAL}"):
        leftover.unlink()


class ShardJob:
    """Reads the sources once and writes the missing shards."""

    def __init__(
        self, cfg: PrepareConfig, sources: list[Documents], tokenizer: Tokenizer, report: Report
    ) -> None:
        self._cfg = cfg
        self._sources = sources
        self._tokenizer = tokenizer
        self._report = report
        self._progress = Progress()
        self._reported = time.monotonic()

    def run(self) -> list[dict[str, Any]]:
        """The parts of all shards, in order."""
        parts: list[dict[str, Any]] = []
        place: Place = (0, 0)
        stream = None
        while not parts or not parts[-1]["last"]:
            path = self._cfg.output / PARTS / f"{len(parts):05d}.json"
            part = self._reusable_part(path, place)
            if part is None:
                (self._cfg.output / MANIFEST).unlink(missing_ok=True)
                path.unlink(missing_ok=True)
                # Consecutive shards share one pass over the documents.
                stream = stream or _Peekable(encoded(self._texts(place), self._tokenizer))
                part = self._write(len(parts), place, stream)
                write_file(path, to_json(part))
            else:
                stream = None
                self._progress.kept += 1
            parts.append(part)
            place = tuple(part["next"])
            self._count(part)
        self._report(self._progress)
        return parts

    def _reusable_part(self, path: Path, place: Place) -> dict[str, Any] | None:
        """The part of an earlier preparation if it starts at `place` and its files are intact."""
        if not path.exists():
            return None
        try:
            part = json.loads(path.read_text())
            intact = all(part[split] is None or self._is_intact(part[split]) for split in SPLITS)
            follows = tuple(part["start"]) == place and len(part["next"]) == len(place)
            return part if intact and follows and part["last"] in (True, False) else None
        # Damaged part file: rewrite its shard.
        except (ValueError, KeyError, TypeError):
            return None

    def _is_intact(self, shard: dict[str, Any]) -> bool:
        """Whether the files of a shard match their hash."""
        files = [self._cfg.output / shard[name] for name in ("file", "documents_file")]
        return all(file.is_file() for file in files) and pair_hash(*files) == shard["sha256"]

    def _texts(self, place: Place) -> Iterator[tuple[Place, str]]:
        """Yields, from `place` on, the position after each document, and its text."""
        first, start = place
        for number in range(first, len(self._sources)):
            for document, text in enumerate(self._sources[number].read(start), start):
                yield (number, document + 1), text
            start = 0

    def _write(self, number: int, place: Place, documents: "_Peekable") -> dict[str, Any]:
        """Writes shard `number` of both splits from the next documents."""
        output, tokenizer = self._cfg.output, self._tokenizer
        writers: dict[str, ShardWriter] = {}
        part: dict[str, Any] = {"start": list(place), "next": list(place), "lowest": 1.0}
        done = Progress(**vars(self._progress))
        for after, text, tokens in documents:
            hashed = text_hash(text)
            part["lowest"] = min(part["lowest"], hashed / 2**64)
            split = "heldout" if is_validation(hashed, self._cfg.validation_fraction) else "train"
            if split not in writers:
                stem = f"{split}-{number:05d}"
                writers[split] = ShardWriter(output, stem, tokenizer.dtype, tokenizer.eos_id)
            writers[split].add(tokens)
            part["next"] = list(after)
            done.documents += 1
            done.tokens += len(tokens) + 1
            if time.monotonic() > self._reported + REPORT_SECONDS:
                self._reported = time.monotonic()
                self._report(done)
            if "train" in writers and writers["train"].tokens >= self._cfg.shard_tokens:
                break
        for split in SPLITS:
            shard = writers[split].finish() if split in writers else None
            part[split] = dataclasses.asdict(shard) if shard else None
        return part | {"last": documents.finished}

    def _count(self, part: dict[str, Any]) -> None:
        self._progress.shards += 1
        for split in SPLITS:
            if part[split] is not None:
                self._progress.documents += part[split]["documents"]
                self._progress.tokens += part[split]["tokens"]


class _Peekable:
    """An iterator that can tell whether it is exhausted."""

    def __init__(self, items: Iterator[Any]) -> None:
        self._items = items
        self._next = next(items, None)

    def __iter__(self) -> "_Peekable":
        return self

    def __next__(self) -> Any:
        if self._next is None:
            raise StopIteration
        item, self._next = self._next, next(self._items, None)
        return item

    @property
    def finished(self) -> bool:
        """Whether no item is left."""
        return self._next is None
