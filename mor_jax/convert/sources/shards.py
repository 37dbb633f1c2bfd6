"""Checkpoints in several files: the index that says which tensor lies where."""

import json
from collections.abc import Callable
from pathlib import Path

from mor_jax.checkpoint.lazy_arrays import LazyArrays
from mor_jax.config.parsing import fail


def open_shards(index: Path, open_one: Callable[[Path], LazyArrays]) -> LazyArrays:
    """The shards that `index` (`*.index.json`) lists, as one.

    Raises:
        ValueError: an index that is none, shards that are missing (all are named), or shards that
            hold other tensors than the index says.
    """
    places = _weight_map(index)
    files = {file: index.parent / file for file in sorted(set(places.values()))}
    missing = [name for name, path in files.items() if not path.is_file()]
    if missing:
        rule = f"lists {len(files)} files, of which these are missing"
        fail(str(index), missing, rule, "Copy or download them again")
    shards = {name: open_one(path) for name, path in files.items()}
    lines = [
        f"  {name}: not in {file}, where the index has it"
        for name, file in places.items()
        if name not in shards[file].specs
    ]
    lines += [
        f"  {name}: in {file}, unknown to the index"
        for file, shard in shards.items()
        for name in shard.specs
        if places.get(name) != file
    ]
    if lines:
        told = "\n".join(lines[:40])
        raise ValueError(f"{index}: does not describe its shards:\n{told}\nDownload them again")
    specs = {name: shards[file].specs[name] for name, file in places.items()}
    return LazyArrays(str(index.parent), specs, lambda name: shards[places[name]].read(name))


def shards_of(index: Path) -> set[str]:
    """Names of the files that an index lists. Raises `ValueError` if it is none."""
    return set(_weight_map(index).values())


def _weight_map(index: Path) -> dict[str, str]:
    try:
        places = json.loads(index.read_text())["weight_map"]
        ok = all(isinstance(k, str) and isinstance(v, str) for k, v in places.items()) and places
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        fail(str(index), None, f"is no index of shards ({error!r})", "Download it again")
    inside = ok and all(Path(file).name == file for file in places.values())
    if not inside:
        rule = "must map names of tensors to files beside the index"
        odd = [file for file in places.values() if Path(str(file)).name != file][:3]
        fail(f"{index}: weight_map", odd or places, rule, "Download it again")
    return places
