"""Finds near-ties of routing in a computed pass: choices that rounding decides.

If the scores of two candidates tie (`router.TIE`), mor_jax selects the earlier token, but a
recording may have selected either. Differences after a tie are not errors of the model.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from mor_jax.config import ModelConfig
from mor_jax.models.routing.outputs import Routing
from mor_jax.models.routing.router import expert_score, tie_margin, token_score
from mor_jax.types import Float


@dataclasses.dataclass(frozen=True)
class Tie:
    """Two candidates between which rounding decides.

    step: number of the training forward pass, from 1; None: an evaluation. recursion, row: from
    0, row is the sequence; recursion is None for token-choice. places: the positions of the two
    tokens (expert-choice: the last selected and the first dropped one), or the position of the
    token and the two depths. gap: difference of their scores.
    """

    step: int | None
    recursion: int | None
    row: int
    places: tuple[int, ...]
    gap: float

    def __str__(self) -> str:
        when = "evaluation" if self.step is None else f"forward {self.step}"
        if self.recursion is None:
            token, *depths = self.places
            what = f"token {token}, depths {depths[0] + 1} and {depths[1] + 1}"
        else:
            what = f"recursion {self.recursion + 1}, tokens {self.places[0]} and {self.places[1]}"
        return f"tie at {when}, row {self.row}, {what}: gap {self.gap:.1e}"


def find_ties(
    cfg: ModelConfig, routing: Routing, step: int | None, bias: Float[np.ndarray, "r"] | None = None
) -> list[Tie]:
    """Every tie of a pass between a selected and a dropped candidate.

    bias: balancing bias of token-choice in that pass.
    """
    if routing.token is None:
        return _of_tokens(cfg, routing, step)
    if step is not None and step < cfg.router.balance_warmup_steps:
        return []
    return _of_depths(cfg, routing, step, 0.0 if bias is None else bias)


def _of_tokens(cfg: ModelConfig, routing: Routing, step: int | None) -> list[Tie]:
    ties, previous = [], None
    for r, trace in enumerate(routing.recursion_traces):
        scores = np.asarray(expert_score(cfg.router, trace.logits))
        places = np.broadcast_to(np.arange(scores.shape[1]), scores.shape)
        places = places if previous is None else previous
        previous = places if trace.index is None else np.asarray(trace.index)
        count = previous.shape[1]
        if count == scores.shape[1]:
            continue
        order = np.argsort(-scores, axis=1, kind="stable")[:, [0, count - 1, count]]
        best, selected, dropped = np.take_along_axis(scores, order, axis=1).T
        pairs = np.take_along_axis(places, order[:, 1:], axis=1)
        for row in np.flatnonzero(selected - dropped <= _margin(best, selected)):
            gap = float(selected[row] - dropped[row])
            ties.append(Tie(step, r, int(row), (int(pairs[row, 0]), int(pairs[row, 1])), gap))
    return ties


def _of_depths(
    cfg: ModelConfig, routing: Routing, step: int | None, bias: np.ndarray | float
) -> list[Tie]:
    scores = np.asarray(token_score(cfg.router, routing.recursion_traces[0].logits)) + bias
    order = np.argsort(-scores, axis=-1, kind="stable")[..., :2]
    best, second = np.moveaxis(np.take_along_axis(scores, order, axis=-1), -1, 0)
    gap, ties = best - second, []
    for b, t in np.argwhere(gap <= _margin(best, second)):
        places = (int(t), int(order[b, t, 0]), int(order[b, t, 1]))
        ties.append(Tie(step, None, int(b), places, float(gap[b, t])))
    return ties


def _margin(best: np.ndarray, lowest: np.ndarray) -> np.ndarray:
    return np.asarray(tie_margin(jnp.asarray(best), jnp.asarray(lowest)))
