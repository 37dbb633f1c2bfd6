"""Recomputes recorded training runs of the reference: a few optimiser steps.

Model, optimiser and schedule are ours; only the normalisation of the losses is the reference's
(`reference_loss`).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mor_jax.config import ModelConfig, OptimConfig
from mor_jax.config.parsing import check
from mor_jax.convert.names import entries
from mor_jax.convert.parity.cases import Case, batch_of
from mor_jax.convert.parity.compare import Report, add_tensors, by_magnitude
from mor_jax.convert.parity.reference_loss import compiled, rules
from mor_jax.convert.state_dict import from_params
from mor_jax.models.routing.outputs import Routing
from mor_jax.training.optimizer import decays, global_norms, make_optimizer, schedule
from mor_jax.types import Array, Float, Params

# The reference gives its auxiliary routers ten times the learning rate.
AUX_ROUTER_RATIO = 10.0


def optim_config(hp: dict[str, Any]) -> OptimConfig:
    """Our optimiser's settings for the recorded hyper-parameters.

    Raises:
        ValueError: one of them is missing.
    """
    for name in ("lr", "warm", "decay", "b1", "b2", "eps", "wd", "clip"):
        check(name in hp, f"hp.{name}", None, "is missing", "Record the case again")
    return OptimConfig(
        lr=hp["lr"],
        schedule="trapezoid",
        warmup_steps=hp["warm"],
        decay_steps=hp["decay"],
        b1=hp["b1"],
        b2=hp["b2"],
        eps=hp["eps"],
        weight_decay=hp["wd"],
        clip_norm=hp["clip"],
        aux_router_lr_ratio=AUX_ROUTER_RATIO,
    )


def compare_trajectory(case: Case, compacted_rows: bool = False) -> Report:
    """Runs the recorded steps and compares losses, gradient norms, rates and final weights.

    compacted_rows: emulate that bug of the reference, see `parity.compacted_rows`.
    """
    report, spec, cfg = Report(case.name, emulated=compacted_rows), case.spec, case.config
    optim, steps = optim_config(spec["hp"]), spec["steps"]
    _check_decay(case)
    params = jax.tree.map(jnp.asarray, case.params("init_flat"))
    optimizer = make_optimizer(optim, steps, params)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    micro_losses, norms = [], []
    for step in range(steps):
        summed, routings = None, []
        for index in range(step * spec["grad_accum"], (step + 1) * spec["grad_accum"]):
            # The reference counts forward passes, and a recording may start in the middle of a run.
            number = case.passes_before + index + 1
            params = _warm_bias(cfg, params, number)
            batch = batch_of(*_rows(case, index))
            inputs = (params, cfg, batch, float(spec["num_items_in_batch"]))
            fixed = rules(cfg, batch.tokens.shape[1], number, compacted_rows)
            (_, ran), grads = compiled()(*inputs, fixed, number)
            report.add_routing(cfg, params, ran.out.routing, number)
            summed = grads if summed is None else jax.tree.map(jnp.add, summed, grads)
            micro_losses.append(ran.values["loss"])
            routings.append(ran.out.routing)
        norms.append(global_norms(summed).main)
        updates, state = update(summed, state, params)
        params = optax.apply_updates(params, updates)
        params = _move_bias(cfg, params, routings)
    rates = [schedule(optim, steps)(step) for step in range(steps)]
    for key, value in (("micro_loss", micro_losses), ("grad_norm", norms)):
        report.add("trajectory", key, _each(value, case.arrays[key]))
    report.add("trajectory", "lr_used_per_step", by_magnitude(rates, spec["lr_used_per_step"]))
    ours = from_params(cfg, params, aliases=False)
    add_tensors(report, "trajectory", ours, case.tensors("final_flat"))
    return report


def _each(ours: list[Any], theirs: np.ndarray) -> float:
    values = np.asarray(jax.device_get(ours))
    if values.shape != theirs.shape:
        return float("inf")
    return float(np.max(np.abs(values - theirs) / np.maximum(np.abs(theirs), 1e-12)))


def _rows(case: Case, index: int) -> list[np.ndarray | None]:
    """Tokens, labels and mask of micro-batch `index`; micro-batches follow one another."""
    size = case.spec["batch"]
    arrays = [case.arrays.get(name) for name in ("input_ids", "labels", "attention_mask")]
    rows = [None if a is None else a[index * size : (index + 1) * size] for a in arrays]
    rule = f"micro-batch {index} needs {size} sequences"
    ok = all(row is None or len(row) == size for row in rows)
    check(ok, "input_ids", case.arrays["input_ids"].shape, rule, "Record all sequences")
    return rows


def _check_decay(case: Case) -> None:
    ours = {e.name for e in entries(case.config) if not e.is_alias and decays(e.path)}
    theirs = set(case.spec["decay_names"])
    rule = "our optimiser decays other parameters than the reference"
    check(
        ours == theirs,
        "decay_names",
        sorted(ours ^ theirs),
        rule,
        "Compare with mor_jax.training.optimizer.decays",
    )


def _warm_bias(cfg: ModelConfig, params: Params, forward: int) -> Params:
    """Parameters for training forward pass `forward`: the bias is zero during warm-up."""
    if "bias" not in params.get("router", {}) or forward >= cfg.router.balance_warmup_steps:
        return params
    return _with_bias(params, jnp.zeros_like(params["router"]["bias"]))


def _move_bias(cfg: ModelConfig, params: Params, routings: list[Routing | None]) -> Params:
    """Loss-free balancing: moves the bias one step towards equal use of all depths.

    routings: of every micro-batch of the step.
    """
    if "bias" not in params.get("router", {}):
        return params
    counts = [np.asarray(r.token.choice) for r in routings if r is not None and r.token is not None]
    step = np.float32(cfg.router.bias_update_rate) * balancing_sign(counts)
    return _with_bias(params, params["router"]["bias"] + step)


def balancing_sign(counts: list[Float[np.ndarray, "r"]]) -> Float[np.ndarray, "r"]:
    """Direction in which the reference moves its bias: -1, 0 or 1 for each depth.

    counts: tokens of every micro-batch at each depth. Computed on the host and in the
    reference's order, because at equal use the rounding of these divisions decides the sign; XLA
    would replace them by products with a reciprocal.
    """
    ratios = [count / np.float32(np.sum(count)) for count in counts]
    ratio = sum(ratios[1:], ratios[0]) / np.float32(len(ratios))
    return np.sign(np.mean(ratio) - ratio)


def _with_bias(params: Params, bias: Float[Array, "r"]) -> Params:
    return params | {"router": params["router"] | {"bias": bias}}
