"""Router scores of selected and other tokens; agreement of causal and top-k routing."""

from typing import Any

import numpy as np

from mor_jax.analysis.output_directory import number
from mor_jax.analysis.routing_record import Model, RoutingPass, RoutingRecord, scores
from mor_jax.inference.calibration_targets import takes_all

BINS = 50
CLEAR = (0.1, 0.9)
"""Scores between these two are counted as undecided."""


def score_records(observed: RoutingRecord) -> list[dict[str, Any]]:
    """One record per router and recursion: scores of the tokens that top-k routing selects or not.

    Token-choice: one record per depth; "chosen" are the tokens that choose this depth.
    """
    model, records = observed.model, []
    cfg = model.model
    mode = "topk" if "topk" in model.modes else model.modes[0]
    one = observed.passes[mode]
    kinds = {"decisive": one.logits}
    if one.main is not None:
        kinds["main"] = one.main
    for router, logits in kinds.items():
        score = scores(cfg, logits)
        for r in range(cfg.num_recursions):
            here = np.isfinite(score[r])
            chosen = one.depth == r + 1 if cfg.router.kind == "token" else one.depth > r
            if cfg.router.kind == "token" and mode == "topk":
                # The choice before the capacity limit, which causal routing does not have.
                chosen = observed.passes["causal"].depth == r + 1
            record = {"statistic": "scores", "routing": mode, "router": router, "recursion": r}
            threshold = _threshold(model, r) if router == "decisive" else None
            records.append({**record, **_spread(score[r][here], chosen[here], threshold)})
    return records


def _threshold(model: Model, recursion: int) -> float | None:
    """The lowest score that causal routing selects; None if the recursion takes every token."""
    if model.model.router.kind == "token" or takes_all(model.model)[recursion]:
        return None
    logit = 0.0 if model.thresholds is None else model.thresholds[recursion]
    return number(scores(model.model, np.array([[logit]]))[0, 0])


def _spread(score: np.ndarray, chosen: np.ndarray, threshold: float | None) -> dict[str, Any]:
    yes, no = score[chosen], score[~chosen]
    counts = [np.histogram(part, bins=BINS, range=(0, 1))[0] for part in (yes, no)]
    undecided = (score > CLEAR[0]) & (score < CLEAR[1])
    both = len(yes) and len(no)
    common = np.minimum(counts[0] / max(len(yes), 1), counts[1] / max(len(no), 1)).sum()
    return {
        "candidates": len(score),
        "chosen": len(yes),
        "threshold": threshold,
        "mean_chosen": number(yes.mean()) if len(yes) else None,
        "mean_other": number(no.mean()) if len(no) else None,
        "undecided": number(undecided.mean()) if len(score) else None,
        "auroc": number(auroc(yes, no)) if both else None,
        "overlap": number(common) if both else None,
        "bins_chosen": counts[0].tolist(),
        "bins_other": counts[1].tolist(),
    }


def auroc(yes: np.ndarray, no: np.ndarray) -> float:
    """Probability that a random score of `yes` exceeds a random one of `no`; ties count half."""
    ordered = np.sort(no)
    below = np.searchsorted(ordered, yes, side="left")
    at_most = np.searchsorted(ordered, yes, side="right")
    return float((below + at_most).mean() / (2 * len(no)))


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
    for r, everyone in enumerate(takes_all(model.model)):
        record = {"statistic": "agreement", "recursion": r, "takes_all": everyone}
        if model.model.router.kind == "expert":
            here = np.isfinite(topk.logits[r])
            logit = 0.0 if model.thresholds is None else model.thresholds[r]
            goes = np.ones(here.sum(), bool) if everyone else topk.logits[r][here] >= logit
            both = agreement(goes, topk.depth[here] > r)
            records.append({**record, "states": "topk", **both})
        records.append({**record, "states": "own", **agreement(causal.depth > r, topk.depth > r)})
    return records


def agreement(causal: np.ndarray, topk: np.ndarray) -> dict[str, Any]:
    """Two selections of the same tokens, bool [n]: top-k is the truth that causal predicts.

    precision: share of causal's selection that top-k selects too; recall: the reverse; jaccard:
    intersection over union. None where the denominator is 0.
    """
    hits = int((causal & topk).sum())

    def over(number_of: int, of: int) -> float | None:
        return number(number_of / of) if of else None

    return {
        "tokens": len(topk),
        "causal": int(causal.sum()),
        "topk": int(topk.sum()),
        "accuracy": over(int((causal == topk).sum()), len(topk)),
        "precision": over(hits, int(causal.sum())),
        "recall": over(hits, int(topk.sum())),
        "jaccard": over(hits, int((causal | topk).sum())),
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
    some = share[share > 0]
    entropy = -(some * np.log(some)).sum() / np.log(nr) if nr > 1 else 1.0
    record = {
        "statistic": "choice",
        "shares": [number(one) for one in share],
        "max_violation": number(share.max() * nr - 1),
        "entropy": number(abs(entropy)),
    }
    if "topk" in observed.passes:
        short: RoutingPass = observed.passes["topk"]
        record["overflow"] = number((short.depth < choice + 1).mean())
    return [record]
