"""Where a run is in its data, in rows, so that it holds whatever the next start changes.

Row n of a run is decided by n, by its sources and by what each of them was read up to when their
mixture last changed. A batch is so many rows in order: its size is no part of this, nor are hosts,
processes and micro-batches.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from mor_jax.config import DataConfig
from mor_jax.config.old_names import translated_paths
from mor_jax.config.parsing import check, fail
from mor_jax.data.streams.mixture import Mixture

Jump = tuple[int, int]
"""The first row that is left out, and the one to go on with."""

_ORDER = ("seq_len", "seed", "data.seed", "data.shuffle")
_TEXT = ("data.tokenizer", "data.validation_fraction", "data.text_key")


@dataclasses.dataclass(frozen=True)
class SourcePosition:
    """How one source is read.

    source: as configured. text: hash of its tokens, "" where an earlier version did not note it.
    settings: what decides on its rows, by name. order: the number that its shuffling is seeded
    with. first: rows that were read of it before the present mixture began.
    """

    source: str
    text: str
    settings: dict[str, Any]
    order: int
    first: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataPosition:
    """A point between two rows.

    row: rows of the run before it. since: row at which the present mixture began. readings: its
    sources. left: sources that were read before it, and are no more.
    """

    row: int
    since: int
    readings: tuple[SourcePosition, ...]
    weights: tuple[float, ...]
    left: tuple[SourcePosition, ...] = ()

    def notes(self) -> dict[str, Any]:
        """What a checkpoint holds of it beside the row, as JSON values."""
        made = dataclasses.asdict(self)
        del made["row"]
        return made

    @classmethod
    def of(cls, row: int, notes: dict[str, Any] | None, config: dict[str, Any]) -> "DataPosition":
        """From what a checkpoint holds. notes: None in those of earlier versions, which read all
        of a run in one mixture. config: the run's configuration then."""
        if notes is not None:
            return cls(
                row=row,
                since=notes["since"],
                readings=tuple(map(_reading, notes["readings"])),
                weights=tuple(notes["weights"]),
                left=tuple(map(_reading, notes["left"])),
            )
        sources = config["data"]["sources"]
        known = {"seq_len": config["seq_len"], "seed": config["seed"]}
        known |= {f"data.{name}": value for name, value in config["data"].items()}
        return cls(
            row=row,
            since=0,
            readings=tuple(
                SourcePosition(source, "", known, i) for i, source in enumerate(sources)
            ),
            weights=tuple(config["data"]["weights"] or (1.0,) * len(sources)),
        )

    def read(self) -> list[SourcePosition]:
        """The sources, those that were left last, with all rows that were read of each in
        `first`."""
        counts = Mixture(self.weights).counts(self.row - self.since)
        return [
            *(
                dataclasses.replace(reading, first=reading.first + count)
                for reading, count in zip(self.readings, counts, strict=True)
            ),
            *self.left,
        ]


def _reading(values: dict[str, Any]) -> SourcePosition:
    return SourcePosition(**values | {"settings": translated_paths(values["settings"])})


def first_position(
    cfg: DataConfig, texts: Sequence[str], tokenizer: str, *, length: int, seed: int
) -> DataPosition:
    """The beginning of a new run. texts: hashes of the sources' tokens. tokenizer: its hash."""
    weights = cfg.weights or (1.0,) * len(cfg.sources)
    known = {
        "seq_len": length,
        "seed": seed,
        "data.seed": cfg.seed,
        "data.shuffle": cfg.shuffle,
        "data.tokenizer": tokenizer,
        "data.validation_fraction": cfg.validation_fraction,
        "data.text_key": cfg.text_key,
    }
    pairs = zip(cfg.sources, texts, strict=True)
    readings = tuple(SourcePosition(*pair, known, i) for i, pair in enumerate(pairs))
    return DataPosition(row=0, since=0, readings=readings, weights=tuple(weights))


