"""Reads the rotary embedding from a Hugging Face config.json.

Up to three places describe it: `rope_theta` at the top level, `rope_scaling` (transformers before
5) and `rope_parameters` (since 5). Where they contradict each other, transformers silently uses one
of them; here it is an error that names both.
"""

import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from mor_jax.config import RopeScaling
from mor_jax.config.parsing import check, parse

_KINDS = ("default", "linear", "llama3")
_ORIGINAL = "original_max_position_embeddings"
_NEEDED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL),
}
_OLD, _NEW, _THETA, _PART = "rope_scaling", "rope_parameters", "rope_theta", "partial_rotary_factor"
_KEEP_ONE = "Keep one of the two"


class _Rope(NamedTuple):
    # One group's description. numbers: the parameters of its kind, by their names in the group.
    theta: float
    kind: str
    numbers: dict[str, Any]


def rope(hf: Mapping[str, Any], where: str) -> tuple[float, RopeScaling]:
    """Base and scaling of the rotary embedding, from either format of config.json.

    Raises:
        ValueError: an unsupported kind of scaling, an invalid number, or two places that contradict
            each other (both are named with their values).
    """
    groups = {name: hf[name] for name in (_OLD, _NEW) if hf.get(name)}
    ropes = {name: _parse(hf, group, where, name) for name, group in groups.items()}
    if not ropes:
        return _theta(hf, {}, where, _THETA), RopeScaling()
    first, *others = ropes.values()
    for other in others:
        _check_agree(first, other, where)
    if first.kind == "default":
        return first.theta, RopeScaling()
    name = next(iter(ropes))
    numbers = {
        "original_max_position_embeddings" if k == _ORIGINAL else k: v
        for k, v in first.numbers.items()
    }
    return first.theta, parse(RopeScaling, {"rope_type": first.kind} | numbers, f"{where}: {name}.")


def _parse(hf: Mapping[str, Any], group: Any, where: str, name: str) -> _Rope:
    key = f"{where}: {name}"
    check(isinstance(group, Mapping), key, group, "must be a group of settings", "Copy it again")
    for inner, value in group.items():
        rule = "are settings of single layers, and our layers share one rotary embedding"
        valid = not isinstance(value, Mapping)
        check(valid, f"{key}.{inner}", value, rule, "This model cannot be converted exactly")
    theta = _theta(hf, group, where, f"{name}.{_THETA}")
    part = group.get(_PART)
    rule = "our models rotate all channels of a head"
    check(part is None or part == 1, f"{key}.{_PART}", part, rule, "Use 1")
    kind = _kind(group, key)
    if kind == "default":
        _check_unused(group, key)
    else:
        group = _with_original(hf, group, where, name)
    missing = [needed for needed in _NEEDED[kind] if group.get(needed) is None]
    check(not missing, key, missing, f"lacks these numbers of {kind} scaling", "Add them")
    return _Rope(theta, kind, {needed: group[needed] for needed in _NEEDED[kind]})


def _theta(hf: Mapping[str, Any], group: Mapping[str, Any], where: str, inner: str) -> float:
    """The base: from the group, from beside it, or the default of transformers."""
    pairs = [(_THETA, hf.get(_THETA)), (inner, group.get(_THETA))]
    given = [(key, value) for key, value in pairs if value is not None]
    for key, value in given:
        rule = "must be a number above 0, the base of the rotary frequencies"
        valid = type(value) in (int, float) and 0 < value <= sys.float_info.max
        check(valid, f"{where}: {key}", value, rule, "Most models have 10000.0; copy it again")
    values = [float(value) for _, value in given]
    rule = f"is given twice: {_THETA}={hf.get(_THETA)!r} at the top level differs"
    check(len(set(values)) < 2, f"{where}: {inner}", group.get(_THETA), rule, _KEEP_ONE)
    null = not values and (_THETA in hf or _THETA in group)
    check(not null, f"{where}: {inner}", None, "must be a number", "Most models have 10000.0")
    return values[0] if values else 10000.0


def _kind(group: Mapping[str, Any], key: str) -> str:
    kinds = {name: group[name] for name in ("rope_type", "type") if name in group}
    for name, kind in kinds.items():
        rule = f"supported kinds are {', '.join(_KINDS)}"
        fix = "This model cannot be converted exactly"
        check(kind in _KINDS, f"{key}.{name}", kind, rule, fix)
    rule = f"is given twice: rope_type={group.get('rope_type')!r} differs"
    check(len(set(kinds.values())) < 2, f"{key}.type", group.get("type"), rule, _KEEP_ONE)
    return next(iter(kinds.values()), "default")


def _check_unused(group: Mapping[str, Any], key: str) -> None:
    """Raises `ValueError` on numbers without effect: they suggest that a scaling was intended."""
    names = set(group) - {"rope_type", "type", _THETA, _PART}
    unused = {name: group[name] for name in sorted(names) if group[name] is not None}
    if unused.get("factor") == 1:
        del unused["factor"]
    typed = "rope_type" in group or "type" in group
    rule = "has no effect with rope_type='default'"
    rule = rule if typed else "has no effect without a rope_type; transformers does not scale then"
    fix = "Name the kind of scaling as rope_type, or remove the numbers"
    first = next(iter(unused), "factor")
    check(not unused, f"{key}.{first}", unused.get(first), rule, fix)


def _with_original(
    hf: Mapping[str, Any], group: Mapping[str, Any], where: str, name: str
) -> Mapping[str, Any]:
    # transformers prefers the value beside the group over the one inside.
    beside, inside = hf.get(_ORIGINAL), group.get(_ORIGINAL)
    rule = f"is given twice: {_ORIGINAL}={beside!r} at the top level differs"
    valid = None in (beside, inside) or beside == inside
    check(valid, f"{where}: {name}.{_ORIGINAL}", inside, rule, _KEEP_ONE)
    return group if beside is None else {**group, _ORIGINAL: beside}


def _check_agree(old: _Rope, new: _Rope, where: str) -> None:
    """Raises `ValueError` unless `rope_scaling` and `rope_parameters` agree."""
    pairs = {_THETA: (old.theta, new.theta), "rope_type": (old.kind, new.kind)}
    if old.kind == new.kind:
        pairs |= {name: (old.numbers[name], new.numbers[name]) for name in old.numbers}
    for name, (first, second) in pairs.items():
        rule = (
            f"contradicts {_NEW}, where {name} is {second!r}; "
            f"transformers uses {_OLD} and ignores {_NEW}"
        )
        check(first == second, f"{where}: {_OLD}.{name}", first, rule, _KEEP_ONE)
