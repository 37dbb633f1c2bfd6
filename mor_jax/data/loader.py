"""Batches: from configured sources to this host's sequences of every global batch.

The state of the pipeline is a `DataPosition`: the index of the next sequence, and the position in
each source. The sequences that follow are a pure function of it, of the configuration and of the
seed, independent of the batch size and the number of hosts.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mor_jax.config import DataConfig
from mor_jax.config.parsing import check
from mor_jax.data.position import DataPosition, RowOrder, SkippedRange, advance, first_position
from mor_jax.data.shards.reader import open_shards
from mor_jax.data.sources.documents import Documents, open_documents
from mor_jax.data.streams.mixture import apportion
from mor_jax.data.streams.packing import PackedSequences, Row, evenly_spaced
from mor_jax.data.streams.token_streams import TokenStream, tokenize
from mor_jax.data.tokenizers.base import Tokenizer
from mor_jax.types import IGNORE, Batch

# grain takes half a second to import; evaluation and data preparation do not need it.
if TYPE_CHECKING:
    import grain


_MAX_SEQUENCES = 2**40
"""More validation sequences than any corpus has, and exact in float64."""


@functools.lru_cache(maxsize=8)
def _tokenized(key: "_Key") -> dict[str, TokenStream]:
    return dict(tokenize(key.documents, key.tokenizer, key.share))


@dataclasses.dataclass(frozen=True)
class _Key:
    """Cache key of a tokenised source in memory."""

    documents: Documents = dataclasses.field(compare=False)
    spec: str
    identity: str
    text_key: str
    tokenizer: Tokenizer
    share: float | None


def open_streams(cfg: DataConfig, tokenizer: Tokenizer, split: str) -> list[TokenStream]:
    """Token stream of split `train`, `heldout` or `all` of each source. Raises `ValueError`."""
    streams = []
    share = None if split == "all" else cfg.validation_fraction
    for i, spec in enumerate(cfg.sources):
        setting = f"data.sources[{i}]"
        if spec.startswith("shards:"):
            rule = "is already split into training and validation data"
            check(split != "all", setting, spec, rule, "Name the text that it was prepared from")
            streams.append(open_shards(spec, tokenizer, setting)[split])
            continue
        documents = open_documents(spec, cfg.text_key, setting)
        key = _Key(documents, spec, documents.identity, cfg.text_key, tokenizer, share)
        streams.append(_tokenized(key)[split])
    return streams


def _open_rows(
    cfg: DataConfig, tokenizer: Tokenizer, split: str, length: int
) -> list[PackedSequences]:
    streams = open_streams(cfg, tokenizer, split)
    return [PackedSequences(stream, length, cfg.document_mask) for stream in streams]


def open_corpus(
    cfg: DataConfig, tokenizer: Tokenizer, split: str, length: int
) -> "grain.MapDataset":
    """All sequences of a split, source after source, unshuffled: a grain `MapDataset` of `Row`."""
    import grain

    parts = [grain.MapDataset.source(rows) for rows in _open_rows(cfg, tokenizer, split, length)]
    return grain.MapDataset.concatenate(parts)


def fingerprint(cfg: DataConfig, tokenizer: Tokenizer) -> str:
    """Hash of everything that determines the batches: texts, tokenizer, split, mixture, order.

    Independent of paths and of the number of hosts, threads or processes.
    """
    splits = ("train", "heldout")
    texts = [[s.fingerprint for s in open_streams(cfg, tokenizer, split)] for split in splits]
    order = (_weights(cfg), cfg.document_mask, cfg.shuffle, cfg.seed)
    return hashlib.sha256(repr((texts, tokenizer.fingerprint, order)).encode()).hexdigest()[:32]


def position_of(cfg: DataConfig, tokenizer: Tokenizer, *, length: int, seed: int) -> DataPosition:
    """The start position of a run with this data. Raises `ValueError`, see docs/data.md."""
    pairs = [open_streams(cfg, tokenizer, split) for split in ("train", "heldout")]
    texts = [
        hashlib.sha256(repr([train.fingerprint, heldout.fingerprint]).encode()).hexdigest()[:32]
        for train, heldout in zip(*pairs, strict=True)
    ]
    return first_position(cfg, texts, tokenizer.fingerprint, length=length, seed=seed)


def _weights(cfg: DataConfig) -> tuple[float, ...]:
    return cfg.weights or (1.0,) * len(cfg.sources)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Global batches of `batch_size` sequences of `length` tokens, read by `hosts` hosts.

    Host h reads sequences h * host_rows .. (h + 1) * host_rows - 1 of each batch. Raises
    `ValueError` if the hosts cannot share them evenly.
    """

    length: int
    batch_size: int
    host: int = 0
    hosts: int = 1

    def __post_init__(self) -> None:
        rule = f"must be a positive multiple of the number of hosts, {self.hosts}"
        fix = f"Try {max(-(-self.batch_size // self.hosts), 1) * self.hosts}"
        ok = self.batch_size > 0 and self.batch_size % self.hosts == 0
        check(ok, "batch_size", self.batch_size, rule, fix)
        ok = 0 <= self.host < self.hosts
        check(ok, "host", self.host, f"must be in 0 .. {self.hosts - 1}", "Count hosts from 0")

    @property
    def host_rows(self) -> int:
        """Sequences of each global batch that one host reads."""
        return self.batch_size // self.hosts


