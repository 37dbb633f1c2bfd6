"""Batches: from configured sources to this host's rows of every global batch.

The state of the whole pipeline is a `Place`, the number of the next row and what each source was
read up to: the rows that follow are a pure function of it, of the configuration and of the seed,
whatever the size of a batch and the number of hosts.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mor_jax.config import DataConfig
from mor_jax.config.parsing import check
from mor_jax.data.position import DataPosition, Jump, RowOrder, ahead, first_position
from mor_jax.data.shards.reader import open_shards
from mor_jax.data.sources.documents import Documents, open_documents
from mor_jax.data.streams.mixture import shares_of
from mor_jax.data.streams.packing import PackedSequences, Row, rows_per_host
from mor_jax.data.streams.token_streams import TokenStream, tokenize
from mor_jax.data.tokenizers.base import Tokenizer
from mor_jax.types import IGNORE, Batch

# grain takes half a second to import; evaluation and preparation do without it.
if TYPE_CHECKING:
    import grain


_MOST_ROWS = 2**40
"""More held-out rows than any text has, few enough to be counted in doubles."""


@functools.lru_cache(maxsize=8)
def _tokenized(key: "_Key") -> dict[str, TokenStream]:
    return dict(tokenize(key.documents, key.tokenizer, key.share))


@dataclasses.dataclass(frozen=True)
class _Key:
    """A tokenised source in memory; equal keys share it for the life of the process."""

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
            rule = "is written in two parts, to train on and to hold out"
            check(split != "all", setting, spec, rule, "Name the text that it was made of")
            streams.append(open_shards(spec, tokenizer, setting)[split])
            continue
        found = open_documents(spec, cfg.text_key, setting)
        key = _Key(found, spec, found.identity, cfg.text_key, tokenizer, share)
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
    """Every row of a split, source after source, unshuffled: a grain `MapDataset` of `Row`."""
    import grain

    parts = [grain.MapDataset.source(rows) for rows in _open_rows(cfg, tokenizer, split, length)]
    return grain.MapDataset.concatenate(parts)


def fingerprint(cfg: DataConfig, tokenizer: Tokenizer) -> str:
    """Hash that changes when batches would: texts, tokenizer, split, mixture, packing, order.

    Paths and the number of hosts, threads or processes do not enter.
    """
    splits = ("train", "heldout")
    texts = [[s.fingerprint for s in open_streams(cfg, tokenizer, split)] for split in splits]
    order = (_weights(cfg), cfg.document_mask, cfg.shuffle, cfg.seed)
    return hashlib.sha256(repr((texts, tokenizer.fingerprint, order)).encode()).hexdigest()[:32]


def position_of(cfg: DataConfig, tokenizer: Tokenizer, *, length: int, seed: int) -> DataPosition:
    """The beginning of a run with this data. Raises `ValueError`, see docs/data.md."""
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
    """Global batches of `batch_size` rows of `length` tokens, and which of `hosts` reads here.

    Host h takes rows h * host_rows .. (h + 1) * host_rows - 1 of each. Raises `ValueError` if the
    rows cannot be shared out evenly.
    """

    length: int
    batch_size: int
    host: int = 0
    hosts: int = 1

    def __post_init__(self) -> None:
        rule = f"must be a positive multiple of the {self.hosts} hosts, which take equal shares"
        fix = f"Try {max(-(-self.batch_size // self.hosts), 1) * self.hosts}"
        ok = self.batch_size > 0 and self.batch_size % self.hosts == 0
        check(ok, "batch_size", self.batch_size, rule, fix)
        ok = 0 <= self.host < self.hosts
        check(ok, "host", self.host, f"must be in 0 .. {self.hosts - 1}", "Count hosts from 0")

    @property
    def host_rows(self) -> int:
        """Rows of each global batch that this host reads."""
        return self.batch_size // self.hosts


def _to_batch(row: Mapping[str, Any]) -> Batch:
    # Copied, since arrays from worker processes lie in memory that is not ours to keep.
    return Batch(**{name: np.array(array) for name, array in row.items()})


class TrainBatches:
    """Iterates this host's part of the global batches, endlessly.

    `position` is the number of the next row of the run; starting at it gives the same rows.
    """

    def __init__(
        self, batches: "grain.IterDataset", start: int, rows: int, jumps: Sequence[Jump]
    ) -> None:
        """start: the first row. rows: of a global batch. jumps: rows that are left out."""
        self._iterator = iter(batches)
        self._rows, self._jumps = rows, jumps
        self.position = ahead(start, 0, jumps)

    def __iter__(self) -> "TrainBatches":
        return self

    def __next__(self) -> Batch:
        row = next(self._iterator)
        self.position = ahead(self.position, self._rows, self._jumps)
        return _to_batch(row)

    def close(self) -> None:
        """Ends the background threads and processes."""
        self._iterator.close()


def train_batches(
    cfg: DataConfig,
    tokenizer: Tokenizer,
    layout: Layout,
    *,
    seed: int,
    start: int | DataPosition = 0,
    jumps: Sequence[Jump] = (),
) -> TrainBatches:
    """Training batches from row `start` on, NumPy int32 [layout.host_rows, length].

    Each source is shuffled anew in every epoch, by `seed` and `cfg.seed`, and repeated; sources
    are mixed by weight. `cfg.prefetch` batches are made ahead by a thread, or by `cfg.workers`
    processes. start: a row of a run that never changed its sources, or any run's place. jumps:
    rows that are left out. Raises `ValueError`, see docs/data.md.
    """
    import grain

    if isinstance(start, int):
        check(start >= 0, "start", start, "is the number of a row", "Count rows from 0")
        # Texts matter to those that compare two places.
        place = first_position(cfg, [""] * len(cfg.sources), "", length=layout.length, seed=seed)
        place = dataclasses.replace(place, row=start)
    else:
        place = start
    parts = []
    for i, rows in enumerate(_open_rows(cfg, tokenizer, "train", layout.length)):
        part = grain.MapDataset.source(rows)
        if cfg.shuffle:
            order = place.readings[i].order
            own = np.random.SeedSequence((cfg.seed, seed, order)).generate_state(1)[0]
            part = part.shuffle(seed=int(own))
        parts.append(part.repeat())
    mixed = grain.MapDataset.select_from_datasets(parts, RowOrder(place, jumps))
    batches = mixed.batch(layout.host_rows)[layout.host :: layout.hosts]
    ahead = grain.ReadOptions(num_threads=min(cfg.prefetch, 1), prefetch_buffer_size=cfg.prefetch)
    iterable = batches.to_iter_dataset(ahead)
    iterable = _in_workers(iterable, cfg) if cfg.num_workers else iterable
    return TrainBatches(iterable, place.row, layout.batch_size, jumps)


def _in_workers(batches: "grain.IterDataset", cfg: DataConfig) -> "grain.IterDataset":
    import grain
    from absl import flags

    # grain reads its own flags before it starts processes; a program without absl's main has
    # parsed none, and then their defaults hold.
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
    """The same `batches` held-out batches at every call, NumPy int32 [layout.host_rows, length].

    split: `all` takes every document, for sources that nothing is trained on. Rows are shared
    between sources by weight and spread evenly over each. A small split gives fewer batches; the
    rows that then lack in the last are repetitions without targets. multiple: where not even one
    batch is full, it has no more rows than there are, but a multiple of this number (which the
    hosts divide). Raises `ValueError` if a source's split does not fill one row.
    """
    chosen = [(rows, i) for _, rows, i in _heldout_rows(cfg, tokenizer, layout, batches, split)]
    size = layout.batch_size
    if multiple is not None:
        size = min(size, -(-len(chosen) // multiple) * multiple)
    mine = size // layout.hosts
    stop = min(len(chosen) + -len(chosen) % size, batches * size)
    made = []
    for first in range(layout.host * mine, stop, size):
        part = [_chosen_row(chosen, i) for i in range(first, first + mine)]
        made.append(_to_batch({name: np.stack([row[name] for row in part]) for name in part[0]}))
    return made


def validation_sources(
    cfg: DataConfig, tokenizer: Tokenizer, layout: Layout, batches: int, split: str = "heldout"
) -> np.ndarray:
    """The number of its source for each sequence of `validation_batches`, in order, int64.

    Repetitions at the end have none.
    """
    chosen = [source for source, *_ in _heldout_rows(cfg, tokenizer, layout, batches, split)]
    return np.array(chosen[: batches * layout.batch_size])


def _heldout_rows(
    cfg: DataConfig, tokenizer: Tokenizer, layout: Layout, batches: int, split: str
) -> list[tuple[int, PackedSequences, int]]:
    """Every row that was chosen: number of its source, the source's rows, its place in them."""
    check(batches > 0, "batches", batches, "must be greater than 0", "Try 1")
    sources = _open_rows(cfg, tokenizer, split, layout.length)
    most = min(batches * layout.batch_size, _MOST_ROWS)
    wanted = shares_of(_weights(cfg), max(most, len(sources)))
    return [
        (number, rows, int(i))
        for number, (rows, count) in enumerate(zip(sources, wanted, strict=True))
        for i in rows_per_host(len(rows), int(count))
    ]


def _chosen_row(chosen: list[tuple[PackedSequences, int]], i: int) -> Row:
    # Past the end: a repetition without targets.
    rows, number = chosen[i if i < len(chosen) else (i - len(chosen)) % len(chosen)]
    row = rows[number]
    return row if i < len(chosen) else row | {"targets": np.full_like(row["targets"], IGNORE)}
