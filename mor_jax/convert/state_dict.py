"""State dict by reference name <-> parameter tree, along the rows of `names.entries`.

Nothing is dropped or guessed: an unknown name, a missing tensor, a wrong shape, or copies of a
shared weight that differ raise an error that names the tensor.
"""

import difflib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from einops import rearrange

from mor_jax.config import ModelConfig, check, fail
from mor_jax.convert.names import EMBEDDING, HEAD, Entry, entries, reference_shape, sizes
from mor_jax.parameters import unique_parameters
from mor_jax.types import Params

# Buffers that older checkpoints carry and that follow from the configuration.
DERIVED = re.compile(r"\.rotary_emb\.(inv_freq|cos_cached|sin_cached)$")


def to_params(cfg: ModelConfig, state: Mapping[str, Any]) -> Params:
    """State dict (anything `numpy.asarray` takes, by reference name) -> parameter tree, float32.

    A shared weight may appear under any or all of its names; copies must be identical.

    Raises:
        ValueError: a name that the model does not have, a missing tensor, a wrong shape, or
            copies of one shared weight that differ.
    """
    table = entries(cfg)
    _refuse_unknown(table, state)
    groups: dict[str, list[Entry]] = {}
    for entry in table:
        groups.setdefault(entry.canonical, []).append(entry)
    places: dict[str, dict[tuple[int, ...], np.ndarray]] = {}
    for canonical, group in groups.items():
        present = [entry for entry in group if entry.name in state]
        rule = f"the state dict lacks it; a model with sharing={cfg.sharing!r} needs this tensor"
        fix = "Check the configuration (layers, recursions, router, tie_embeddings)"
        check(bool(present), canonical, None, rule, fix)
        value = _tensor(cfg, present[0], state)
        for copy in present[1:]:
            _check_copy(copy, present[0], _tensor(cfg, copy, state), value)
        entry = group[0]
        axes = {letter: size for letter, size in sizes(cfg).items() if letter in entry.pattern}
        places.setdefault(entry.path, {})[entry.index] = rearrange(value, entry.pattern, **axes)
    params = _nest({path: _stack(parts) for path, parts in places.items()})
    _check_count(cfg, sum(array.size for _, array in _flatten(params)))
    return params


def from_params(cfg: ModelConfig, params: Params, *, aliases: bool = True) -> dict[str, np.ndarray]:
    """Parameter tree -> state dict by reference name, float32 in torch layout.

    Works on any tree of the same structure, such as gradients. `aliases`: also list the further
    names of shared weights, as the reference does (the same array object under each name).

    Raises:
        ValueError: a path that is missing, unknown, or of another shape than `cfg` implies.
    """
    flat = dict(_flatten(params))
    table = entries(cfg)
    paths = {entry.path for entry in table}
    for path in sorted(paths ^ flat.keys()):
        known = "the parameter tree lacks it" if path in paths else "unknown parameter"
        fail(path, None, known, f"This model has {sorted(paths)}")
    state: dict[str, np.ndarray] = {}
    for entry in table:
        if entry.is_alias:
            if aliases:
                state[entry.name] = state[entry.canonical]
            continue
        left, right = entry.pattern.split("->")
        axes = {letter: size for letter, size in sizes(cfg).items() if letter in entry.pattern}
        array = np.asarray(flat[entry.path], np.float32)[entry.index]
        state[entry.name] = rearrange(array, f"{right} -> {left}", **axes)
        _check_shape(cfg, entry, state[entry.name].shape)
    _check_count(cfg, sum(array.size for array in flat.values()))
    return state


def is_tied(state: Mapping[str, Any]) -> bool:
    """Whether the unembedding repeats the embedding; the tensors decide, not the configuration."""
    if HEAD not in state or EMBEDDING not in state:
        return True
    return bool(np.array_equal(np.asarray(state[HEAD]), np.asarray(state[EMBEDDING])))


def _tensor(cfg: ModelConfig, entry: Entry, state: Mapping[str, Any]) -> np.ndarray:
    value = np.asarray(state[entry.name], np.float32)
    _check_shape(cfg, entry, value.shape)
    return value


def _check_shape(cfg: ModelConfig, entry: Entry, shape: tuple[int, ...]) -> None:
    expected = reference_shape(cfg, entry)
    rule = f"must have shape {expected} ({entry.pattern.split('->')[0].strip()}), by the model's"
    fix = "Check width, heads, head_dim, mlp_width and vocab_size"
    check(shape == expected, entry.name, shape, f"{rule} configuration", fix)


def _check_copy(copy: Entry, first: Entry, value: np.ndarray, other: np.ndarray) -> None:
    if np.array_equal(value, other):
        return
    rule = f"differs from {first.name}, but both must hold the same weights"
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
    fail(copy.name, f"max difference {np.max(np.abs(value - other)):.3g}", rule, fix)


def _refuse_unknown(table: tuple[Entry, ...], state: Mapping[str, Any]) -> None:
    known = [entry.name for entry in table]
    for name in state:
        if name in known or DERIVED.search(name):
            continue
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        rule = "unknown tensor; the configured model has no such parameter"
        fix = f"The nearest name is {near}; check layers, sharing, recursions and router"
        fail(name, tuple(np.shape(state[name])), rule, fix)


def _check_count(cfg: ModelConfig, count: int) -> None:
    expected = unique_parameters(cfg)
    rule = f"a model of this configuration stores {expected} numbers, each shared one once"
    check(count == expected, "parameters", count, rule, "Check sharing and recursions")


def _stack(parts: dict[tuple[int, ...], np.ndarray]) -> np.ndarray:
    if () in parts:
        return np.ascontiguousarray(parts[()])
    lead = tuple(1 + max(places) for places in zip(*parts, strict=True))
    out = np.empty(lead + next(iter(parts.values())).shape, np.float32)
    for place, value in parts.items():
        out[place] = value
    return out


def _nest(flat: dict[str, np.ndarray]) -> Params:
    tree: Params = {}
    for path, value in flat.items():
        *parents, leaf = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def _flatten(tree: Params, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
