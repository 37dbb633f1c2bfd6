"""Calibrates a model on one text: fits thresholds on one half and measures them on the other.

Recursions are calibrated one after the other, because the tokens that reach a recursion depend on
the thresholds before it. Token-choice decides once, so one pass over the text is enough.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mor_jax import data
from mor_jax.config import ModelConfig, TrainConfig
from mor_jax.config.parsing import check
from mor_jax.inference.calibration_file import with_depth_bias
from mor_jax.inference.calibration_targets import depth_bias, takes_all, threshold
from mor_jax.models.flops import flops
from mor_jax.models.params import forward
from mor_jax.models.routing.router import Route, token_score
from mor_jax.runtime.free_memory import CheckedFunction
from mor_jax.training.train_step import eval_step
from mor_jax.types import IGNORE, Array, Batch, Bool, Float, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrationPoint:
    """Measurements of one way to run a model, on text that it was not calibrated on.

    name: for display. wanted: requested shares, if it was calibrated. shares: measured, of all
    tokens at each recursion. loss: nats per token. work: forward FLOPs over those with every token
    at every recursion. thresholds, depth_bias: as in `Calibration`.
    """

    name: str
    loss: float
    shares: tuple[float, ...]
    work: float
    wanted: tuple[float, ...] | None = None
    thresholds: tuple[float, ...] | None = None
    depth_bias: tuple[float, ...] | None = None

    @property
    def depth(self) -> float:
        """Mean recursions per token."""
        return sum(self.shares)


@dataclasses.dataclass(frozen=True)
class CalibrationText:
    """Batches of one size: half to calibrate on, half to measure on. name: for display."""

    name: str
    fit: tuple[Batch, ...]
    unseen: tuple[Batch, ...]

    @classmethod
    def read(cls, cfg: TrainConfig, split: str) -> "CalibrationText":
        """Reads `cfg.eval.batches` batches for each half, fewer if the text is too short.

        split: `heldout` or `all` of the sources. Sequences alternate between the halves. Raises
        `ValueError` if there are fewer than two.
        """
        tokenizer = data.load_tokenizer(cfg.data.tokenizer)
        data.check_vocabulary(tokenizer, cfg.model.vocab_size)
        layout = data.Layout(length=cfg.seq_len, batch_size=cfg.eval.batch_size)
        read = data.validation_batches(cfg.data, tokenizer, layout, 2 * cfg.eval.batches, split, 1)
        rows = jax.tree.map(lambda *parts: np.concatenate(parts), *read)
        # The last batch is padded with sequences without targets.
        whole = np.flatnonzero(np.any(rows.targets != IGNORE, axis=1))
        rule = f"has {len(whole)} sequences of {cfg.seq_len} tokens; two are needed"
        fix = "Lower --length or give more text with --source"
        check(len(whole) >= 2, "data.sources", cfg.data.sources, rule, fix)
        names = ", ".join(cfg.data.sources)
        name = f"validation split of {names}" if split == "heldout" else names
        size = min(cfg.eval.batch_size, len(whole) // 2)
        halves = (tuple(_batches(rows, whole[start::2], size)) for start in (0, 1))
        return cls(name, *halves)

    @property
    def tokens(self) -> int:
        """Tokens to calibrate on, padding included."""
        return sum(batch.tokens.size for batch in self.fit)


def _batches(rows: Batch, chosen: np.ndarray, size: int) -> Iterator[Batch]:
    # Only full batches, so that nothing is compiled twice.
    for start in range(0, len(chosen) - size + 1, size):
        part = chosen[start : start + size]
        yield jax.tree.map(lambda x, part=part: jnp.asarray(x[part]), rows)


class Calibrator:
    """Calibrates one model on one text; compiles once for all thresholds."""

    TRAINING_RULE = "training rule"

    @staticmethod
    def check(cfg: ModelConfig) -> None:
        """Raises `ValueError` for a model that selects nothing."""
        rule = "has nothing to calibrate: every token takes every recursion"
        fix = "Give a run with routers; --recursions changes the depth of others"
        ok = cfg.router.kind != "none" and not all(takes_all(cfg))
        check(ok, "model.router.kind", cfg.router.kind, rule, fix)

    def __init__(self, cfg: TrainConfig, params: Params, text: CalibrationText):
        if cfg.model.router.kind == "token":
            model, params = with_depth_bias(cfg.model, params, (0.0,) * cfg.model.num_recursions)
            cfg = dataclasses.replace(cfg, model=model)
        self._cfg, self._params, self._text = cfg, params, text
        rows = ("eval.batch_size", cfg.eval.batch_size)

        def evaluate(params: Params, batch: Batch, thresholds: Array, mode: str) -> Any:
            return eval_step(cfg, params, batch, mode, thresholds)

        self._evaluate = CheckedFunction(evaluate, *rows)
        self._logits = CheckedFunction(partial(candidate_logits, cfg.model), *rows)
        self._scores = CheckedFunction(partial(depth_scores, cfg.model), *rows)
        # The points of a curve often share their first thresholds.
        self._known: dict[tuple[float, ...], tuple[np.ndarray, int]] = {}

    def calibrated(self, name: str, wanted: Sequence[float]) -> CalibrationPoint:
        """The thresholds, or biases, that give `wanted` shares on the text to calibrate on."""
        wanted = tuple(wanted)
        if self._cfg.model.router.kind == "token":
            bias = depth_bias(self._token_scores(), wanted)
            _, params = with_depth_bias(self._cfg.model, self._params, bias)
            point = self._point(name, "causal", params)
            return dataclasses.replace(point, wanted=wanted, depth_bias=bias)
        thresholds = self.thresholds(wanted)
        point = self._point(name, "causal", self._params, thresholds)
        return dataclasses.replace(point, wanted=wanted, thresholds=thresholds)

    def uncalibrated(self) -> CalibrationPoint:
        """Causal routing without a calibration."""
        return self._point("uncalibrated", "causal", self._params)

    def training_rule(self) -> CalibrationPoint:
        """Top-k over whole sequences. It compares with later tokens, which generation cannot."""
        return self._point(self.TRAINING_RULE, "topk", self._params)

    def thresholds(self, wanted: Sequence[float]) -> tuple[float, ...]:
        """The thresholds of expert-choice, without a measurement."""
        found: tuple[float, ...] = ()
        for share, always in zip(wanted, takes_all(self._cfg.model), strict=True):
            if always:
                # Routing ignores it.
                found += (0.0,)
                continue
            logits, tokens = self._candidates(found)
            found += (threshold(logits, round(share * tokens)),)
        return found

    def _candidates(self, before: tuple[float, ...]) -> tuple[np.ndarray, int]:
        """Logits of the tokens that reach recursion len(before), and how many tokens there are."""
        if before not in self._known:
            recursion, kept, tokens = len(before), [], 0
            rest = (0.0,) * (self._cfg.model.num_recursions - recursion)
            given = jnp.asarray(before + rest, jnp.float32)
            for batch in self._text.fit:
                each = self._logits(self._params, batch, given)
                logits, there, present = jax.device_get((*each[recursion], _present(batch)))
                kept.append(logits[there])
                tokens += int(np.sum(present))
            self._known[before] = np.concatenate(kept), tokens
        return self._known[before]

    def _token_scores(self) -> np.ndarray:
        if () not in self._known:
            kept = []
            for batch in self._text.fit:
                scores, present = jax.device_get(
                    (self._scores(self._params, batch), _present(batch))
                )
                kept.append(scores[present])
            self._known[()] = np.concatenate(kept), 0
        return self._known[()][0]

    def _point(
        self, name: str, mode: str, params: Params, thresholds: tuple[float, ...] | None = None
    ) -> CalibrationPoint:
        # Always an array, so that one compiled function serves all; 0 is the default threshold.
        given = jnp.asarray(thresholds or (0.0,) * self._cfg.model.num_recursions, jnp.float32)
        sums = [self._evaluate(params, batch, given, mode=mode) for batch in self._text.unseen]
        total = jax.tree.map(lambda *leaves: np.sum(leaves, axis=0), *jax.device_get(sums))
        counts = total["depth_count"]
        # Share with a depth of at least r + 1.
        shares = tuple(float(counts[r:].sum() / counts.sum()) for r in range(1, len(counts)))
        loss = float(total["ce"] / total["targets"])
        return CalibrationPoint(name=name, loss=loss, shares=shares, work=self._work(shares))

    def _work(self, shares: tuple[float, ...]) -> float:
        model, length = self._cfg.model, self._cfg.seq_len
        full = flops(model, length, (1.0,) * model.num_recursions).forward()
        return flops(model, length, shares).forward() / full


def candidate_logits(
    cfg: ModelConfig, params: Params, batch: Batch, thresholds: Float[Array, "r"]
) -> list[tuple[Float[Array, "b l"], Bool[Array, "b l"]]]:
    """For each recursion of expert-choice: deciding logits, and which tokens are candidates.

    Under causal routing with `thresholds`, so recursion r's depend on those before it alone.
    """
    routing = forward(cfg, params, batch, Route(mode="causal", thresholds=thresholds)).routing
    assert routing is not None
    there, found = _present(batch), []
    for visit in routing.recursion_traces:
        found.append((visit.trained, there))
        # The slots of this recursion are the candidates of the next.
        there = jnp.ones_like(there) if visit.valid is None else visit.valid
    return found


def depth_scores(cfg: ModelConfig, params: Params, batch: Batch) -> Float[Array, "b l r"]:
    """Scores of each depth that token-choice ranks, balancing bias included."""
    routing = forward(cfg, params, batch, Route(mode="causal")).routing
    assert routing is not None
    scores = token_score(cfg.router, routing.recursion_traces[0].logits)
    return scores + params["router"]["bias"][None, None]


def _present(batch: Batch) -> Bool[Array, "b l"]:
    return jnp.ones(batch.tokens.shape, bool) if batch.segments is None else batch.segments > 0
