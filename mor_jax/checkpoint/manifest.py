"""The manifest of a checkpoint: its content, checksums and verification."""

import json
import math
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from etils import epath

from mor_jax.config.old_names import translated
from mor_jax.files import write_atomic

FILE = "manifest.json"
FORMAT = 2
"""Format 1 counts data positions in batches, format 2 in sequences."""

_CHUNK = 1 << 22


class Damaged(ValueError):
    """The manifest or a file that it lists is missing or changed."""


def write(directory: epath.Path, facts: dict[str, Any], data: epath.Path) -> None:
    """Writes the manifest of `directory`: `facts`, size and CRC-32 of all files under `data`."""
    manifest = facts | {"format": FORMAT, "files": _stamps(data)}
    write_atomic(directory / FILE, json.dumps(manifest | {"seal": _seal(manifest)}, indent=1))


def read(directory: epath.Path) -> dict[str, Any]:
    """The content of a manifest. Raises `Damaged` if it is missing, truncated or changed."""
    file = directory / FILE
    if not file.exists():
        raise Damaged(f"{FILE} is missing")
    try:
        manifest = json.loads(file.read_text())
        seal = manifest.pop("seal")
    except (ValueError, KeyError, AttributeError) as error:
        raise Damaged(f"{FILE} cannot be read ({type(error).__name__}: {error})") from error
    if seal != _seal(manifest):
        raise Damaged(f"{FILE} was changed after it was written")
    if manifest["format"] not in (1, FORMAT):
        fix = "Use the version that wrote it"
        raise ValueError(f"{file}: has format {manifest['format']}, expected {FORMAT}. {fix}")
    if "config" in manifest:
        # Some settings have new names; the seal covers the names as written.
        manifest["config"] = translated(manifest["config"])
    if manifest["format"] == 1 and "position" in manifest:
        return _batches_to_sequences(manifest)
    return manifest


def _batches_to_sequences(manifest: dict[str, Any]) -> dict[str, Any]:
    batch_size, extra = manifest["config"]["batch_size"], dict(manifest["extra"])
    for name, value in extra.items():
        if name == "jumps":
            extra[name] = [[first * batch_size, end * batch_size] for first, end in value]
        elif name == "bad":
            extra[name] = [number * batch_size for number in value]
    return manifest | {"position": manifest["position"] * batch_size, "extra": extra}


def verify(manifest: dict[str, Any], data: epath.Path, *, sums: bool = True) -> None:
    """Raises `Damaged`, naming the file, unless every file exists with its size and CRC-32.

    sums: False compares sizes alone, without reading the files.
    """
    stamps = _stamps(data, sums)
    for name, (size, crc) in manifest["files"].items():
        if name not in stamps:
            raise Damaged(f"{data / name} is missing")
        actual_size, actual_crc = stamps[name]
        if actual_size != size:
            raise Damaged(f"{data / name} has {actual_size} bytes, expected {size}")
        if None not in (crc, actual_crc) and crc != actual_crc:
            raise Damaged(f"{data / name} does not match its CRC-32")


def count_parameters(params: Any) -> int:
    """Number of values in a tree of arrays; shared weights count once."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def describe(tree: Any) -> dict[str, str]:
    """Dtype and shape of every array of a nested dictionary, by dotted path."""
    flat = jax.tree_util.tree_leaves_with_path(tree)
    name = jax.tree_util.keystr
    return {name(p, simple=True, separator="."): f"{x.dtype}{list(x.shape)}" for p, x in flat}


def check_arrays(facts: dict[str, Any], abstract_state: Any, path: epath.Path) -> None:
    """Raises `ValueError` unless the checkpoint at `path` holds the arrays of `abstract_state`."""
    lines = differences(facts["arrays"], describe(abstract_state), "in the checkpoint")
    count = count_parameters(abstract_state["params"])
    if lines or count != facts["parameters"]:
        raise ValueError(
            f"{path}: holds {facts['parameters']:,} parameters, the model has {count:,}:\n"
            + "\n".join(lines)
            + "\nRestore it with the configuration in its manifest"
        )


def check_parameters(facts: dict[str, Any], abstract: Any, path: epath.Path) -> None:
    """Raises `ValueError` unless the checkpoint at `path` holds all parameters of `abstract`."""
    expected = {f"params.{name}": text for name, text in describe(abstract).items()}
    saved = {name: text for name, text in facts["arrays"].items() if name in expected}
    if lines := differences(saved, expected, "in the checkpoint"):
        fix = "Read it with the configuration in its manifest"
        raise ValueError(f"{path}: holds other parameters:\n" + "\n".join([*lines, fix]))


def differences(saved: dict[str, str], model: dict[str, str], where: str) -> list[str]:
    """One line for every array that differs between two results of `describe`.

    where: the place of `saved`, such as "in the checkpoint".
    """
    return [
        f"  {name}: {saved.get(name, 'absent')} {where}, {model.get(name, 'absent')} in the model"
        for name in sorted(saved.keys() | model.keys())
        if saved.get(name) != model.get(name)
    ]


def check_data(facts: Mapping[str, Any], fingerprint: str | None) -> None:
    """Raises `ValueError` if the data of the run changed since a checkpoint was written."""
    saved = facts["extra"].get("fingerprint")
    if None not in (fingerprint, saved) and fingerprint != saved:
        raise ValueError(
            f"the data changed since step {facts['step']} was saved (fingerprint {saved} then, "
            f"{fingerprint} now), so position {facts['position']} would refer to other text. "
            "Restore the old data, or start over in another workdir"
        )


def _seal(manifest: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(manifest, sort_keys=True).encode())


def _stamps(data: epath.Path, sums: bool = True) -> dict[str, list[int | None]]:
    # Size and CRC-32 of every file. In an object store, reading all files back would cost as much
    # as the save, and the store verifies its own checksums: there only the size is recorded.
    sizes_only = "://" in str(data) or not sums
    return {
        path.relative_to(data).as_posix(): [path.stat().length, None if sizes_only else _crc(path)]
        for path in _walk(data)
    }


def _walk(directory: epath.Path) -> Iterator[epath.Path]:
    # epath does not support recursive patterns, which are slow in object stores.
    for path in sorted(directory.iterdir()) if directory.exists() else ():
        if path.is_dir():
            yield from _walk(path)
        else:
            yield path


def _crc(path: epath.Path) -> int:
    crc = 0
    # One buffer: allocating memory for every block would cost as much as the checksum.
    block = memoryview(bytearray(_CHUNK))
    with path.open("rb") as file:
        while size := file.readinto(block):
            crc = zlib.crc32(block[:size], crc)
    return crc
