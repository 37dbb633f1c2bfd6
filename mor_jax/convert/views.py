"""Lazy views: foreign tensors as our parameters, and our parameters as foreign tensors.

Both follow a table of `names`. Values are read on demand, and at most one of our arrays is in
memory. No tensor is dropped or guessed: every mismatch is listed, with the foreign name and ours,
before the first value is read.
"""

import difflib
import re
import threading
from collections.abc import Callable, Collection, Sequence

import numpy as np
from einops import rearrange

from mor_jax.checkpoint.lazy_arrays import ArraySpec, LazyArrays
from mor_jax.config import ModelConfig
from mor_jax.config.parsing import fail
from mor_jax.convert.names import HEAD, TensorName, array_shapes, sizes, torch_shape
from mor_jax.models.param_count import unique_parameters

# Buffers in older checkpoints; they follow from the configuration.
DERIVED = re.compile(r"\.rotary_emb\.(inv_freq|cos_cached|sin_cached)$")

_LISTED = 100
"""Most tensors that a message lists."""

_ROWS = 16
"""Rows transposed at a time: their cache lines stay in the cache while columns are written."""


def as_params(cfg: ModelConfig, table: Sequence[TensorName], tensors: LazyArrays) -> LazyArrays:
    """Tensors in torch layout, named as in `table` -> arrays of our tree by dotted path, float32.

    A shared weight may appear under any or all of its names; reading it compares the copies.

    Raises:
        ValueError: on the call, tensors that are missing, unknown or of the wrong shape (the first
            100 are listed); on reading, copies of one shared weight that differ, or values that
            are not finite.
    """
    _check_fit(cfg, table, tensors)
    places: dict[str, dict[tuple[int, ...], list[TensorName]]] = {}
    for entry in table:
        if entry.name in tensors.specs:
            places.setdefault(entry.path, {}).setdefault(entry.index, []).append(entry)
    specs = {path: ArraySpec(shape) for path, shape in array_shapes(cfg, table).items()}
    _check_count(cfg, specs)

    def part(path: str, index: tuple[int, ...]) -> np.ndarray:
        first, *copies = places[path][index]
        value = tensors.read(first.name)
        _check_finite(tensors.where, first.name, value)
        for copy in copies:
            _check_copy(tensors.where, copy, first, (tensors.read(copy.name), value))
        return rearrange(value, first.pattern, **_axes(cfg, first))

    def read(path: str) -> np.ndarray:
        out = np.empty(specs[path].shape, np.float32)
        for index in places[path]:
            copy_transposed(part(path, index), out[index])
        return out

    return LazyArrays(tensors.where, specs, read, part)


def as_tensors(cfg: ModelConfig, table: Sequence[TensorName], params: LazyArrays) -> LazyArrays:
    """Arrays of our tree by dotted path -> tensors in torch layout, named as in `table`.

    Aliases are left out. Tensors of one array are adjacent, so that reading in order reads every
    array once, layer by layer where `params` supports it.

    Raises:
        ValueError: on the call, paths that are missing, unknown or of the wrong shape; on reading,
            values that are not finite.
    """
    shapes = array_shapes(cfg, table)
    lines = [
        f"  {path}: {_shape_of(params, path)}, expected {shapes.get(path, 'no such parameter')}"
        for path in [*shapes, *(path for path in params.specs if path not in shapes)]
        if path not in shapes or params.specs.get(path, ArraySpec(())).shape != shapes[path]
    ]
    _raise_list(params.where, "does not hold the parameters of this configuration", lines)
    rows = {entry.name: entry for entry in table if not entry.is_alias}
    order = {path: number for number, path in enumerate(shapes)}
    names = sorted(rows, key=lambda name: order[rows[name].path])
    part = parts(params)

    def read(name: str) -> np.ndarray:
        entry = rows[name]
        value = part(entry.path, entry.index)
        _check_finite(params.where, entry.path, value)
        left, right = entry.pattern.split("->")
        out = np.empty(torch_shape(cfg, entry), np.float32)
        copy_transposed(value, rearrange(out, f"{left} -> {right}", **_axes(cfg, entry)))
        return out

    return LazyArrays(
        params.where, {name: ArraySpec(torch_shape(cfg, rows[name])) for name in names}, read
    )


def parts(params: LazyArrays) -> Callable[[str, tuple[int, ...]], np.ndarray]:
    """(name, index of the leading axes) -> that part of an array.

    Where arrays can only be read whole, the last one is cached for its next part.
    """
    return params.slicer or _cached_slicer(params)


def _cached_slicer(params: LazyArrays) -> Callable[[str, tuple[int, ...]], np.ndarray]:
    cache: dict[str, np.ndarray] = {}
    lock = threading.Lock()

    def part(path: str, index: tuple[int, ...]) -> np.ndarray:
        with lock:
            if path not in cache:
                # Free the previous array first, so that two are never in memory.
                cache.clear()
                cache[path] = params.read(path)
            return cache[path][index]

    return part