def _to_batch(row: Mapping[str, Any]) -> Batch:
    # Copied, because arrays from worker processes are in shared memory that grain reuses.
    return Batch(**{name: np.array(array) for name, array in row.items()})


class TrainBatches:
    """An infinite iterator over this host's part of the global batches.

    `position` is the index of the run's next sequence; starting there gives the same sequences.
    """

    def __init__(
        self, batches: "grain.IterDataset", start: int, rows: int, jumps: Sequence[SkippedRange]
    ) -> None:
        """start: the first sequence. rows: batch size. jumps: ranges of skipped sequences."""
        self._iterator = iter(batches)
        self._rows, self._jumps = rows, jumps
        self.position = advance(start, 0, jumps)

    def __iter__(self) -> "TrainBatches":
        return self

    def __next__(self) -> Batch:
        row = next(self._iterator)
        self.position = advance(self.position, self._rows, self._jumps)
        return _to_batch(row)

    def close(self) -> None:
        """Stops the background threads and processes."""
        self._iterator.close()


def train_batches(
    cfg: DataConfig,
    tokenizer: Tokenizer,
    layout: Layout,
    *,
    seed: int,
    start: int | DataPosition = 0,
    jumps: Sequence[SkippedRange] = (),
) -> TrainBatches:
    """Training batches from sequence `start` on, NumPy int32 [layout.host_rows, length].

    Each source is reshuffled in every epoch, by `seed` and `cfg.seed`, and repeated; sources are
    mixed by weight. A thread, or `cfg.num_workers` processes, prefetch `cfg.prefetch` batches.
    start: a sequence index, for runs that never changed their sources, or a `DataPosition`. jumps:
    ranges of skipped sequences. Raises `ValueError`, see docs/data.md.
    """
    import grain

    if isinstance(start, int):
        check(start >= 0, "start", start, "must not be negative", "Count sequences from 0")
        # The hashes of the texts are only needed to compare two positions.
        blank = [""] * len(cfg.sources)
        position = first_position(cfg, blank, "", length=layout.length, seed=seed)
        position = dataclasses.replace(position, row=start)
    else:
        position = start
    parts = []
    for i, rows in enumerate(_open_rows(cfg, tokenizer, "train", layout.length)):
        part = grain.MapDataset.source(rows)
        if cfg.shuffle:
            order = position.readings[i].order
            source_seed = np.random.SeedSequence((cfg.seed, seed, order)).generate_state(1)[0]
            part = part.shuffle(seed=int(source_seed))
        parts.append(part.repeat())
    mixed = grain.MapDataset.select_from_datasets(parts, RowOrder(position, jumps))
    batches = mixed.batch(layout.host_rows)[layout.host :: layout.hosts]
    threads = min(cfg.prefetch, 1)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=cfg.prefetch)
    iterable = batches.to_iter_dataset(options)
    iterable = _in_workers(iterable, cfg) if cfg.num_workers else iterable
    return TrainBatches(iterable, position.row, layout.batch_size, jumps)


