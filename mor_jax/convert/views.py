"""Foreign tensors seen as our parameters, and our parameters seen as foreign tensors.

Both are views along the rows of a table of `names`: nothing is read before it is asked for, and no
more than one array of ours is held. Nothing is dropped or guessed: what does not fit is listed
whole, with their names and ours, before the first value is read.
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

# Buffers that older checkpoints carry and that follow from the configuration.
DERIVED = re.compile(r"\.rotary_emb\.(inv_freq|cos_cached|sin_cached)$")

_LISTED = 100
"""Tensors that a message names at most."""

_ROWS = 16
"""Rows turned at one time: so many cache lines stay in reach while columns are written."""


def as_params(cfg: ModelConfig, table: Sequence[TensorName], tensors: LazyArrays) -> LazyArrays:
    """Tensors in torch layout, named as in `table` -> arrays of our tree by dotted path, float32.

    A shared weight may appear under any or all of its names; reading it compares the copies.

    Raises:
        ValueError: here, a list of the tensors that are missing, unknown or of another shape (the
            first 100 of them); on reading, copies of one shared weight that differ, or values that
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
            turn(part(path, index), out[index])
        return out

    return LazyArrays(tensors.where, specs, read, part)


def as_tensors(cfg: ModelConfig, table: Sequence[TensorName], params: LazyArrays) -> LazyArrays:
    """Arrays of our tree by dotted path -> tensors in torch layout, named as in `table`.

    Aliases are left out. Tensors of one array follow each other: read in that order, every array
    is read once, layer by layer where `params` can.

    Raises:
        ValueError: here, a list of every path that is missing, unknown or of another shape; on
            reading, values that are not finite.
    """
    shapes = array_shapes(cfg, table)
    lines = [
        f"  {path}: {_shown(params, path)}, expected {shapes.get(path, 'no such parameter')}"
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
        place = part(entry.path, entry.index)
        _check_finite(params.where, entry.path, place)
        left, right = entry.pattern.split("->")
        out = np.empty(torch_shape(cfg, entry), np.float32)
        turn(place, rearrange(out, f"{left} -> {right}", **_axes(cfg, entry)))
        return out

    return LazyArrays(
        params.where, {name: ArraySpec(torch_shape(cfg, rows[name])) for name in names}, read
    )


def parts(params: LazyArrays) -> Callable[[str, tuple[int, ...]], np.ndarray]:
    """(name, index of the leading axes) -> that part of an array.

    Of arrays that can only be read whole the last one stays, for its next part.
    """
    return params.slicer or _whole_first(params)


def _whole_first(params: LazyArrays) -> Callable[[str, tuple[int, ...]], np.ndarray]:
    held: dict[str, np.ndarray] = {}
    lock = threading.Lock()

    def part(path: str, index: tuple[int, ...]) -> np.ndarray:
        with lock:
            if path not in held:
                # The one before goes first, so that two are never held.
                held.clear()
                held[path] = params.read(path)
            return held[path][index]

    return part


def _axes(cfg: ModelConfig, entry: TensorName) -> dict[str, int]:
    return {letter: size for letter, size in sizes(cfg).items() if letter in entry.pattern}


def turn(source: np.ndarray, target: np.ndarray) -> None:
    """Copies `source` into `target`: views of one shape whose axes lie differently in memory.

    A few of the source's slowest rows at a time, which is seven times as fast as all at once.
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
    # Axes that lie one inside the other in all of them, such as heads and channels, become one.
    shape = list(views[0].shape)
    for i in reversed(range(len(shape) - 1)):
        if all(view.strides[i] == view.strides[i + 1] * shape[i + 1] for view in views):
            shape[i : i + 2] = [shape[i] * shape[i + 1]]
            views = tuple(view.reshape(shape) for view in views)
    return views


def _check_fit(cfg: ModelConfig, table: Sequence[TensorName], tensors: LazyArrays) -> None:
    known = {entry.name: entry for entry in table}
    lines: list[str] = []
    lacking: dict[str, list[TensorName]] = {}
    for entry in table:
        lacking.setdefault(entry.canonical, []).append(entry)
    for canonical, group in lacking.items():
        if not any(entry.name in tensors.specs for entry in group):
            shape = torch_shape(cfg, group[0])
            lines.append(f"  missing     {canonical} {shape} ({_ours(group[0])})")
    for name, spec in tensors.specs.items():
        if name not in known:
            if not DERIVED.search(name):
                lines.append(f"  unexpected  {name} {spec.shape}{_nearest(name, known, lines)}")
        elif spec.shape != (shape := torch_shape(cfg, known[name])):
            ours = _ours(known[name])
            lines.append(f"  misshapen   {name} {spec.shape}, expected {shape} ({ours})")
    told = (
        f"these tensors do not make a model with sharing={cfg.sharing!r}, layers={cfg.num_layers}"
    )
    _raise_list(tensors.where, told, lines)


def _nearest(name: str, known: Collection[str], lines: list[str]) -> str:
    # Nobody reads more of them, and each costs a look at all names.
    if len(lines) >= _LISTED:
        return ""
    return f" (the nearest name is {difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]})"


def _raise_list(where: str, told: str, lines: list[str]) -> None:
    if lines:
        more = [f"  ... and {len(lines) - _LISTED} more"] if len(lines) > _LISTED else []
        fix = "Check layers, width, heads, sharing, recursions, router, tie_embeddings"
        listed = "\n".join([*lines[:_LISTED], *more])
        raise ValueError(f"{where}: {told}:\n{listed}\n{fix}")


def _ours(entry: TensorName) -> str:
    return f"our {entry.path}{list(entry.index) if entry.index else ''}"


def _shown(params: LazyArrays, path: str) -> str:
    return str(params.specs[path].shape) if path in params.specs else "missing"


def _check_finite(where: str, name: str, value: np.ndarray) -> None:
    # A sum of squares is many times as fast, and finite only if all values are; it may overflow.
    flat = value.reshape(-1)
    if not np.isfinite(np.dot(flat, flat)) and not np.isfinite(value).all():
        bad = int(value.size - np.isfinite(value).sum())
        rule = f"{where} holds {bad} values there that are NaN or infinite"
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
        fix = "Such a checkpoint is no recursive model: train it again with shared attention"
    elif ".mlp." in copy.name:
        fix = "Check sharing and recursions; as a plain model it needs sharing='none'"
    fail(copy.name, f"max difference {np.max(np.abs(values[0] - values[1])):.3g}", rule, fix)


def _check_count(cfg: ModelConfig, specs: dict[str, ArraySpec]) -> None:
    # Weight sharing that silently came apart would show here first.
    count = sum(int(np.prod(spec.shape)) for spec in specs.values())
    assert count == unique_parameters(cfg), (count, unique_parameters(cfg))
