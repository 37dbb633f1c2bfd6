"""Router scores of selected and other tokens; agreement of causal and top-k routing."""

from typing import Any

import numpy as np

from mor_jax.analysis.output_directory import rounded
from mor_jax.analysis.routing_record import RoutedModel, RoutingPass, RoutingRecord, scores
from mor_jax.inference.calibration_targets import takes_all

BINS = 50
UNDECIDED = (0.1, 0.9)
"""Scores between these two are counted as undecided."""


def score_records(observed: RoutingRecord) -> list[dict[str, Any]]:
    """One record per router and recursion: scores of the tokens that top-k routing selects or not.

    Token-choice: one record per depth; "chosen" are the tokens that choose this depth.
    """
    model, records = observed.model, []
    cfg = model.model
    mode = "topk" if "topk" in model.modes else model.modes[0]
    routing_pass = observed.passes[mode]
    logits_by_router = {"decisive": routing_pass.logits}
    if routing_pass.main is not None:
        logits_by_router["main"] = routing_pass.main
    for router, logits in logits_by_router.items():
        score = scores(cfg, logits)
        for r in range(cfg.num_recursions):
            candidates = np.isfinite(score[r])
            chosen = routing_pass.depth > r
            if cfg.router.kind == "token":
                chosen = routing_pass.depth == r + 1
            if cfg.router.kind == "token" and mode == "topk":
                # The choice before the capacity limit, which causal routing does not have.
                chosen = observed.passes["causal"].depth == r + 1
            record = {"statistic": "scores", "routing": mode, "router": router, "recursion": r}
            threshold = _threshold(model, r) if router == "decisive" else None
            records.append(
                {**record, **_separation(score[r][candidates], chosen[candidates], threshold)}
            )
    return records


def _threshold(model: RoutedModel, recursion: int) -> float | None:
    """The lowest score that causal routing selects; None if the recursion takes every token."""
    if model.model.router.kind == "token" or takes_all(model.model)[recursion]:
        return None
    logit = 0.0 if model.thresholds is None else model.thresholds[recursion]
    return rounded(scores(model.model, np.array([[logit]]))[0, 0])


def _separation(score: np.ndarray, chosen: np.ndarray, threshold: float | None) -> dict[str, Any]:
    selected, others = score[chosen], score[~chosen]
    counts = [np.histogram(part, bins=BINS, range=(0, 1))[0] for part in (selected, others)]
    undecided = (score > UNDECIDED[0]) & (score < UNDECIDED[1])
    both = len(selected) and len(others)
    common = np.minimum(counts[0] / max(len(selected), 1), counts[1] / max(len(others), 1)).sum()
    return {
        "candidates": len(score),
        "chosen": len(selected),
        "threshold": threshold,
        "mean_chosen": rounded(selected.mean()) if len(selected) else None,
        "mean_other": rounded(others.mean()) if len(others) else None,
        "undecided": rounded(undecided.mean()) if len(score) else None,
        "auroc": rounded(auroc(selected, others)) if both else None,
        "overlap": rounded(common) if both else None,
        "bins_chosen": counts[0].tolist(),
        "bins_other": counts[1].tolist(),
    }


def auroc(selected: np.ndarray, others: np.ndarray) -> float:
    """Probability that a random score of `selected` exceeds one of `others`; ties count half."""
    ordered = np.sort(others)
    below = np.searchsorted(ordered, selected, side="left")
    at_most = np.searchsorted(ordered, selected, side="right")
    return float((below + at_most).mean() / (2 * len(others)))


def agreement_records(observed: RoutingRecord) -> list[dict[str, Any]]:
    """Agreement of both routings per recursion; no records for a model with one routing.

    states `topk`: both rules on the candidates and hidden states of the top-k pass. states `own`:
    two separate passes, over all tokens.
    """
    model = observed.model
    if set(model.modes) != {"causal", "topk"}:
        return []
    causal, topk = observed.passes["causal"], observed.passes["topk"]
    records = []
    for r, takes_every_token in enumerate(takes_all(model.model)):
        record = {"statistic": "agreement", "recursion": r, "takes_all": takes_every_token}
        if model.model.router.kind == "expert":
            candidates = np.isfinite(topk.logits[r])
            logit = 0.0 if model.thresholds is None else model.thresholds[r]
            selected = (topk.logits[r][candidates] >= logit) | takes_every_token
            both = agreement(selected, topk.depth[candidates] > r)
            records.append({**record, "states": "topk", **both})
        records.append({**record, "states": "own", **agreement(causal.depth > r, topk.depth > r)})
    return records


def agreement(causal: np.ndarray, topk: np.ndarray) -> dict[str, Any]:
    """Two selections of the same tokens, bool [n]: top-k is the truth that causal predicts.

    precision: share of causal's selection that top-k selects too; recall: the reverse; jaccard:
    intersection over union. None where the denominator is 0.
    """
    hits = int((causal & topk).sum())

    def fraction(count: int, total: int) -> float | None:
        return rounded(count / total) if total else None

    return {
        "tokens": len(topk),
        "causal": int(causal.sum()),
        "topk": int(topk.sum()),
        "accuracy": fraction(int((causal == topk).sum()), len(topk)),
        "precision": fraction(hits, int(causal.sum())),
        "recall": fraction(hits, int(topk.sum())),
        "jaccard": fraction(hits, int((causal | topk).sum())),
    }


def choice_records(observed: RoutingRecord) -> list[dict[str, Any]]:
    """Token-choice: share of tokens that choose each depth, and its evenness; otherwise no record.

    max_violation: the largest share relative to the mean share, minus 1. entropy: of the shares,
    relative to that of uniform ones. overflow: share of tokens that top-k routing drops for lack of
    capacity.
    """
    model = observed.model
    if model.model.router.kind != "token":
        return []
    nr = model.model.num_recursions
    choice = observed.passes["causal"].depth.astype(int) - 1
    share = np.bincount(choice, minlength=nr) / len(choice)
    nonzero = share[share > 0]
    entropy = -(nonzero * np.log(nonzero)).sum() / np.log(nr) if nr > 1 else 1.0
    record = {
        "statistic": "choice",
        "shares": [rounded(value) for value in share],
        "max_violation": rounded(share.max() * nr - 1),
        "entropy": rounded(abs(entropy)),
    }
    if "topk" in observed.passes:
        topk: RoutingPass = observed.passes["topk"]
        record["overflow"] = rounded((topk.depth < choice + 1).mean())
    return [record]
