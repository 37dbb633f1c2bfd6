"""The optimiser: AdamW, its learning-rate schedule, decay and clipping by parameter path.

One gradient transformation does clipping, moments, decay and the schedule, so that XLA makes one
pass over each array. Its state is a plain nested dictionary (`count`, `mu`, `nu`), which a
checkpoint holds as it is. The auxiliary router (`router.aux`) trains apart: `aux_router_lr_ratio`
times the learning rate, clipped by its own norm, and left out of the norm of the rest.
"""

import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mor_jax.config import OptimConfig
from mor_jax.models.params import paths
from mor_jax.types import Array, Float, Params

Group = Literal["main", "aux", "frozen"]


class Norms(NamedTuple):
    """Global gradient norms before clipping, float32 scalars. `aux` is 0 without such a router."""

    main: Float[Array, ""]
    aux: Float[Array, ""]


def schedule(cfg: OptimConfig, steps: int) -> optax.Schedule:
    """Learning rate used by the update at 0-based step index s of a run of `steps` steps.

    trapezoid: s / warmup_steps, then 1, then a line that starts at `steps - decay_steps` and
    reaches `final_lr_ratio` at index `steps` (the recipe of the paper's authors). The first
    update therefore has rate 0, and the last is one step short of the end of the line.
    cosine: the same warm-up, then half a cosine from 1 to `final_lr_ratio` at index `steps`.
    constant: the same warm-up, then 1.
    """
    decay = {"trapezoid": cfg.decay_steps, "cosine": steps - cfg.warmup_steps, "constant": 0}
    span = decay[cfg.schedule]

    def learning_rate(step: Any) -> Float[Array, ""]:
        s = jnp.asarray(step, jnp.float32)
        warm = jnp.minimum(s / max(cfg.warmup_steps, 1), 1.0) if cfg.warmup_steps else 1.0
        done = jnp.clip((s - (steps - span)) / max(span, 1), 0.0, 1.0) if span else jnp.zeros(())
        left = 0.5 * (1 + jnp.cos(jnp.pi * done)) if cfg.schedule == "cosine" else 1 - done
        return cfg.lr * warm * (cfg.final_lr_ratio + (1 - cfg.final_lr_ratio) * left)

    return learning_rate


def group(path: str) -> Group:
    """Group of the parameter at dotted `path`: aux router, frozen (moved by no gradient), main."""
    if path.startswith("router.aux."):
        return "aux"
    return "frozen" if path == "router.bias" else "main"


def decays(path: str) -> bool:
    """Whether weight decay applies: to all parameters but norms and the router's bias."""
    norm = path.rsplit(".", 1)[-1] == "scale"
    return not norm and group(path) != "frozen"


def global_norms(grads: Params) -> Norms:
    """Norms of the two groups. Inside one jit XLA shares them with the optimiser's own."""
    squares = {"main": jnp.zeros(()), "aux": jnp.zeros(())}
    for path, grad in zip(paths(grads), jax.tree.leaves(grads), strict=True):
        kind = group(path)
        if kind != "frozen":
            squares[kind] += jnp.sum(jnp.square(grad.astype(jnp.float32)))
    return Norms(main=jnp.sqrt(squares["main"]), aux=jnp.sqrt(squares["aux"]))


def make_optimizer(
    cfg: OptimConfig, steps: int, params: Params
) -> optax.GradientTransformationExtraArgs:
    """AdamW for parameters of the structure of `params` (arrays or ShapeDtypeStructs).

    `update(grads, state, params, ok=None)` needs `params` (decay). If the boolean scalar `ok`
    is False (a loss or a norm that is not finite), the updates are 0 and the state is unchanged,
    whatever the gradients. Moments are float32 and shaped like the parameters; `count` is the
    number of updates applied (int32), which is also the index into the schedule. Raises
    `ValueError` when `grads` hold other parameters than `params` did.
    """
    names = paths(params)
    rate_of = schedule(cfg, steps)
    structure = jax.tree.structure(params)

    def init(params: Params) -> dict[str, Any]:
        zeros = functools.partial(jax.tree.map, lambda p: jnp.zeros_like(p, jnp.float32))
        return {"count": jnp.zeros((), jnp.int32), "mu": zeros(params), "nu": zeros(params)}

    def update(
        grads: Params, state: Any, params: Params | None = None, *, ok: Any = None, **_: Any
    ) -> tuple[Params, Any]:
        if params is None or jax.tree.structure(grads) != structure:
            raise ValueError(
                f"optimiser: made for the parameters {names}, got gradients of {paths(grads)} and "
                f"params={'None' if params is None else 'given'}. Pass both, of one structure"
            )
        ok = jnp.bool_(True) if ok is None else ok
        lr = rate_of(state["count"])
        scalars = _scalars(cfg, global_norms(grads), state["count"] + 1, lr, ok)
        trees = map(jax.tree.leaves, (grads, state["mu"], state["nu"], params))
        new = [
            _adamw(scalars[group(name)], cfg.weight_decay * decays(name), *arrays)
            for name, *arrays in zip(names, *trees, strict=True)
        ]
        updates, mu, nu = (structure.unflatten(leaves) for leaves in zip(*new, strict=True))
        return updates, {"count": state["count"] + ok, "mu": mu, "nu": nu}

    return optax.GradientTransformationExtraArgs(init, update)


class _Scalars(NamedTuple):
    # What an update of one group of arrays needs, bias corrections included. A step that is to
    # change nothing is expressed here (rates 0, moments kept), because selecting between old and
    # new arrays afterwards would triple the cost of the optimiser.
    ok: Any
    clip: Any
    b1: Any
    b2: Any
    rate: Any
    root: Any
    eps: float
    decay: Any


def _scalars(cfg: OptimConfig, norms: Norms, count: Any, lr: Any, ok: Any) -> dict[Group, _Scalars]:
    b1, b2 = jnp.where(ok, cfg.b1, 1.0), jnp.where(ok, cfg.b2, 1.0)
    root = jax.lax.rsqrt(_correction(cfg.b2, count))
    groups: dict[Group, _Scalars] = {}
    ratios: dict[Group, float] = {"main": 1.0, "aux": cfg.aux_router_lr_ratio, "frozen": 0.0}
    for kind, ratio in ratios.items():
        # A norm of 0 divides into infinity, which the minimum turns into 1.
        norm = norms.aux if kind == "aux" else norms.main
        clip = jnp.minimum(1.0, cfg.clip_norm / norm)
        decay = jnp.where(ok, lr * ratio, 0.0)
        rate = decay / _correction(cfg.b1, count)
        groups[kind] = _Scalars(ok, clip, b1, b2, rate, root, cfg.eps, decay)
    return groups


def _correction(decay: float, count: Any) -> Float[Array, ""]:
    # 1 - decay^count through expm1: the difference loses four digits at 0.999 and count 1.
    return -jnp.expm1(count.astype(jnp.float32) * math.log(decay)) if decay else jnp.ones(())


def _adamw(by: _Scalars, decay: float, g: Any, mu: Any, nu: Any, p: Any) -> tuple[Any, Any, Any]:
    g = jnp.where(by.ok, g.astype(jnp.float32) * by.clip, 0.0)
    mu = by.b1 * mu + (1 - by.b1) * g
    nu = by.b2 * nu + (1 - by.b2) * jnp.square(g)
    delta = by.rate * mu / (jnp.sqrt(nu) * by.root + by.eps) + by.decay * decay * p
    return (-delta).astype(p.dtype), mu, nu
