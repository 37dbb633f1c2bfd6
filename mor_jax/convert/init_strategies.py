"""Initialises the shared layers of a recursive model from a vanilla one (paper section 2.1).

L layers become d shared slots that run Nr times (plus the first and the last layer in the middle
variants). A strategy selects the source layers of each slot; `average` takes several per slot.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal, get_args

import numpy as np

from mor_jax.checkpoint.lazy_arrays import ArraySpec, LazyArrays
from mor_jax.config import ModelConfig, Sharing
from mor_jax.config.parsing import check
from mor_jax.convert.views import parts

Strategy = Literal["stepwise", "average", "lower", "upper", "random"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which layers of a vanilla model the layers of a recursive one come from.

    source_layers: the vanilla layer at the position of each effective layer; fewer than the
        vanilla model has where its layer count does not fit the scheme.
    slots: source layers of each shared slot; several are averaged.
    order: the slot of each effective layer of the shared block.
    ends: the first and the last layer, for the middle variants, else None.
    """

    source_layers: tuple[int, ...]
    slots: tuple[tuple[int, ...], ...]
    order: tuple[int, ...]
    ends: tuple[int, int] | None

    @property
    def effective(self) -> tuple[tuple[int, ...], ...]:
        """Source layers of every effective layer, from the first to the last."""
        inner = tuple(self.slots[slot] for slot in self.order)
        if self.ends is None:
            return inner
        return ((self.ends[0],), *inner, (self.ends[1],))


def select_layers(
    sharing: Sharing, layers: int, recursions: int, strategy: Strategy, seed: int = 0
) -> Selection:
    """Source layers for `sharing` with `recursions` recursions, from a model of `layers` layers.

    If the layer count does not fit the scheme, as many evenly spaced layers as fit are used. Among
    these, the strategies select: stepwise: evenly spaced, ends included. lower, upper: the first
    or last d. random: d sorted samples without replacement. average: the mean of the layers that
    share a slot.

    Raises:
        ValueError: fewer layers than one per recursion, or `sharing` is none.
    """
    rule = "must be a scheme that shares layers"
    check(sharing != "none", "sharing", sharing, rule, "Try 'middle_cycle'")
    middle = sharing.startswith("middle")
    low, high = int(middle), layers - 1 - int(middle)
    depth = (high - low + 1) // recursions
    rule = f"{sharing} with recursions={recursions} needs {2 * middle} + {recursions} layers"
    check(depth > 0, "layers", layers, rule, "Use a deeper model or fewer recursions")
    inner = _evenly_spaced(low, high, depth * recursions)
    source_layers = (0, *inner, layers - 1) if middle else inner
    sequence = sharing.endswith("sequence")
    order = [i // recursions if sequence else i % depth for i in range(len(inner))]
    slots: Sequence[tuple[int, ...]]
    if strategy == "average":
        pairs = list(zip(inner, order, strict=True))
        slots = [tuple(layer for layer, slot in pairs if slot == s) for s in range(depth)]
    else:
        # Positions include the first layer: halves round to even positions, so the offset matters.
        last = int(middle) + len(inner) - 1
        slots = [(source_layers[i],) for i in _pick(strategy, int(middle), last, depth, seed)]
    ends = (0, layers - 1) if middle else None
    return Selection(source_layers, tuple(slots), tuple(order), ends)


def _evenly_spaced(low: int, high: int, count: int) -> tuple[int, ...]:
    # Python's round takes halves to the even neighbour, as the reference does.
    return tuple(round(float(position)) for position in np.linspace(low, high, count))


def _pick(strategy: Strategy, low: int, high: int, depth: int, seed: int) -> tuple[int, ...]:
    if strategy == "lower":
        return tuple(range(low, low + depth))
    if strategy == "upper":
        return tuple(range(high - depth + 1, high + 1))
    if strategy == "random":
        offsets = np.random.default_rng(seed).choice(high - low + 1, depth, replace=False)
        return tuple(int(low + offset) for offset in np.sort(offsets))
    return _evenly_spaced(low, high, depth)


def share_layers(vanilla: LazyArrays, cfg: ModelConfig, selection: Selection) -> LazyArrays:
    """Parameters of the recursive model `cfg`, without routers, from those of a vanilla model.

    vanilla: arrays by dotted path, among them the stacks `layers.*`. Arrays made from one stack
    are adjacent, so that it is read once. With unshared norms, each effective layer takes the norms
    of the vanilla layer at its position.

    Raises:
        ValueError: `selection` yields a different number of layers than `cfg` has.
    """
    count = len(selection.effective)
    rule = f"the selection makes {count} layers"
    fix = f"Set num_layers={count}, sharing and num_recursions as in the selection"
    check(count == cfg.num_layers, "num_layers", cfg.num_layers, rule, fix)
    part = parts(vanilla)
    specs: dict[str, ArraySpec] = {}
    places: dict[str, tuple[str, list[tuple[int, ...]]]] = {}
    for name, spec in vanilla.specs.items():
        stack, _, leaf = name.partition(".")
        if stack != "layers":
            specs[name] = ArraySpec(spec.shape)
            continue
        for new, sources, leading in _stacks(cfg, selection, leaf):
            specs[f"{new}.{leaf}"] = ArraySpec((*leading, *spec.shape[1:]))
            places[f"{new}.{leaf}"] = name, sources

    def read(name: str) -> np.ndarray:
        if name not in places:
            return vanilla.read(name)
        stack, sources = places[name]
        means = [_mean([part(stack, (layer,)) for layer in layers]) for layers in sources]
        return np.stack(means).reshape(specs[name].shape)

    return LazyArrays(vanilla.where, specs, read)


def _stacks(
    cfg: ModelConfig, selection: Selection, leaf: str
) -> Iterator[tuple[str, list[tuple[int, ...]], tuple[int, ...]]]:
    # (stack, source layers of each of its layers, leading axes), made from `layers.<leaf>`.
    first, last = selection.ends or (None, None)
    if first is not None:
        yield "first", [(first,)], (1,)
    if leaf.startswith("norm") and not cfg.share_norms:
        inner = selection.source_layers
        inner = inner if selection.ends is None else inner[1:-1]
        places = np.asarray(inner).reshape(cfg.num_recursions, cfg.shared_layers).T
        if cfg.is_sequence:
            places = np.asarray(inner).reshape(cfg.shared_layers, cfg.num_recursions)
        yield "shared", [(int(layer),) for layer in places.ravel()], places.shape
    else:
        yield "shared", list(selection.slots), (len(selection.slots),)
    if last is not None:
        yield "last", [(last,)], (1,)


def _mean(layers: list[np.ndarray]) -> np.ndarray:
    if len(layers) == 1:
        return layers[0]
    return np.mean(layers, axis=0, dtype=np.float64).astype(np.float32)
