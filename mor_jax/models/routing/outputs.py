"""What a routed forward pass reports: depths, and the sums from which losses and metrics follow.

Sums rather than means, so that micro-batches, hosts and padding add up exactly; `losses.py`
divides by the counts of the global batch.
"""

import dataclasses

import jax
import jax.numpy as jnp

from mor_jax.types import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExpertSums:
    """Sums over the candidates of each recursion, float32 [r].

    bce: binary cross-entropy of the trained logits against "was chosen". z: squared logits.
    candidates, chosen: how many. correct: candidates whose logit predicts the choice;
    chosen_correct: chosen tokens among them.
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

    weight: scores given to each depth. choice: tokens that chose each depth. z: squared
    logsumexp of the logits. tokens: how many. overflow: tokens that found no room at a recursion
    and left before it.
    """

    weight: Float[Array, "r"]
    choice: Float[Array, "r"]
    z: Float[Array, ""]
    tokens: Float[Array, ""]
    overflow: Float[Array, "r"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RecursionTrace:
    """One recursion as it happened, for parity checks and analysis.

    logits: of the candidates (token-choice: of all tokens, for every depth).
    trained: the logits that learn the choice: `logits`, or the auxiliary router's.
    index: row positions of the slots, ascending; None: the whole row. valid: False marks fillers.
    output: the residual stream after the recursion, only when a trace was asked for.
    """

    logits: Float[Array, "b n ..."]
    trained: Float[Array, "b n ..."]
    index: Int[Array, "b c"] | None
    valid: Bool[Array, "b c"] | None
    output: Float[Array, "b l d"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """Depths and sums of one forward pass; exactly one of `expert` and `token` is given.

    depth: recursions that each token went through; 0 for padding and for tokens never chosen.
    """

    depth: Int[Array, "b l"]
    expert: ExpertSums | None
    token: TokenSums | None
    visits: tuple[RecursionTrace, ...]


def expert_sums(
    logits: Float[Array, "b n"],
    chosen: Bool[Array, "b n"],
    eligible: Bool[Array, "b n"] | None,
    cut: float,
    trained: Float[Array, "b n"],
) -> ExpertSums:
    """Sums of one recursion (scalars).

    logits: of the main router (z-loss). trained: the logits that learn the choice, the main
    router's or the auxiliary one's. cut: the logit from which on `trained` predicts "chosen".
    """
    here = jnp.ones(chosen.shape, jnp.float32) if eligible is None else eligible.astype(jnp.float32)
    target = chosen.astype(jnp.float32)
    # -log sigmoid(z) for chosen tokens and -log sigmoid(-z) for others, without overflow.
    bce = jax.nn.softplus(trained) - target * trained
    correct = ((trained >= cut) == chosen).astype(jnp.float32)
    return ExpertSums(
        bce=jnp.sum(bce * here),
        z=jnp.sum(logits * logits * here),
        candidates=jnp.sum(here),
        chosen=jnp.sum(target * here),
        correct=jnp.sum(correct * here),
        chosen_correct=jnp.sum(correct * target * here),
    )


def token_sums(
    logits: Float[Array, "b l r"],
    weights: Float[Array, "b l r"],
    choice: Int[Array, "b l"],
    here: Float[Array, "b l"],
    overflow: Float[Array, "r"],
) -> TokenSums:
    """Sums over all tokens; `here` is 0 at padding."""
    depths = jax.nn.one_hot(choice, logits.shape[-1], dtype=jnp.float32)
    lse = jax.nn.logsumexp(logits, axis=-1)
    return TokenSums(
        weight=jnp.einsum("blr,bl->r", weights, here),
        choice=jnp.einsum("blr,bl->r", depths, here),
        z=jnp.sum(lse * lse * here),
        tokens=jnp.sum(here),
        overflow=overflow,
    )


def stack_sums(each: list[ExpertSums]) -> ExpertSums:
    """Scalars of every recursion -> one struct of [r] vectors."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
