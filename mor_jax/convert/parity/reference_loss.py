"""The losses of the reference: ours with the normalisation of the reference's trainer.

mor_jax averages every term over the global batch. The reference divides the cross-entropy by the
number of items (all labels of the optimiser step, unshifted), scales z-loss and balancing loss by
tokens / items, and does not scale the auxiliary loss (the authors' trainer).
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from mor_jax.config import ModelConfig, RouterConfig
from mor_jax.convert.parity import compacted_rows
from mor_jax.models.params import forward, logits_table, unembed
from mor_jax.models.routing.outputs import Routing
from mor_jax.models.routing.router import Route, capacity_tokens
from mor_jax.models.transformer import ModelOutput
from mor_jax.training.losses import batch_counts, router_losses, text_loss
from mor_jax.types import Array, Batch, Float, Int, Params

# Chunks of a sequence in the cross-entropy: several, so that chunking is compared as well.
LOSS_CHUNKS = 3
# Such small models take far longer to compile than to run, so optimisations are off.
FAST_COMPILATION = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
}
Values = dict[str, Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pass:
    """Results of a forward pass. values: losses and rates by the reference's names."""

    values: Values
    logits: Float[Array, "b l v"]
    out: ModelOutput


@dataclasses.dataclass(frozen=True)
class Rules:
    """Static arguments of a compiled pass.

    capacity_tokens: tokens that each recursion selects. compacted_rows: emulate that bug of the
    reference.
    """

    capacity_tokens: tuple[int, ...]
    compacted_rows: bool = False


def rules(cfg: ModelConfig, length: int, step: int, compacted_rows: bool = False) -> Rules:
    """The static arguments of training forward pass number `step`, from 1."""
    return Rules(capacity_tokens(cfg, length, step), compacted_rows)


def steady(cfg: ModelConfig) -> int:
    """The first forward pass after all warm-ups: how an evaluation routes."""
    return 1 + max(cfg.router.capacity_warmup_steps, cfg.router.balance_warmup_steps)


def objective(
    params: Params,
    cfg: ModelConfig,
    batch: Batch,
    items: Float[Array, ""] | float,
    fixed: Rules,
    step: Int[Array, ""] | int,
) -> tuple[Float[Array, ""], Pass]:
    """The scalar that the reference differentiates, and the results of its forward pass.

    items: number of labels to divide the loss by. step: number of this training forward pass,
    from 1. The auxiliary router's own loss is part of the objective but not of
    `total_loss`: the reference minimises it separately, and neither has gradients for the other's
    parameters.
    """
    route = Route(capacity_tokens=fixed.capacity_tokens, step=step)
    if fixed.compacted_rows:
        out = compacted_rows.forward(cfg, params, batch, route)
    else:
        out = forward(cfg, params, batch, route, trace=True)
    chunk = math.ceil(batch.tokens.shape[1] / LOSS_CHUNKS)
    ce, _ = text_loss(out.hidden, logits_table(cfg, params), batch.targets, chunk)
    values = {"loss": ce / items, "total_loss": ce / items}
    aux_router_loss = jnp.zeros(())
    if out.routing is not None:
        _, terms = router_losses(cfg, out.routing, batch_counts(cfg, batch, fixed.capacity_tokens))
        values |= _router_values(cfg.router, out.routing, terms, batch.tokens.size / items)
        values["total_loss"] += _weighted_terms(cfg.router, values)
        if cfg.router.kind == "expert" and cfg.router.causal_routing == "aux_router":
            aux_router_loss = values["sampling_loss"]
    logits = unembed(cfg, params, out.hidden)
    return values["total_loss"] + aux_router_loss, Pass(values, logits, out)


@functools.cache
def compiled():
    """`objective` and its gradients: the same arguments -> ((objective, pass), gradients)."""
    return jax.jit(
        jax.value_and_grad(objective, has_aux=True),
        static_argnames=("cfg", "fixed"),
        compiler_options=_known_options(),
    )


def _known_options() -> dict[str, bool | int]:
    # Options differ between versions of XLA. Without one, compilation only takes longer.
    known = {}
    for name, value in FAST_COMPILATION.items():
        try:
            jax.jit(jnp.negative, compiler_options={name: value})(0.0)
        except jax.errors.JaxRuntimeError as error:
            if "No such compile option" not in str(error):
                raise
        else:
            known[name] = value
    return known


def _router_values(
    router: RouterConfig, routing: Routing, terms: Values, scale: Float[Array, ""] | float
) -> Values:
    # scale: tokens of this micro-batch / items. A term that is not in use is recorded as 0.
    zero = jnp.zeros(())
    values = dict.fromkeys(("sampling_loss", "sampling_acc", "balancing_loss"), zero)
    values["balancing_ratio"] = zero
    values["router_z_loss"] = scale * terms["router_z"] if router.z_loss_coeff else zero
    if routing.expert is not None and router.causal_routing != "none":
        values["sampling_loss"] = terms["router_bce"]
        values["sampling_acc"] = jnp.mean(routing.expert.correct / routing.expert.candidates)
    if routing.token is not None and router.load_balancing != "none":
        values["balancing_ratio"] = routing.token.choice / routing.token.tokens
    if routing.token is not None and router.load_balancing == "loss":
        values["balancing_loss"] = scale * terms["router_balance"]
    return values


def _weighted_terms(router: RouterConfig, values: Values) -> Float[Array, ""]:
    coeff = router.aux_loss_coeff if router.causal_routing == "aux_loss" else 0.0
    weighted = (
        coeff * values["sampling_loss"] + router.balance_loss_coeff * values["balancing_loss"]
    )
    return weighted + router.z_loss_coeff * values["router_z_loss"]


def overlap_accuracy(routing: Routing) -> float:
    """Mean fraction of selected tokens that are also in the top-k of the trained router."""
    overlaps, previous = [], None
    for trace in routing.recursion_traces:
        scores = np.asarray(trace.trained)
        rows = np.arange(scores.shape[1]) if trace.index is None else np.asarray(trace.index)
        chosen = np.broadcast_to(rows, (scores.shape[0], rows.shape[-1]))
        best = np.argsort(-scores, axis=1, kind="stable")[:, : chosen.shape[1]]
        predicted = best if previous is None else np.take_along_axis(previous, best, axis=1)
        hits = [np.isin(a, b).sum() for a, b in zip(chosen, predicted, strict=True)]
        overlaps.append(sum(hits) / chosen.size)
        previous = chosen
    return float(np.mean(overlaps))
