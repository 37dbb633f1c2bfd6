"""The data position of a run, in sequences, valid even if the next start changes settings.

Sequence n of a run is determined by n, its sources, and the position in each source when the
mixture last changed. It is independent of batch size, hosts, processes and micro-batches.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from mor_jax.config import DataConfig
from mor_jax.config.old_names import translated_paths
from mor_jax.config.parsing import check, fail
from mor_jax.data.streams.mixture import Mixture

SkippedRange = tuple[int, int]
"""The first skipped sequence, and the next one that is used."""

_ORDER = ("seq_len", "seed", "data.seed", "data.shuffle")
_TEXT = ("data.tokenizer", "data.validation_fraction", "data.text_key")


@dataclasses.dataclass(frozen=True)
class SourcePosition:
    """The position in one source.

    source: as configured. text: hash of its tokens, "" if an earlier version did not record it.
    settings: those that determine its sequences, by name. order: number that seeds its shuffling.
    first: sequences read from it before the current mixture began.
    """

    source: str
    text: str
    settings: dict[str, Any]
    order: int
    first: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataPosition:
    """A point between two sequences of a run.

    row: sequences before it. since: sequence at which the current mixture began. readings: its
    sources. left: sources that were read earlier and are no longer used.
    """

    row: int
    since: int
    readings: tuple[SourcePosition, ...]
    weights: tuple[float, ...]
    left: tuple[SourcePosition, ...] = ()

    def notes(self) -> dict[str, Any]:
        """The fields other than `row`, as JSON values for a checkpoint."""
        fields = dataclasses.asdict(self)
        del fields["row"]
        return fields

    @classmethod
    def of(cls, row: int, notes: dict[str, Any] | None, config: dict[str, Any]) -> "DataPosition":
        """Restores a position from a checkpoint. notes: None in checkpoints of earlier versions,
        whose runs had a single mixture. config: the run's configuration at that time."""
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
        """All sources, with the sequences read so far from each in `first`; unused ones last."""
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
    """The start of a new run. texts: hashes of the sources' tokens. tokenizer: its hash."""
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


def resume_position(
    old: DataPosition, new: DataPosition, jumps: Sequence[SkippedRange] = ()
) -> DataPosition:
    """The position `old` of a run under changed settings, whose start position is `new`.

    A source that was read before continues at its next sequence, also in another mixture or after
    it was unused for a while; a new one starts at its first. jumps: ranges of skipped sequences.

    Raises:
        ValueError: under the new settings it is unknown which sequences of a source were read.
    """
    if old.row == 0:
        return new
    known = dict(enumerate(old.read()))
    unused = 1 + max(reading.order for reading in known.values())
    readings, places = [], []
    for current in new.readings:
        places.append(_same_source(current, known))
        if places[-1] is None:
            readings.append(dataclasses.replace(current, order=unused))
            unused += 1
            continue
        saved = known.pop(places[-1])
        if saved.first:
            _check_rows(current, saved)
        readings.append(dataclasses.replace(current, order=saved.order, first=saved.first))
    if places == list(range(len(old.readings))) and old.weights == new.weights:
        began = [reading.first for reading in old.readings]
        pairs = zip(readings, began, strict=True)
        unchanged = tuple(dataclasses.replace(reading, first=first) for reading, first in pairs)
        return dataclasses.replace(old, readings=unchanged)
    for first, end in jumps:
        rule = f"sequences {first} to {end - 1} are skipped after non-finite steps; "
        names = [reading.source for reading in new.readings]
        fix = "Resume with the old sources and weights until the run is past them"
        ok = end <= old.row
        check(ok, "data.sources", names, f"{rule}another mixture would change them", fix)
    rest = tuple(known.values())
    return dataclasses.replace(new, row=old.row, since=old.row, readings=tuple(readings), left=rest)


def _same_source(current: SourcePosition, known: dict[int, SourcePosition]) -> int | None:
    """Index in `known` of the source of `current`: by its text, else by its name; None if new."""

    def similarity(saved: SourcePosition) -> int:
        return 2 * (current.text == saved.text) + (current.source == saved.source)

    best = max(known, key=lambda index: (similarity(known[index]), -index), default=None)
    return best if best is not None and similarity(known[best]) else None


def _check_rows(current: SourcePosition, saved: SourcePosition) -> None:
    """Raises `ValueError` unless the sequences of a source and their order are unchanged."""
    before, after = saved.settings, current.settings
    another = "start another run from its weights (mor convert export, import)"
    names = [name for name in _ORDER if before[name] != after[name]]
    if not before["data.shuffle"] and not after["data.shuffle"]:
        names = [name for name in names if name == "seq_len"]
    if names:
        name = names[0]
        how = "packed with" if name == "seq_len" else "read in the order of"
        rule = f"{saved.first} sequences of {saved.source!r} were {how} {name}={before[name]!r}, "
        rule += "so it is unknown which of the new sequences were read"
        fix = f"Keep {name}={before[name]!r}, use text that was not read yet, or {another}"
        fail(name, after[name], rule, fix)
    if saved.text in ("", current.text):
        return
    for name in _TEXT:
        if before[name] != after[name]:
            rule = f"{saved.first} sequences of {saved.source!r} were read with {before[name]!r}, "
            rule += "and the new ones differ"
            fail(name, after[name], rule, f"Keep it, or {another}")
    rule = f"its text changed since {saved.first} sequences of it were read (hash {saved.text} "
    rule += f"then, {current.text} now), so it is unknown which sequences are new"
    fix = f"Restore the old text, or {another}. New text needs a source name that was not read yet"
    fail("data.sources", current.source, rule, fix)


def advance(row: int, count: int, jumps: Sequence[SkippedRange] = ()) -> int:
    """Index of the sequence `count` sequences after `row`, not counting skipped ranges."""
    for first, end in sorted(jumps):
        if end <= row:
            continue
        if first > row + count:
            break
        count -= max(first - row, 0)
        row = end
    return row + count


class RowOrder:
    """Maps an index, counted from a position, to (source, index of the sequence in that source).

    jumps: ranges of skipped sequences, which are not counted.
    """

    def __init__(self, place: DataPosition, jumps: Sequence[SkippedRange] = ()) -> None:
        self._mixture = Mixture(place.weights)
        self._place, self._jumps = place, tuple(jumps)
        self._first = [reading.first for reading in place.readings]

    def __len__(self) -> int:
        return len(self._mixture)

    def __getitem__(self, index: int) -> tuple[int, int]:
        row = advance(self._place.row, int(index), self._jumps)
        source, number = self._mixture[row - self._place.since]
        return source, self._first[source] + number


__all__ = [
    "DataPosition",
    "RowOrder",
    "SkippedRange",
    "SourcePosition",
    "advance",
    "first_position",
    "resume_position",
]
