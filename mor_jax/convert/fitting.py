"""Sizes that a configuration tells, compared with the tensors, before names are made of them.

A list of every tensor that does not fit says what is wrong with tensors. Where one setting is
wrong, it would name thousands; here that setting is named.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from mor_jax.checkpoint.lazy_arrays import LazyArrays
from mor_jax.config.parsing import check, fail
from mor_jax.convert.names import EMBEDDING

_STORED = re.compile(r"model\.(first|last|(?:layers|shared)\.\d+)\.(?:self_attn|mlp)\.")

# Settings of a Llama -> the end of a tensor's name and its axis that is as long.
_AXES = {
    "vocab_size": (EMBEDDING, 0),
    "hidden_size": (EMBEDDING, 1),
    "intermediate_size": (".mlp.gate_proj.weight", 0),
}


def check_sizes(hf: Mapping[str, Any], tensors: LazyArrays, where: str) -> None:
    """Raises `ValueError` naming the first size of `hf` that all its tensors contradict.

    Tensors that differ among themselves are left to the list of those that do not fit.
    """
    for setting, (end, axis) in _AXES.items():
        shapes = {name: spec.shape for name, spec in tensors.specs.items() if name.endswith(end)}
        found = {shape[axis] if len(shape) == 2 else None for shape in shapes.values()}
        if len(found) != 1 or None in found or found == {hf[setting]}:
            continue
        (size,) = found
        rule = f"{next(iter(shapes))} has {size} {'columns' if axis else 'rows'}"
        fix = f"If the weights are right, set {setting} to {size}; else take others"
        fail(f"{where}: {setting}", hf[setting], rule, fix)


def check_layers(key: str, value: Any, wanted: int, names: Iterable[str]) -> None:
    """Raises `ValueError` unless `names`, as Hugging Face has them, make `wanted` stored layers.

    key, value: of the setting to name.
    """
    stored = {found[1] for name in names if (found := _STORED.match(name))}
    rule = f"makes {wanted} stored layers, and the tensors make {len(stored)}"
    fix = "If the weights are whole, set it to their number; else copy or download them again"
    check(len(stored) == wanted, key, value, rule, fix)


def check_stored(key: str, value: Any, wanted: int, names: Iterable[str]) -> None:
    """Raises `ValueError` if there cannot be `wanted` stored layers under the reference's names.

    It may list a stored layer under several names, so there may be more. key, value: of the setting
    to name.
    """
    queries = sum(name.endswith(".self_attn.q_proj.weight") for name in names)
    rule = f"makes {wanted} stored layers, and the tensors have {queries} query projections"
    fix = "Check the sizes and the recursions in the YAML; else copy the weights again"
    check(queries >= wanted, key, value, rule, fix)
