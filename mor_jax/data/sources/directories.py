"""Advice for a directory given where files or a pattern belong."""

import os
from collections import Counter
from collections.abc import Sequence

COMPRESSED = (".gz", ".zst", ".xz", ".bz2")
ENDINGS = {
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "parquet": (".parquet", ".pq"),
    "text": (".txt", ".text"),
}
"""How the names of files of each kind usually end, the most reliable first."""

_MARKS = {
    "dataset_dict.json": "hf:{0}",
    "state.json": "hf:{0}",
    "features.json": "tfds:{0}",
    "manifest.json": "shards:{0}",
}
"""Files found only in directories of other kinds of source."""


def kind_of(name: str) -> str | None:
    """The kind of source that a file called `name` belongs to, by its ending."""
    ending = _ending(name)
    return next((kind for kind, known in ENDINGS.items() if ending.startswith(known)), None)


def _ending(name: str) -> str:
    """`.jsonl.zst` of `a.jsonl.zst`, `.md` of `readme.md`."""
    stem, last = os.path.splitext(os.path.basename(name))
    inner = os.path.splitext(stem)[1] if last in COMPRESSED else ""
    return (inner + last).lower()


def advice(folder: str, names: Sequence[str], kind: str) -> tuple[str, str]:
    """Rule and fix of the error that `folder`, with the files `names`, is not a file.

    The suggested pattern matches files of this kind, or of another if there are none.
    """
    rule = "is a directory, not a file or a pattern"
    for mark, form in _MARKS.items():
        if mark in names:
            return (
                rule,
                f"Its {mark} belongs to another kind of source: try {form.format(folder)!r}",
            )
    for other in (kind, *(known for known in ENDINGS if known != kind)):
        fitting = [name for name in names if kind_of(name) == other]
        if fitting:
            fix = f"Try {_pattern(folder, fitting, other)!r}"
            return rule, fix if other == kind else f"It contains no {kind} files. {fix}"
    if kind == "text" and names:
        return rule, f"Try {_pattern(folder, names, kind)!r}"
    ending = ENDINGS.get(kind, (".txt",))[0]
    held = f"none of its {len(names)} files looks like {kind}" if names else "it contains no files"
    example = f"{kind}:{os.path.join(folder, '**', '*' + ending)}"
    return f"{rule}; {held}", f"Give a pattern for its files, such as {example!r}"


def _pattern(folder: str, names: Sequence[str], kind: str) -> str:
    """A source that matches those of `names` with the most common ending."""
    [(ending, _)] = Counter(_ending(name) for name in names).most_common(1)
    deep = any(os.path.dirname(name) for name in names if _ending(name) == ending)
    return f"{kind}:{os.path.join(folder, *['**'] * deep, '*' + ending)}"
