"""Compares the sizes in a configuration with the tensors, before tensor names follow from them.

A wrong setting would otherwise show as a list of thousands of tensors that do not fit; these checks
name the setting instead.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from mor_jax.checkpoint.lazy_arrays import LazyArrays
from mor_jax.config.parsing import check, fail
from mor_jax.convert.names import EMBEDDING

_STORED = re.compile(r"model\.(first|last|(?:layers|shared)\.\d+)\.(?:self_attn|mlp)\.")

# Llama setting -> suffix of a tensor's name, and the axis of that size.
_AXES = {
    "vocab_size": (EMBEDDING, 0),
    "hidden_size": (EMBEDDING, 1),
    "intermediate_size": (".mlp.gate_proj.weight", 0),
}


def check_sizes(hf: Mapping[str, Any], tensors: LazyArrays, where: str) -> None:
    """Raises `ValueError` on the first size in `hf` that all of its tensors contradict.

    Tensors that disagree with each other are not reported here, but with the tensors that do not
    fit.
    """
    for setting, (suffix, axis) in _AXES.items():
        shapes = {name: spec.shape for name, spec in tensors.specs.items() if name.endswith(suffix)}
        sizes = {shape[axis] if len(shape) == 2 else None for shape in shapes.values()}
        if len(sizes) != 1 or None in sizes or sizes == {hf[setting]}:
            continue
        (size,) = sizes
        rule = f"{next(iter(shapes))} has {size} {'columns' if axis else 'rows'}"
        fix = f"If the weights are right, set {setting} to {size}; otherwise use other weights"
        fail(f"{where}: {setting}", hf[setting], rule, fix)


def check_layers(key: str, value: Any, expected: int, names: Iterable[str]) -> None:
    """Raises `ValueError` unless the Hugging Face names make `expected` stored layers.

    key, value: the setting to name in the message.
    """
    stored = {match[1] for name in names if (match := _STORED.match(name))}
    rule = f"makes {expected} stored layers, and the tensors make {len(stored)}"
    fix = "If the weights are complete, set it to match; otherwise copy or download them again"
    check(len(stored) == expected, key, value, rule, fix)


def check_reference_layers(key: str, value: Any, expected: int, names: Iterable[str]) -> None:
    """Raises `ValueError` if the reference's names make fewer than `expected` stored layers.

    The reference may list a stored layer under several names, so more names are fine. key, value:
    the setting to name in the message.
    """
    queries = sum(name.endswith(".self_attn.q_proj.weight") for name in names)
    rule = f"makes {expected} stored layers, and the tensors have {queries} query projections"
    fix = "Check the sizes and recursions in the YAML, or copy the weights again"
    check(queries >= expected, key, value, rule, fix)