def _in_workers(batches: "grain.IterDataset", cfg: DataConfig) -> "grain.IterDataset":
    import grain
    from absl import flags

    # grain reads its absl flags before it starts processes; without absl's main they are unparsed,
    # so mark them as parsed to get their defaults.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    buffered = max(cfg.prefetch, 1)
    options = grain.MultiprocessingOptions(
        num_workers=cfg.num_workers, per_worker_buffer_size=buffered
    )
    return batches.mp_prefetch(options)


def validation_batches(
    cfg: DataConfig,
    tokenizer: Tokenizer,
    layout: Layout,
    batches: int,
    split: str = "heldout",
    multiple: int | None = None,
) -> list[Batch]:
    """The same `batches` validation batches at every call, NumPy int32 [layout.host_rows, length].

    split: `all` takes every document, for sources that are not trained on. Sequences are divided
    between sources by weight and spaced evenly over each. A small split gives fewer batches; the
    last one is filled with repeated sequences without targets. multiple: if the split is smaller
    than one batch, the batch size is the number of sequences, rounded up to a multiple of this
    (itself a multiple of the hosts). Raises `ValueError` if a source's split does not fill one
    sequence.
    """
    chosen = [
        (rows, i) for _, rows, i in _validation_sequences(cfg, tokenizer, layout, batches, split)
    ]
    size = layout.batch_size
    if multiple is not None:
        size = min(size, -(-len(chosen) // multiple) * multiple)
    host_rows = size // layout.hosts
    stop = min(len(chosen) + -len(chosen) % size, batches * size)
    result = []
    for first in range(layout.host * host_rows, stop, size):
        part = [_sequence_or_padding(chosen, i) for i in range(first, first + host_rows)]
        result.append(_to_batch({name: np.stack([row[name] for row in part]) for name in part[0]}))
    return result


def validation_sources(
    cfg: DataConfig, tokenizer: Tokenizer, layout: Layout, batches: int, split: str = "heldout"
) -> np.ndarray:
    """The source index of each sequence of `validation_batches`, in order, int64.

    Excludes the repeated sequences at the end.
    """
    chosen = [
        source for source, *_ in _validation_sequences(cfg, tokenizer, layout, batches, split)
    ]
    return np.array(chosen[: batches * layout.batch_size])


def _validation_sequences(
    cfg: DataConfig, tokenizer: Tokenizer, layout: Layout, batches: int, split: str
) -> list[tuple[int, PackedSequences, int]]:
    """Every chosen sequence: index of its source, the source's sequences, its index among them."""
    check(batches > 0, "batches", batches, "must be greater than 0", "Try 1")
    sources = _open_rows(cfg, tokenizer, split, layout.length)
    most = min(batches * layout.batch_size, _MAX_SEQUENCES)
    counts = apportion(_weights(cfg), max(most, len(sources)))
    return [
        (number, rows, int(i))
        for number, (rows, count) in enumerate(zip(sources, counts, strict=True))
        for i in evenly_spaced(len(rows), int(count))
    ]


def _sequence_or_padding(chosen: list[tuple[PackedSequences, int]], i: int) -> Row:
    # Past the end: a repeated sequence without targets.
    rows, number = chosen[i if i < len(chosen) else (i - len(chosen)) % len(chosen)]
    row = rows[number]
    return row if i < len(chosen) else row | {"targets": np.full_like(row["targets"], IGNORE)}
