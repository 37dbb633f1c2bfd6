"""Sharded checkpoints: an index maps tensors to files."""

import json
from collections.abc import Callable
from pathlib import Path

from mor_jax.checkpoint.lazy_arrays import LazyArrays
from mor_jax.config.parsing import fail


def open_shards(index: Path, open_one: Callable[[Path], LazyArrays]) -> LazyArrays:
    """The tensors of all shards in `index` (`*.index.json`).

    Raises:
        ValueError: not an index, missing shards (all are listed), or shards whose tensors are not
            those of the index.
    """
    files_by_tensor = _weight_map(index)
    files = {file: index.parent / file for file in sorted(set(files_by_tensor.values()))}
    missing = [name for name, path in files.items() if not path.is_file()]
    if missing:
        rule = f"lists {len(files)} files, and these are missing"
        fail(str(index), missing, rule, "Copy or download them again")
    shards = {name: open_one(path) for name, path in files.items()}
    lines = [
        f"  {name}: not in {file}, as the index says"
        for name, file in files_by_tensor.items()
        if name not in shards[file].specs
    ]
    lines += [
        f"  {name}: in {file}, not in the index"
        for file, shard in shards.items()
        for name in shard.specs
        if files_by_tensor.get(name) != file
    ]
    if lines:
        listed = "\n".join(lines[:40])
        raise ValueError(f"{index}: does not match its shards:\n{listed}\nDownload them again")
    specs = {name: shards[file].specs[name] for name, file in files_by_tensor.items()}
    return LazyArrays(
        str(index.parent), specs, lambda name: shards[files_by_tensor[name]].read(name)
    )


def shards_of(index: Path) -> set[str]:
    """Names of the files that an index lists. Raises `ValueError` if it is not an index."""
    return set(_weight_map(index).values())


def _weight_map(index: Path) -> dict[str, str]:
    try:
        files_by_tensor = json.loads(index.read_text())["weight_map"]
        ok = (
            all(isinstance(k, str) and isinstance(v, str) for k, v in files_by_tensor.items())
            and files_by_tensor
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        fail(str(index), None, f"is not an index of shards ({error!r})", "Download it again")
    valid = ok and all(Path(file).name == file for file in files_by_tensor.values())
    if not valid:
        rule = "must map tensor names to files in the directory of the index"
        odd = [file for file in files_by_tensor.values() if Path(str(file)).name != file][:3]
        fail(f"{index}: weight_map", odd or files_by_tensor, rule, "Download it again")
    return files_by_tensor
