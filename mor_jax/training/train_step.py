"""One optimiser step and one evaluation step: pure functions, no input or output.

`compiled_step.py` jits the train step. Metrics are scalars by name, plus `depth_share`: the share
of tokens at each depth.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from mor_jax.config import TrainConfig
from mor_jax.distributed.collectives import (
    fits_gathered,
    psum_batch,
    psum_replicated_grads,
    shard_map_over_batch,
)
from mor_jax.distributed.mesh import param_specs, spec_of
from mor_jax.models.param_count import layer_weights
from mor_jax.models.params import forward, gather, logical_axes, logits_table
from mor_jax.models.routing.outputs import Routing
from mor_jax.models.routing.router import Route, capacity_tokens
from mor_jax.training.losses import Counts, TextSums, batch_counts, router_losses, text_loss
from mor_jax.training.optimizer import global_norms, schedule
from mor_jax.training.train_state import TrainState
from mor_jax.types import Array, Batch, Float, Params

Metrics = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class StepSpec:
    """Static arguments of a step: configuration, optimiser, and token slots per recursion.

    kept: token slots of each recursion; None for the final capacities, others during warm-up.
    """

    cfg: TrainConfig
    optimizer: optax.GradientTransformationExtraArgs
    kept: tuple[int, ...] | None = None


def train_step(spec: StepSpec, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    """One update from the global batch (means are over the global batch).

    If the loss or a gradient is not finite, only the counters of skipped steps change.
    """
    cfg = spec.cfg
    kept = spec.kept or capacity_tokens(cfg.model, cfg.seq_len)
    metrics, grads = gradients(cfg, state.params, batch, state.step + 1, kept)
    norms = global_norms(grads)
    ok = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norms.main) & jnp.isfinite(norms.aux)
    updates, opt_state = spec.optimizer.update(grads, state.opt_state, state.params, ok=ok)
    params = optax.apply_updates(state.params, updates)
    if "choice_count" in metrics:
        choice = metrics.pop("choice_count")
        metrics["choice_share"] = choice / jnp.sum(choice)
        if "bias" in params["router"]:
            params = _balanced(cfg, params, choice, state.step + 1, ok)
    skipped = 1 - ok.astype(jnp.int32)
    metrics |= {
        "grad_norm": norms.main,
        "lr": schedule(cfg.optim, cfg.steps)(state.opt_state["count"]),
        "skipped": state.skipped + skipped,
        "skipped_in_a_row": (state.skipped_in_a_row + 1) * skipped,
    }
    after = TrainState(
        state.step + 1, params, opt_state, metrics["skipped"], metrics["skipped_in_a_row"]
    )
    return after, metrics


def gradients(
    cfg: TrainConfig, params: Params, batch: Batch, step: Array, kept: tuple[int, ...]
) -> tuple[Metrics, Params]:
    """Metrics and gradients of the global batch; each device processes its own sequences.

    Sequences are independent: only parameters, gradients and sums are exchanged. step: from 1.
    """
    cut = param_specs(logical_axes(cfg.model))

    def mine(params: Params, batch: Batch, step: Array) -> tuple[Metrics, Params]:
        route = Route(capacity_tokens=kept, step=step)
        counts = psum_batch(batch_counts(cfg.model, batch, kept))
        full, back = jax.vjp(lambda params: gather(cfg.model, params, shares_once(cfg)), params)
        counts = _with_shares(cfg, full, batch, route, counts)
        metrics, grads = accumulate(cfg, full, batch, route, counts)
        (grads,) = back(jax.tree.map(lambda grad, x: grad.astype(x.dtype), grads, full))
        return psum_batch(metrics), psum_replicated_grads(grads, cut)

    rows, everywhere = spec_of(("batch",)), PartitionSpec()
    over = shard_map_over_batch(mine, (cut, rows, everywhere), (everywhere, cut))
    return over(params, batch, step)


def shares_once(cfg: TrainConfig) -> bool:
    """Whether the shared block is gathered once a step, see `config.ShardingConfig`."""
    if cfg.sharding.all_gather_shared is not None:
        return cfg.sharding.all_gather_shared == "once"
    values = cfg.model.shared_layers * layer_weights(cfg.model)
    return fits_gathered(values, cfg.grad_accum_steps > 1)


def loss_fn(
    params: Params, cfg: TrainConfig, batch: Batch, route: Route, counts: Counts
) -> tuple[Float[Array, ""], Metrics]:
    """This batch's part of the training loss and its terms by name, in nats per token."""
    out = forward(cfg.model, params, batch, route)
    table = logits_table(cfg.model, params)
    total, sums = text_loss(out.hidden, table, batch.targets, cfg.loss_chunk_size, cfg.z_loss_coeff)
    metrics = _text_metrics(sums, counts)
    loss = total / counts.targets
    if out.routing is not None:
        router_loss, terms = router_losses(cfg.model, out.routing, counts)
        loss = loss + router_loss
        metrics |= terms | _routing_metrics(cfg, out.routing, batch, counts)
    return loss, metrics | {"loss": loss}


