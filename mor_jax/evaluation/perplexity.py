"""Loss and perplexity of a trained or imported model on validation text."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from mor_jax import data
from mor_jax.checkpoint.load_weights import RunWeights
from mor_jax.config import MeshConfig, TrainConfig
from mor_jax.config.parsing import check
from mor_jax.distributed import mesh as sharding
from mor_jax.evaluation import report
from mor_jax.evaluation.byte_spans import TextBytes
from mor_jax.evaluation.eval_config import EvalRequest, config_for
from mor_jax.evaluation.loss_sums import position_starts, row_sums, total
from mor_jax.inference.calibration_file import load
from mor_jax.inference.load_model import prepare_model
from mor_jax.models.params import abstract_params, logical_axes
from mor_jax.runtime.free_memory import CheckedFunction
from mor_jax.training.evaluator import modes
from mor_jax.types import IGNORE, Batch, Params


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Result of an evaluation on text.

    cfg: as evaluated. text: name of the data. rows: sequences. values: see `to_dict`. calibration:
    as requested.
    """

    found: RunWeights
    cfg: TrainConfig
    text: str
    rows: int
    values: dict[str, Any]
    calibration: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON values. Means are over all targets, losses in nats, by routing (`modes`).

        rows (sequences), targets, bytes (of their text), document_ends (targets without bytes).
        loss_*, perplexity_*, bits_per_byte_* (None without text), accuracy_*; routed: also depth_*
        (mean recursions per token), depth_share_* (share of tokens at depth 0 .. Nr), leak
        (loss_causal - loss_topk), by_depth. by_position: groups of positions in the sequence.
        sources: the same values for each source.
        """
        facts = {"workdir": str(self.found.path), "step": self.found.step, "text": self.text}
        facts |= {"calibration": self.calibration, "recursions": self.cfg.model.num_recursions}
        return {**facts, "rows": self.rows, "length": self.cfg.seq_len, **self.values}

    def lines(self) -> list[str]:
        """Aligned tables for a terminal."""
        changes = self.found.changes(self.cfg.model.num_recursions, self.calibration)
        size = f"{self.rows} sequences of {self.cfg.seq_len} tokens"
        return [f"{self.found}{changes}", *report.lines(f"{self.text}: {size}", self.values)]


class TextEvaluation:
    """Evaluates weights on one text, read once; compiles once per model and routing mode."""

    def __init__(self, cfg: TrainConfig, asked: EvalRequest) -> None:
        """cfg: of the run. Raises `ValueError` as `evaluate`."""
        self._asked, self._cfg = asked, config_for(cfg, asked)
        cfg = self._cfg
        number = jax.device_count()
        rule = f"must divide the {number} devices of this machine"
        check(number % asked.fsdp == 0, "fsdp", asked.fsdp, rule, "Leave it out")
        self._mesh = sharding.make_mesh(MeshConfig(fsdp=asked.fsdp))
        sharding.check_batch_size(self._mesh, "eval.batch_size", cfg.eval.batch_size)
        sharding.check_seq_len(self._mesh, cfg.seq_len)
        tokenizer = data.load_tokenizer(cfg.data.tokenizer)
        data.check_vocabulary(tokenizer, cfg.model.vocab_size)
        layout = data.Layout(length=cfg.seq_len, batch_size=cfg.eval.batch_size)
        given = (cfg.data, tokenizer, layout, cfg.eval.batches, asked.split)
        self._batches = data.validation_batches(*given, sharding.batch_shards(self._mesh))
        self._sources = data.validation_sources(*given)
        self._bytes = TextBytes(tokenizer)
        self._step = functools.lru_cache(maxsize=4)(self._compiled)

    def __call__(self, found: RunWeights) -> Evaluation:
        """Raises `ValueError` if weights, calibration or recursions do not fit."""
        cfg, asked, mesh = self._cfg, self._asked, self._mesh
        calibration = None if asked.calibration is None else load(found, asked.calibration)
        axes, shapes = logical_axes(cfg.model), abstract_params(cfg.model)
        params = found.params(sharding.param_shardings(mesh, axes, shapes))
        model, params, thresholds, _ = prepare_model(
            cfg.model, params, calibration, asked.recursions
        )
        cfg = dataclasses.replace(cfg, model=model)
        where = sharding.batch_sharding(mesh)
        step, sums = self._step(cfg, thresholds), {}
        with jax.set_mesh(mesh):
            for mode in modes(model):
                batches = (jax.device_put(batch, where) for batch in self._batches)
                rows = [step(params, batch, mode=mode) for batch in batches]
                sums[mode] = total([jax.device_get(row) for row in rows])
        names = ", ".join(cfg.data.sources)
        text = names if asked.split == "all" else f"validation split of {names}"
        # The last batch is padded with sequences without targets.
        rows = sum(int(np.any(b.targets != IGNORE, axis=1).sum()) for b in self._batches)
        values = self._values(cfg, sums, rows)
        return Evaluation(found, cfg, text, rows, values, asked.calibration)

    @staticmethod
    def _compiled(cfg: TrainConfig, thresholds: tuple[float, ...] | None) -> CheckedFunction:
        def step(params: Params, batch: Batch, mode: str) -> Any:
            return row_sums(cfg, params, batch, mode, thresholds)

        return CheckedFunction(step, "eval.batch_size", cfg.eval.batch_size)

    def _values(
        self, cfg: TrainConfig, sums: dict[str, dict[str, np.ndarray]], rows: int
    ) -> dict[str, Any]:
        counted = [self._bytes(batch) for batch in self._batches]
        sizes, ends = (np.concatenate(parts) for parts in zip(*counted, strict=True))
        mine = partial(_means, cfg, sums, sizes, ends)
        sources = [
            {"source": name, **mine(np.flatnonzero(self._sources == number))}
            for number, name in enumerate(cfg.data.sources)
        ]
        values = mine(np.arange(rows))
        values["by_position"] = _by_position(cfg, sums)
        if cfg.model.router.kind != "none":
            values["by_depth"] = _by_depth(cfg, sums)
        return {**values, "sources": sources}


def evaluate(found: RunWeights, asked: EvalRequest) -> Evaluation:
    """Losses of the weights `found`, nats per token, under every routing mode of the model.

    Raises:
        ValueError: text, sequences, tokenizer, devices, calibration or recursions do not fit.
    """
    return TextEvaluation(found.cfg, asked)(found)


def _means(
    cfg: TrainConfig,
    sums: dict[str, dict[str, np.ndarray]],
    sizes: np.ndarray,
    ends: np.ndarray,
    rows: np.ndarray,
) -> dict[str, Any]:
    """Values of the sequences `rows` together."""
    found: dict[str, Any] = {}
    size, routings = int(sizes[rows].sum()), modes(cfg.model)
    for mode in routings:
        here = {name: values[rows].sum(axis=0) for name, values in sums[mode].items()}
        nats, targets = here["ce_position"].sum(), here["targets_position"].sum()
        found |= {"rows": len(rows), "targets": int(targets), "bytes": size}
        found["document_ends"] = int(ends[rows].sum())
        found[f"loss_{mode}"] = loss = float(nats / targets)
        found[f"perplexity_{mode}"] = math.exp(loss) if loss < 700 else math.inf
        found[f"bits_per_byte_{mode}"] = float(nats / math.log(2) / size) if size else None
        found[f"accuracy_{mode}"] = float(here["correct"] / targets)
        if "depth_count" in here:
            share = here["depth_count"] / here["depth_count"].sum()
            found[f"depth_{mode}"] = float(share @ np.arange(len(share)))
            found[f"depth_share_{mode}"] = share.tolist()
    if len(routings) == 2:
        found["leak"] = found["loss_causal"] - found["loss_topk"]
    return found


def _by_position(cfg: TrainConfig, sums: dict[str, dict[str, np.ndarray]]) -> list[dict[str, Any]]:
    starts = position_starts(cfg.seq_len)
    lasts = [*(start - 1 for start in starts[1:]), cfg.seq_len - 1]
    each = _losses(sums, "position")
    return [
        {"first": first, "last": last, **group}
        for first, last, group in zip(starts, lasts, each, strict=True)
    ]


def _by_depth(cfg: TrainConfig, sums: dict[str, dict[str, np.ndarray]]) -> list[dict[str, Any]]:
    return [{"depth": depth, **group} for depth, group in enumerate(_losses(sums, "depth"))]


def _losses(sums: dict[str, dict[str, np.ndarray]], by: str) -> Sequence[dict[str, Any]]:
    """Targets and loss of every group under every routing mode; None without targets."""
    made: list[dict[str, Any]] = [{} for _ in next(iter(sums.values()))[f"ce_{by}"][0]]
    for mode, found in sums.items():
        nats, targets = found[f"ce_{by}"].sum(axis=0), found[f"targets_{by}"].sum(axis=0)
        for group, a, b in zip(made, nats, targets, strict=True):
            group |= {f"targets_{mode}": int(b), f"loss_{mode}": float(a / b) if b else None}
    return made
