"""What a trained or imported model loses on held-out text: `launch/evaluate.py`."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from mor_jax import data, sharding
from mor_jax.config import MeshConfig, TrainConfig
from mor_jax.evaluate import Evaluator, modes
from mor_jax.load import Found
from mor_jax.serve.calibration import load
from mor_jax.serve.served import ready
from mor_jax.state import abstract_params, logical_axes
from mor_jax.types import IGNORE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """What to evaluate on. None: as the run itself does it.

    sources: other text, all of it, written as `data.sources`. length: tokens of a row. batches,
    batch_size: of rows. fsdp: devices over which each parameter is cut; the others take rows.
    calibration: name or file of one, for causal routing. recursions: to run in place of those
    trained or calibrated.
    """

    sources: tuple[str, ...] | None = None
    length: int | None = None
    batches: int | None = None
    batch_size: int | None = None
    fsdp: int = 1
    calibration: str | None = None
    recursions: int | None = None


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """cfg: as it was evaluated. text: what on, for people. values: as `Evaluator` gives them.

    calibration: what was asked for.
    """

    found: Found
    cfg: TrainConfig
    text: str
    rows: int
    values: dict[str, Any]
    calibration: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON values, perplexities included."""
        losses = {name: loss for name, loss in self.values.items() if name.startswith("loss_")}
        more = {f"perplexity_{name[5:]}": math.exp(loss) for name, loss in losses.items()}
        facts = {"workdir": str(self.found.path), "step": self.found.step, "text": self.text}
        facts |= {"calibration": self.calibration, "recursions": self.cfg.model.recursions}
        return {**facts, "rows": self.rows, "length": self.cfg.length, **self.values, **more}

    def lines(self) -> list[str]:
        """The same for a terminal: a line a routing, aligned."""
        tokens = self.rows * self.cfg.length
        made = [
            f"{self.found}{self._changed()}",
            f"{self.text}: {self.rows} rows of {self.cfg.length} tokens, {tokens:,} in all",
            "",
            f"{'routing':<10}{'loss':>9}{'perplexity':>13}{'accuracy':>11}{'mean depth':>13}",
        ]
        routed = self.cfg.model.router.kind != "none"
        for mode in reversed(modes(self.cfg.model)):
            loss, right = self.values[f"loss_{mode}"], self.values[f"accuracy_{mode}"]
            depth = f"{self.values[f'depth_{mode}']:.2f}" if routed else "-"
            name = {"causal": "causal", "topk": "top-k"}[mode] if routed else "none"
            perplexity = f"{math.exp(loss):.2f}"
            made.append(f"{name:<10}{loss:>9.4f}{perplexity:>13}{right:>11.2%}{depth:>13}")
        if routed:
            made += [
                "",
                "causal looks at no later token, as generation; top-k is the training rule",
            ]
        return made

    def _changed(self) -> str:
        # What makes it another model than the run trained.
        there, now = self.found.cfg.model.recursions, self.cfg.model.recursions
        told = f", {now} recursions in place of {there}" if now != there else ""
        return f"{told}, calibration {self.calibration}" if self.calibration else told


def evaluate(found: Found, asked: Asked) -> Evaluation:
    """Losses of the weights `found`, nats per token, under every routing that the model has.

    Raises:
        ValueError: text, rows, tokenizer, devices, calibration or recursions do not fit.
    """
    cfg = config_for(found.cfg, asked)
    calibration = None if asked.calibration is None else load(found, asked.calibration)
    mesh = sharding.make_mesh(MeshConfig(fsdp=asked.fsdp))
    sharding.check_rows(mesh, "batch_size", cfg.eval.batch_size)
    sharding.check_length(mesh, cfg.length)
    tokenizer = data.load_tokenizer(cfg.data.tokenizer)
    data.check_vocabulary(tokenizer, cfg.model.vocab_size)
    layout = data.Layout(length=cfg.length, batch_size=cfg.eval.batch_size)
    split = "heldout" if asked.sources is None else "all"
    batches = data.heldout_batches(cfg.data, tokenizer, layout, cfg.eval.batches, split)
    axes, shapes = logical_axes(cfg.model), abstract_params(cfg.model)
    params = found.params(sharding.param_shardings(mesh, axes, shapes))
    model, params, thresholds, _ = ready(cfg.model, params, calibration, asked.recursions)
    cfg = dataclasses.replace(cfg, model=model)
    where = sharding.batch_sharding(mesh)
    with jax.set_mesh(mesh):
        placed = [jax.device_put(batch, where) for batch in batches]
        values = Evaluator.of(cfg, placed, thresholds)(params)
    names = ", ".join(cfg.data.sources)
    text = f"held-out part of {names}" if asked.sources is None else names
    # A last batch is filled up with rows without targets.
    rows = sum(int(np.any(batch.targets != IGNORE, axis=1).sum()) for batch in batches)
    return Evaluation(found, cfg, text, rows, values, asked.calibration)


def config_for(cfg: TrainConfig, asked: Asked) -> TrainConfig:
    """A run's configuration with the rows that are asked for. Raises `ValueError` as `evaluate`."""
    given = dataclasses.replace(
        cfg.eval,
        batches=cfg.eval.batches if asked.batches is None else asked.batches,
        batch_size=cfg.eval.batch_size if asked.batch_size is None else asked.batch_size,
    )
    text = cfg.data
    if asked.sources is not None:
        text = dataclasses.replace(text, sources=asked.sources, weights=None)
    length = cfg.length if asked.length is None else asked.length
    made = dataclasses.replace(cfg, eval=given, data=text, length=length)
    made.validate()
    return made
