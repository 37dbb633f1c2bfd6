"""The rotary embedding that a Hugging Face config.json describes.

It is told in up to three places: `rope_theta` at the top, `rope_scaling` (releases of transformers
before 5) and `rope_parameters` (since). Where two of them say different things, releases take one
and are silent; here both are named and nothing is taken.
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
_KEEP = "Keep one of the two"


class _Told(NamedTuple):
    # What one group says. numbers: those that its kind needs, by their names there.
    theta: float
    kind: str
    numbers: dict[str, Any]


def rope(hf: Mapping[str, Any], where: str) -> tuple[float, RopeScaling]:
    """Base and scaling of the rotary embedding, as either generation of config.json tells them.

    Raises:
        ValueError: a kind of scaling that our models do not have, a number that is none, or two
            places that contradict each other; both are named with their values.
    """
    groups = {name: hf[name] for name in (_OLD, _NEW) if hf.get(name)}
    found = {name: _told(hf, group, where, name) for name, group in groups.items()}
    if not found:
        return _theta(hf, {}, where, _THETA), RopeScaling()
    told, *others = found.values()
    for other in others:
        _check_agree(told, other, where)
    if told.kind == "default":
        return told.theta, RopeScaling()
    name = next(iter(found))
    numbers = {
        "original_max_position_embeddings" if k == _ORIGINAL else k: v
        for k, v in told.numbers.items()
    }
    return told.theta, parse(RopeScaling, {"rope_type": told.kind} | numbers, f"{where}: {name}.")


def _told(hf: Mapping[str, Any], group: Any, where: str, name: str) -> _Told:
    key = f"{where}: {name}"
    ok = isinstance(group, Mapping)
    check(ok, key, group, "must be a group of settings", "Copy it again")
    for inner, value in group.items():
        rule = "are settings for some of the layers, and our layers turn alike"
        ok = not isinstance(value, Mapping)
        check(ok, f"{key}.{inner}", value, rule, "This model cannot be converted exactly")
    theta = _theta(hf, group, where, f"{name}.{_THETA}")
    part = group.get(_PART)
    rule = "our models turn whole heads"
    check(part is None or part == 1, f"{key}.{_PART}", part, rule, "Use 1")
    kind = _kind(group, key)
    if kind == "default":
        _check_idle(group, key)
    else:
        group = _with_original(hf, group, where, name)
    missing = [needed for needed in _NEEDED[kind] if group.get(needed) is None]
    check(not missing, key, missing, f"lacks these numbers of {kind} scaling", "Add them")
    return _Told(theta, kind, {needed: group[needed] for needed in _NEEDED[kind]})


def _theta(hf: Mapping[str, Any], group: Mapping[str, Any], where: str, inner: str) -> float:
    """The base: that of the group, or that beside it, or what transformers assumes."""
    pairs = [(_THETA, hf.get(_THETA)), (inner, group.get(_THETA))]
    told = [(key, value) for key, value in pairs if value is not None]
    for key, value in told:
        rule = "must be a number above 0, the base of the rotary frequencies"
        ok = type(value) in (int, float) and 0 < value <= sys.float_info.max
        check(ok, f"{where}: {key}", value, rule, "Most models have 10000.0; copy it again")
    values = [float(value) for _, value in told]
    rule = f"is told twice: {_THETA}={hf.get(_THETA)!r} stands beside it"
    check(len(set(values)) < 2, f"{where}: {inner}", group.get(_THETA), rule, _KEEP)
    null = not values and (_THETA in hf or _THETA in group)
    check(not null, f"{where}: {inner}", None, "must be a number", "Most models have 10000.0")
    return values[0] if values else 10000.0


def _kind(group: Mapping[str, Any], key: str) -> str:
    told = {name: group[name] for name in ("rope_type", "type") if name in group}
    for name, kind in told.items():
        rule = f"only {', '.join(_KINDS)} are computed here"
        fix = "This model cannot be converted exactly"
        check(kind in _KINDS, f"{key}.{name}", kind, rule, fix)
    rule = f"is told twice: rope_type={group.get('rope_type')!r} stands beside it"
    check(len(set(told.values())) < 2, f"{key}.type", group.get("type"), rule, _KEEP)
    return next(iter(told.values()), "default")


def _check_idle(group: Mapping[str, Any], key: str) -> None:
    """Raises `ValueError` on numbers that nothing uses: whoever wrote them meant a scaling."""
    names = set(group) - {"rope_type", "type", _THETA, _PART}
    idle = {name: group[name] for name in sorted(names) if group[name] is not None}
    if idle.get("factor") == 1:
        del idle["factor"]
    typed = "rope_type" in group or "type" in group
    rule = "is told with rope_type='default', which scales nothing"
    rule = rule if typed else "is told without a rope_type; transformers would not scale then"
    fix = "Name the kind of scaling as rope_type, or take the numbers out"
    first = next(iter(idle), "factor")
    check(not idle, f"{key}.{first}", idle.get(first), rule, fix)


def _with_original(
    hf: Mapping[str, Any], group: Mapping[str, Any], where: str, name: str
) -> Mapping[str, Any]:
    # transformers takes the one beside the group, whatever is inside.
    beside, inside = hf.get(_ORIGINAL), group.get(_ORIGINAL)
    rule = f"is told twice: {_ORIGINAL}={beside!r} stands beside it"
    ok = None in (beside, inside) or beside == inside
    check(ok, f"{where}: {name}.{_ORIGINAL}", inside, rule, _KEEP)
    return group if beside is None else {**group, _ORIGINAL: beside}


def _check_agree(old: _Told, new: _Told, where: str) -> None:
    """Raises `ValueError` unless `rope_scaling` and `rope_parameters` say the same."""
    pairs = {_THETA: (old.theta, new.theta), "rope_type": (old.kind, new.kind)}
    if old.kind == new.kind:
        pairs |= {name: (old.numbers[name], new.numbers[name]) for name in old.numbers}
    for name, (first, second) in pairs.items():
        rule = (
            f"contradicts {_NEW}, where {name} is {second!r}; "
            f"transformers takes {_OLD} and drops {_NEW}"
        )
        check(first == second, f"{where}: {_OLD}.{name}", first, rule, _KEEP)
