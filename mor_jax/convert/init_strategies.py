"""Which layers of a plain model become the layers of a recursive one (paper section 2.1).

A plain model of L layers turns into d slots that run Nr times (and, in the middle variants, its
first and last layer). A strategy names the source layers of each slot; `average` has several.
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
    """Sources of a recursive model in the plain one.

    kept: the plain model's layer that stands at each effective layer before sharing; shorter than
        the plain model where its layer count does not fit the scheme.
    slots: source layers of each shared slot; more than one are averaged.
    order: the slot of each effective layer of the shared block.
    ends: the first and the last layer, for the middle variants.
    """

    kept: tuple[int, ...]
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
    """Sources for `sharing` with `recursions` recursions, from a plain model of `layers` layers.

    A count that does not fit first shrinks: as many evenly spaced layers as fit are kept. Among
    those: stepwise: evenly spaced, ends included. lower, upper: the first or last d. random: d
    sorted draws without replacement. average: the mean of the layers that share a slot.

    Raises:
        ValueError: too few layers for one per recursion, or a scheme that shares nothing.
    """
    rule = "must repeat layers"
    check(sharing != "none", "sharing", sharing, rule, "Try 'middle_cycle'")
    middle = sharing.startswith("middle")
    low, high = int(middle), layers - 1 - int(middle)
    depth = (high - low + 1) // recursions
    rule = f"{sharing} with recursions={recursions} needs {2 * middle} + {recursions} layers"
    check(depth > 0, "layers", layers, rule, "Use a deeper model or fewer recursions")
    kept = _spread(low, high, depth * recursions)
    kept = (0, *kept, layers - 1) if middle else kept
    inner = kept[1:-1] if middle else kept
    sequence = sharing.endswith("sequence")
    order = [i // recursions if sequence else i % depth for i in range(len(inner))]
    slots: Sequence[tuple[int, ...]]
    if strategy == "average":
        pairs = list(zip(inner, order, strict=True))
        slots = [tuple(layer for layer, slot in pairs if slot == s) for s in range(depth)]
    else:
        # Places count the first layer in: halves round to even places, so the offset matters.
        last = int(middle) + len(inner) - 1
        slots = [(kept[i],) for i in _pick(strategy, int(middle), last, depth, seed)]
    ends = (0, layers - 1) if middle else None
    return Selection(kept, tuple(slots), tuple(order), ends)


def _spread(low: int, high: int, count: int) -> tuple[int, ...]:
    # Halves go to the even neighbour, as Python's round does it.
    return tuple(round(float(place)) for place in np.linspace(low, high, count))


def _pick(strategy: Strategy, low: int, high: int, depth: int, seed: int) -> tuple[int, ...]:
    if strategy == "lower":
        return tuple(range(low, low + depth))
    if strategy == "upper":
        return tuple(range(high - depth + 1, high + 1))
    if strategy == "random":
        draws = np.random.default_rng(seed).choice(high - low + 1, depth, replace=False)
        return tuple(int(low + draw) for draw in np.sort(draws))
    return _spread(low, high, depth)


def share_layers(plain: LazyArrays, cfg: ModelConfig, selection: Selection) -> LazyArrays:
    """Parameters of the recursive model `cfg`, without routers, from those of a plain model.

    plain: arrays by dotted path, among them the stacks `layers.*`. What is made of one stack
    follows each other, so that each is read once. With unshared norms each effective layer takes
    those of the layer that stood in its place.

    Raises:
        ValueError: `selection` makes another number of layers than `cfg` has.
    """
    made = len(selection.effective)
    rule = f"the selection makes {made} layers"
    fix = f"Set layers={made}, sharing and recursions as in the selection"
    check(made == cfg.num_layers, "layers", cfg.num_layers, rule, fix)
    part = parts(plain)
    specs: dict[str, ArraySpec] = {}
    places: dict[str, tuple[str, list[tuple[int, ...]]]] = {}
    for name, spec in plain.specs.items():
        stack, _, leaf = name.partition(".")
        if stack != "layers":
            specs[name] = ArraySpec(spec.shape)
            continue
        for new, sources, leading in _stacks(cfg, selection, leaf):
            specs[f"{new}.{leaf}"] = ArraySpec((*leading, *spec.shape[1:]))
            places[f"{new}.{leaf}"] = name, sources

    def read(name: str) -> np.ndarray:
        if name not in places:
            return plain.read(name)
        stack, sources = places[name]
        means = [_mean([part(stack, (layer,)) for layer in layers]) for layers in sources]
        return np.stack(means).reshape(specs[name].shape)

    return LazyArrays(plain.where, specs, read)


def _stacks(
    cfg: ModelConfig, selection: Selection, leaf: str
) -> Iterator[tuple[str, list[tuple[int, ...]], tuple[int, ...]]]:
    # (stack, source layers of each of its places in order, leading axes), made of `layers.<leaf>`.
    first, last = selection.ends or (None, None)
    if first is not None:
        yield "first", [(first,)], (1,)
    if leaf.startswith("norm") and not cfg.share_norms:
        inner = selection.kept if selection.ends is None else selection.kept[1:-1]
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