def carried_over(old: DataPosition, new: DataPosition, jumps: Sequence[Jump] = ()) -> DataPosition:
    """The place `old` of a run under changed settings, whose beginning is `new`.

    A source that was read goes on at its next row, also in another mixture and after it was left
    out for a while; one that was not begins at its first. jumps: rows that are left out.

    Raises:
        ValueError: which rows of a source were read cannot be told under the new settings.
    """
    if old.row == 0:
        return new
    known = dict(enumerate(old.read()))
    unused = 1 + max(reading.order for reading in known.values())
    readings, places = [], []
    for now in new.readings:
        places.append(_same_source(now, known))
        if places[-1] is None:
            readings.append(dataclasses.replace(now, order=unused))
            unused += 1
            continue
        was = known.pop(places[-1])
        if was.first:
            _check_rows(now, was)
        readings.append(dataclasses.replace(now, order=was.order, first=was.first))
    if places == list(range(len(old.readings))) and old.weights == new.weights:
        began = [reading.first for reading in old.readings]
        pairs = zip(readings, began, strict=True)
        kept = tuple(dataclasses.replace(reading, first=first) for reading, first in pairs)
        return dataclasses.replace(old, readings=kept)
    for first, end in jumps:
        rule = f"rows {first} to {end - 1} are left out after steps that were not finite; "
        names = [reading.source for reading in new.readings]
        fix = "Go on with the sources and weights as they were until the run is past them"
        ok = end <= old.row
        check(ok, "data.sources", names, f"{rule}in another mixture they would be others", fix)
    rest = tuple(known.values())
    return dataclasses.replace(new, row=old.row, since=old.row, readings=tuple(readings), left=rest)


def _same_source(now: SourcePosition, known: dict[int, SourcePosition]) -> int | None:
    """Which of `known` is the source of `now`: by its text, else by its name; None for none."""

    def alike(was: SourcePosition) -> int:
        return 2 * (now.text == was.text) + (now.source == was.source)

    best = max(known, key=lambda index: (alike(known[index]), -index), default=None)
    return best if best is not None and alike(known[best]) else None


def _check_rows(now: SourcePosition, was: SourcePosition) -> None:
    """Raises `ValueError` unless the rows of a source are the same and in the same order."""
    before, after = was.settings, now.settings
    another = "start another run from its weights (launch/convert.py export, import)"
    names = [name for name in _ORDER if before[name] != after[name]]
    if not before["data.shuffle"] and not after["data.shuffle"]:
        names = [name for name in names if name == "seq_len"]
    if names:
        name = names[0]
        told = "cut at" if name == "seq_len" else "read in the order of"
        rule = f"{was.first} rows of {was.source!r} were {told} {name}={before[name]!r}, so which "
        rule += "of the new rows were read cannot be told"
        fix = f"Keep {name}={before[name]!r}, give text that was not read yet, or {another}"
        fail(name, after[name], rule, fix)
    if was.text in ("", now.text):
        return
    for name in _TEXT:
        if before[name] != after[name]:
            rule = f"{was.first} rows of {was.source!r} were read with {before[name]!r}, and the "
            fail(name, after[name], f"{rule}new ones are others", f"Keep it, or {another}")
    rule = f"its text changed since {was.first} rows of it were read (hash {was.text} then, "
    rule += f"{now.text} now), so which rows are new cannot be told"
    fix = f"Bring the old text back, or {another}. Text under a name that was not read yet is new"
    fail("data.sources", now.source, rule, fix)


def ahead(row: int, count: int, jumps: Sequence[Jump] = ()) -> int:
    """Number of the row that follows after `count` rows from `row` on, all outside of jumps."""
    for first, end in sorted(jumps):
        if end <= row:
            continue
        if first > row + count:
            break
        count -= max(first - row, 0)
        row = end
    return row + count


class RowOrder:
    """Maps the number of a row, counted from a place on, to (source, number of the row in it).

    jumps: rows that are left out and not counted.
    """

    def __init__(self, place: DataPosition, jumps: Sequence[Jump] = ()) -> None:
        self._mixture = Mixture(place.weights)
        self._place, self._jumps = place, tuple(jumps)
        self._first = [reading.first for reading in place.readings]

    def __len__(self) -> int:
        return len(self._mixture)

    def __getitem__(self, index: int) -> tuple[int, int]:
        row = ahead(self._place.row, int(index), self._jumps)
        source, number = self._mixture[row - self._place.since]
        return source, self._first[source] + number


__all__ = [
    "DataPosition",
    "Jump",
    "RowOrder",
    "SourcePosition",
    "ahead",
    "carried_over",
    "first_position",
]