def _axes(cfg: ModelConfig, entry: TensorName) -> dict[str, int]:
    return {letter: size for letter, size in sizes(cfg).items() if letter in entry.pattern}


def copy_transposed(source: np.ndarray, target: np.ndarray) -> None:
    """Copies `source` into `target`: equal shapes, but a different order of axes in memory.

    Copies a few rows of the source's slowest axis at a time, which is seven times as fast as one
    copy.
    """
    source, target = _merged(source, target)
    if source.ndim < 2:
        target[...] = source
        return
    axis = int(np.argmax(source.strides))
    source, target = np.moveaxis(source, axis, 0), np.moveaxis(target, axis, 0)
    for start in range(0, len(source), _ROWS):
        target[start : start + _ROWS] = source[start : start + _ROWS]


def _merged(*views: np.ndarray) -> tuple[np.ndarray, ...]:
    # Adjacent axes that are contiguous in every view, such as heads and channels, become one.
    shape = list(views[0].shape)
    for i in reversed(range(len(shape) - 1)):
        if all(view.strides[i] == view.strides[i + 1] * shape[i + 1] for view in views):
            shape[i : i + 2] = [shape[i] * shape[i + 1]]
            views = tuple(view.reshape(shape) for view in views)
    return views


def _check_fit(cfg: ModelConfig, table: Sequence[TensorName], tensors: LazyArrays) -> None:
    known = {entry.name: entry for entry in table}
    lines: list[str] = []
    groups: dict[str, list[TensorName]] = {}
    for entry in table:
        groups.setdefault(entry.canonical, []).append(entry)
    for canonical, group in groups.items():
        if not any(entry.name in tensors.specs for entry in group):
            shape = torch_shape(cfg, group[0])
            lines.append(f"  missing     {canonical} {shape} ({_our_name(group[0])})")
    for name, spec in tensors.specs.items():
        if name not in known:
            if not DERIVED.search(name):
                lines.append(f"  unexpected  {name} {spec.shape}{_nearest(name, known, lines)}")
        elif spec.shape != (shape := torch_shape(cfg, known[name])):
            ours = _our_name(known[name])
            lines.append(f"  misshapen   {name} {spec.shape}, expected {shape} ({ours})")
    problem = f"these tensors do not make a model with sharing={cfg.sharing!r}"
    _raise_list(tensors.where, f"{problem}, num_layers={cfg.num_layers}", lines)


def _nearest(name: str, known: Collection[str], lines: list[str]) -> str:
    # Further lines are not shown, and each search compares all names.
    if len(lines) >= _LISTED:
        return ""
    return f" (the nearest name is {difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]})"


def _raise_list(where: str, problem: str, lines: list[str]) -> None:
    if lines:
        more = [f"  ... and {len(lines) - _LISTED} more"] if len(lines) > _LISTED else []
        settings = "num_layers, hidden_size, num_heads, sharing, num_recursions, router"
        fix = f"Check {settings}, tie_embeddings"
        listed = "\n".join([*lines[:_LISTED], *more])
        raise ValueError(f"{where}: {problem}:\n{listed}\n{fix}")


def _our_name(entry: TensorName) -> str:
    return f"our {entry.path}{list(entry.index) if entry.index else ''}"


def _shape_of(params: LazyArrays, path: str) -> str:
    return str(params.specs[path].shape) if path in params.specs else "missing"


def _check_finite(where: str, name: str, value: np.ndarray) -> None:
    # A sum of squares is many times as fast and finite only if all values are. It may overflow,
    # hence the second test.
    flat = value.reshape(-1)
    if not np.isfinite(np.dot(flat, flat)) and not np.isfinite(value).all():
        bad = int(value.size - np.isfinite(value).sum())
        rule = f"{where} holds {bad} values that are NaN or infinite"
        fail(name, value.shape, rule, "Take an earlier checkpoint, from before the run diverged")


def _check_copy(
    where: str, copy: TensorName, first: TensorName, values: tuple[np.ndarray, np.ndarray]
) -> None:
    if np.array_equal(*values):
        return
    rule = f"in {where} differs from {first.name}, but both must hold the same weights"
    fix = "Set share_norms=False to keep one pair of norms per effective layer"
    if copy.name == HEAD:
        fix = "Set tie_embeddings=False; the reference's recursive class never ties them"
    elif ".self_attn." in copy.name:
        rule += (
            "; attention that differs between recursions comes from an older version of the"
            " reference, which rebuilt the attention of each recursion instead of sharing it"
        )
        fix = "This checkpoint is not a recursive model: train it again with shared attention"
    elif ".mlp." in copy.name:
        fix = "Check sharing and num_recursions; an unshared model needs sharing='none'"
    fail(copy.name, f"max difference {np.max(np.abs(values[0] - values[1])):.3g}", rule, fix)


def _check_count(cfg: ModelConfig, specs: dict[str, ArraySpec]) -> None:
    # Weights that are unintentionally unshared would show here.
    count = sum(int(np.prod(spec.shape)) for spec in specs.values())
    assert count == unique_parameters(cfg), (count, unique_parameters(cfg))
