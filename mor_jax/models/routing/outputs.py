"""Outputs of a routed forward pass: depths, and the sums behind losses and metrics.

Sums rather than means, so that micro-batches, hosts and padding add up exactly;
`training/losses.py` divides by the counts of the global batch.
"""

import dataclasses

import jax
import jax.numpy as jnp

from mor_jax.types import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExpertSums:
    """Sums over the candidates of each recursion, float32 [r].

    bce: binary cross-entropy of the trained logits against "selected". z: squared logits.
    candidates, chosen: numbers of candidate and of selected tokens. correct: candidates whose logit
    predicts the selection; chosen_correct: selected tokens among them.
    """

    bce: Float[Array, "r"]
    z: Float[Array, "r"]
    candidates: Float[Array, "r"]
    chosen: Float[Array, "r"]
    correct: Float[Array, "r"]
    chosen_correct: Float[Array, "r"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenSums:
    """Sums over the tokens of the batch, float32.

    weight: scores of each depth. choice: tokens that chose each depth. z: squared logsumexp of the
    logits. tokens: their number. overflow: tokens dropped before each recursion because it was at
    capacity.
    """

    weight: Float[Array, "r"]
    choice: Float[Array, "r"]
    z: Float[Array, ""]
    tokens: Float[Array, ""]
    overflow: Float[Array, "r"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RecursionTrace:
    """Routing of one recursion, for parity checks and analysis.

    logits: of the candidates (token-choice: of all tokens, for every depth).
    trained: the logits trained to predict the selection: `logits`, or the auxiliary router's.
    index: positions of the slots in the sequence, ascending; None: the whole sequence.
    valid: False marks padding slots.
    output: the residual stream after the recursion, only when a trace was requested.
    """

    logits: Float[Array, "b n ..."]
    trained: Float[Array, "b n ..."]
    index: Int[Array, "b c"] | None
    valid: Bool[Array, "b c"] | None
    output: Float[Array, "b l d"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """Depths and sums of one forward pass; exactly one of `expert` and `token` is set.

    depth: recursions that each token went through; 0 for padding and for tokens never selected.
    recursion_traces: one per recursion.
    """

    depth: Int[Array, "b l"]
    expert: ExpertSums | None
    token: TokenSums | None
    recursion_traces: tuple[RecursionTrace, ...]


def expert_sums(
    logits: Float[Array, "b n"],
    selected: Bool[Array, "b n"],
    eligible: Bool[Array, "b n"] | None,
    decision_logit: float,
    trained: Float[Array, "b n"],
) -> ExpertSums:
    """Sums of one recursion (scalars).

    logits: of the main router (z-loss). trained: the logits trained to predict the selection, the
    main router's or the auxiliary one's. decision_logit: from which on `trained` predicts
    "selected".
    """
    weight = jnp.ones(selected.shape) if eligible is None else eligible.astype(jnp.float32)
    target = selected.astype(jnp.float32)
    # -log sigmoid(z) for selected tokens and -log sigmoid(-z) for others, without overflow.
    bce = jax.nn.softplus(trained) - target * trained
    correct = ((trained >= decision_logit) == selected).astype(jnp.float32)
    return ExpertSums(
        bce=jnp.sum(bce * weight),
        z=jnp.sum(logits * logits * weight),
        candidates=jnp.sum(weight),
        chosen=jnp.sum(target * weight),
        correct=jnp.sum(correct * weight),
        chosen_correct=jnp.sum(correct * target * weight),
    )


def token_sums(
    logits: Float[Array, "b l r"],
    weights: Float[Array, "b l r"],
    choice: Int[Array, "b l"],
    valid: Float[Array, "b l"],
    overflow: Float[Array, "r"],
) -> TokenSums:
    """Sums over all tokens; `valid` is 0 at padding and 1 elsewhere."""
    depths = jax.nn.one_hot(choice, logits.shape[-1], dtype=jnp.float32)
    lse = jax.nn.logsumexp(logits, axis=-1)
    return TokenSums(
        weight=jnp.einsum("blr,bl->r", weights, valid),
        choice=jnp.einsum("blr,bl->r", depths, valid),
        z=jnp.sum(lse * lse * valid),
        tokens=jnp.sum(valid),
        overflow=overflow,
    )


def stack_sums(each: list[ExpertSums]) -> ExpertSums:
    """Stacks the scalars of all recursions into vectors [r]."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