def accumulate(
    cfg: TrainConfig, params: Params, batch: Batch, route: Route, counts: Counts
) -> tuple[Metrics, Params]:
    """Metrics and gradients summed over micro-batches, one at a time."""
    grad_fn = jax.grad(loss_fn, has_aux=True)
    if cfg.grad_accum_steps == 1:
        grads, metrics = grad_fn(params, cfg, batch, route, counts)
        return metrics, grads

    # jit lets the shapes and the loop's body share one trace, which takes seconds.
    @partial(jax.jit, inline=True)
    def part_grads(params: Params, part: Batch, step: Array, counts: Counts) -> Any:
        return grad_fn(params, cfg, part, dataclasses.replace(route, step=step), counts)

    def body(total: tuple[Metrics, Params], part: Batch):
        grads, metrics = part_grads(params, part, route.step, counts)
        return jax.tree.map(jnp.add, total, (metrics, grads)), None

    parts = micro_batches(batch, cfg.grad_accum_steps)
    first = jax.tree.map(lambda x: x[0], parts)
    shapes = jax.eval_shape(part_grads, params, first, route.step, counts)
    # Gradients of gathered parameters may have 16 bits, too few to accumulate them.
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), (shapes[1], shapes[0]))
    return jax.lax.scan(body, zeros, parts)[0]


def micro_batches(batch: Batch, number: int) -> Batch:
    """[b ...] -> [number, b/number ...]."""
    return jax.tree.map(lambda x: x.reshape(number, -1, *x.shape[1:]), batch)


def eval_step(
    cfg: TrainConfig,
    params: Params,
    batch: Batch,
    mode: str,
    thresholds: Float[Array, "r"] | tuple[float, ...] | None = None,
) -> Metrics:
    """Sums over a validation batch under routing `mode`, not yet divided by counts.

    ce, correct, targets: of the text. depth_count: tokens at depth 0 .. Nr (routed models).
    thresholds: of causal routing, as in `Route`.
    """
    cut = param_specs(logical_axes(cfg.model))
    route = Route(mode="causal" if mode == "causal" else "topk", thresholds=thresholds)

    def mine(params: Params, batch: Batch) -> Metrics:
        full = gather(cfg.model, params, shares_once(cfg))
        out = forward(cfg.model, full, batch, route)
        table = logits_table(cfg.model, full)
        _, sums = text_loss(out.hidden, table, batch.targets, cfg.loss_chunk_size)
        counts = batch_counts(cfg.model, batch, capacity_tokens(cfg.model, batch.tokens.shape[1]))
        metrics = {"ce": sums.ce, "correct": sums.correct, "targets": counts.targets}
        if out.routing is not None:
            metrics["depth_count"] = _depth_counts(cfg, out.routing, batch)
        return psum_batch(metrics)

    over = shard_map_over_batch(mine, (cut, spec_of(("batch",))), PartitionSpec())
    return over(params, batch)


def _text_metrics(sums: TextSums, counts: Counts) -> Metrics:
    targets = counts.targets
    return {
        "ce": sums.ce / targets,
        "logit_z": sums.z / targets,
        "accuracy": sums.correct / targets,
    }


def _depth_counts(cfg: TrainConfig, routing: Routing, batch: Batch) -> Float[Array, "depths"]:
    """Tokens, without padding, that went through 0 .. Nr recursions."""
    depths = jnp.arange(cfg.model.num_recursions + 1)[:, None, None]
    there = routing.depth[None] == depths
    if batch.segments is not None:
        there = there & (batch.segments > 0)[None]
    return jnp.sum(there, axis=(1, 2), dtype=jnp.float32)


def _routing_metrics(cfg: TrainConfig, routing: Routing, batch: Batch, counts: Counts) -> Metrics:
    metrics: Metrics = {"depth_share": _depth_counts(cfg, routing, batch)[1:] / counts.tokens}
    if routing.expert is not None and counts.candidates is not None:
        metrics["router_accuracy"] = jnp.mean(routing.expert.correct / counts.candidates)
    if routing.token is not None:
        metrics["choice_count"] = routing.token.choice
        metrics["overflow_share"] = jnp.sum(routing.token.overflow) / counts.tokens
    return metrics


def _with_shares(
    cfg: TrainConfig, params: Params, batch: Batch, route: Route, counts: Counts
) -> Counts:
    """Adds the global choice shares where the balancing loss needs them before the first gradient.

    The balancing loss multiplies two means over the batch, so micro-batches must know the global
    one. Only the part of the model before the router is computed here; the rest is dead code.
    """
    router = cfg.model.router
    if router.kind != "token" or router.load_balancing != "loss" or cfg.grad_accum_steps == 1:
        return counts

    def choices(part: Batch) -> Any:
        routing = forward(cfg.model, params, part, route).routing
        assert routing is not None and routing.token is not None
        return routing.token.choice

    each = jax.lax.map(choices, micro_batches(batch, cfg.grad_accum_steps))
    share = psum_batch(jnp.sum(each, axis=0)) / counts.tokens
    return dataclasses.replace(counts, share=share)


def _balanced(
    cfg: TrainConfig, params: Params, choice: Float[Array, "r"], step: Array, ok: Array
) -> Params:
    """Loss-free balancing: depths chosen less than average gain bias (Wang et al. 2024).

    choice: tokens of the global batch that chose each depth. Whole numbers, because rounding of
    shares would decide the sign where the depths are used evenly.
    """
    router, count, bias = cfg.model.router, choice.astype(jnp.int32), params["router"]["bias"]
    moved = bias + router.bias_update_rate * jnp.sign(jnp.sum(count) - count.size * count)
    moved = jnp.where(step < router.balance_warmup_steps, jnp.zeros_like(bias), moved)
    new = jnp.where(ok, moved, bias)
    return {**params, "router": {**params["router"], "bias": new}}
