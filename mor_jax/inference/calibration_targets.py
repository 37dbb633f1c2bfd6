"""The arithmetic of calibration: from a wanted depth to shares, from shares to thresholds."""

import itertools
from collections.abc import Sequence

import numpy as np

from mor_jax.config import ModelConfig
from mor_jax.config.parsing import check, fail
from mor_jax.inference.calibration_file import ALWAYS, NEVER
from mor_jax.models.routing.router import capacity_tokens

_ROUNDS = 200


def trained_shares(cfg: ModelConfig) -> tuple[float, ...]:
    """Share of a row's tokens at each recursion that training aimed at, in [0, 1]."""
    nr = cfg.num_recursions
    if cfg.router.kind == "token":
        return tuple((nr - r) / nr for r in range(nr))
    if (cfg.router.capacity_multiple or 1) == 1:
        return cfg.router.capacities(nr)
    # Rounded up, here by the longest row: how long those of training were is not known.
    return tuple(count / cfg.max_seq_len for count in capacity_tokens(cfg, cfg.max_seq_len))


def takes_all(cfg: ModelConfig) -> tuple[bool, ...]:
    """Recursions that every token goes through, whatever its scores."""
    if cfg.router.kind == "token":
        return tuple(r == 0 for r in range(cfg.num_recursions))
    return tuple(share == 1.0 for share in cfg.router.capacities(cfg.num_recursions))


def wanted_shares(
    cfg: ModelConfig, shares: Sequence[float] | None = None, depth: float | None = None
) -> tuple[float, ...]:
    """What to calibrate for: `shares` of all tokens, or those of a mean depth, or the trained ones.

    For a mean depth (recursions a token) the trained shares are multiplied by one factor, none
    beyond 1; recursions that take every token keep 1.

    Raises:
        ValueError: both are given, shares that no nested choice has, a depth out of reach.
    """
    if shares is not None:
        fix = "Leave one of them out"
        check(depth is None, "mean_depth", depth, "shares are given already", fix)
        return _checked(cfg, tuple(shares))
    trained = trained_shares(cfg)
    if depth is None:
        return trained
    lowest, highest = float(sum(takes_all(cfg))), float(cfg.num_recursions)
    rule = f"must be in {lowest:g} .. {highest:g}: {highest:g} recursions, of which every token "
    rule += f"takes {lowest:g}"
    check(lowest <= depth <= highest, "mean_depth", depth, rule, f"Try {sum(trained):.2f}")
    low, high = 0.0, 1 / min(trained)
    for _ in range(_ROUNDS):
        middle = (low + high) / 2
        below = sum(_scaled(cfg, middle)) < depth
        low, high = (middle, high) if below else (low, middle)
    return _scaled(cfg, high)


def _scaled(cfg: ModelConfig, factor: float) -> tuple[float, ...]:
    pairs = zip(trained_shares(cfg), takes_all(cfg), strict=True)
    return tuple(1.0 if always else min(1.0, share * factor) for share, always in pairs)


def _checked(cfg: ModelConfig, shares: tuple[float, ...]) -> tuple[float, ...]:
    fix = "Try " + ",".join(f"{share:.3g}" for share in trained_shares(cfg))
    rule = f"needs one share for each of the {cfg.num_recursions} recursions"
    check(len(shares) == cfg.num_recursions, "shares", shares, rule, fix)
    for r, (share, always) in enumerate(zip(shares, takes_all(cfg), strict=True)):
        check(0 <= share <= 1, f"shares[{r}]", share, "must be in [0, 1]", fix)
        rule = "must be 1: this recursion was trained on every token"
        check(share == 1 or not always, f"shares[{r}]", share, rule, fix)
    if not all(a >= b for a, b in itertools.pairwise(shares)):
        rule = "must not increase: a recursion keeps some of the tokens of the one before"
        fail("shares", shares, rule, fix)
    return shares


def threshold(logits: np.ndarray, count: int) -> float:
    """The float32 logit that `count` of the candidates' `logits` [n] reach; of equal ones, all.

    It lies half way to the best logit that must not reach it, far from both.
    """
    if count >= len(logits):
        return ALWAYS
    if count <= 0:
        return NEVER
    ordered = np.sort(np.asarray(logits, np.float32))[::-1]
    last, first_out = ordered[count - 1], ordered[count]
    middle = np.float32((np.float64(last) + np.float64(first_out)) / 2)
    return float(middle if first_out < middle <= last else last)


def depth_bias(weights: np.ndarray, wanted: Sequence[float]) -> tuple[float, ...]:
    """What to add to the scores `weights` [n r] so that the best depth has the wanted shares.

    wanted: share of tokens that goes through each recursion, non-increasing from 1. In turn each
    depth's bias is moved to where its own share is right, the others' held; the mean of all is 0.
    """
    n, nr = weights.shape
    exits = np.array([*wanted, 0.0])
    counts = np.round((exits[:-1] - exits[1:]) * n).astype(int)
    open_depths = [r for r in range(nr) if counts[r] > 0]
    bias = np.where(counts > 0, 0.0, -2.0 * (np.ptp(weights) + 1.0))
    weights = weights.astype(np.float64)
    for _ in range(_ROUNDS if len(open_depths) > 1 else 0):
        before = bias.copy()
        for r in open_depths:
            others = [o for o in open_depths if o != r]
            lead = weights[:, r] - np.max(weights[:, others] + bias[others], axis=1)
            lead = np.sort(lead)[::-1]
            bias[r] = -(lead[counts[r] - 1] + lead[min(counts[r], n - 1)]) / 2
        bias[open_depths] -= np.mean(bias[open_depths])
        if np.max(np.abs(bias - before)) < 1e-7:
            break
    return tuple(float(value) for value in bias)
