"""Depth at test time: loss and a sample against the number of recursions."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from mor_jax import data
from mor_jax.analysis.figures import recursion_figure
from mor_jax.analysis.output_directory import FileContents, json_lines, rounded
from mor_jax.analysis.routing_record import ROUTINGS, applicable_routings
from mor_jax.analysis.text_input import TokenBatches
from mor_jax.checkpoint.load_weights import RunWeights
from mor_jax.config import TrainConfig
from mor_jax.config.parsing import check
from mor_jax.data.tokenizers.base import Tokenizer
from mor_jax.inference.calibration_file import Calibration, load
from mor_jax.inference.config import EngineConfig, compute_config
from mor_jax.inference.engine.engine import Engine
from mor_jax.inference.engine.request import Request, SamplingParams
from mor_jax.inference.load_model import LoadedModel, check_finite, prepare_model
from mor_jax.models.flops import flops
from mor_jax.runtime.free_memory import CheckedFunction
from mor_jax.training.evaluator import Evaluator
from mor_jax.training.train_step import eval_step
from mor_jax.types import IGNORE, Batch, Params

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """The sample to generate with each number of recursions. text: the prompt.

    max_tokens: 0 for no sample. temperature, seed: as in `SamplingParams`.
    """

    text: str
    max_tokens: int
    temperature: float = 0.0
    seed: int = 0

    @property
    def sampling(self) -> SamplingParams:
        """The engine's sampling parameters."""
        return SamplingParams(temperature=self.temperature, seed=self.seed)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TruncatedModel:
    """A run's weights that can be run with several numbers of recursions.

    cfg: as trained, in the dtype of generation. numbers: of recursions to run, ascending.
    routings: those that apply to the model. notes: lines for the report.
    """

    weights: RunWeights
    cfg: TrainConfig
    params: Params
    tokenizer: Tokenizer
    calibration: Calibration | None
    numbers: tuple[int, ...]
    routings: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def default_recursions(self) -> int:
        """Default number of recursions: that of the calibration, or of training."""
        if self.calibration is not None:
            return self.calibration.recursions
        return self.cfg.model.num_recursions

    def at(self, recursions: int) -> LoadedModel:
        """The model with this number of recursions. Raises `ValueError` if it cannot run them."""
        model, params, thresholds, shares = prepare_model(
            self.cfg.model, self.params, self.calibration, recursions
        )
        return LoadedModel(
            name=str(self.weights),
            cfg=model,
            params=params,
            thresholds=thresholds,
            shares=shares,
            tokenizer=self.tokenizer,
            chat_template=None,
            special_tokens={},
            eos_ids=frozenset({self.tokenizer.eos_id}),
            created=0,
        )


def truncate_model(
    weights: RunWeights, calibration: str | None, numbers: Sequence[int] | None
) -> TruncatedModel:
    """Loads `weights` for several numbers of recursions.

    numbers: those to run; None: from 1 to twice the trained number, as far as the model allows.

    Raises:
        ValueError: a vanilla model, a parameter that is not finite, or a calibration, tokenizer or
            number of recursions that does not fit.
    """
    model = weights.cfg.model
    rule = "a vanilla model has no recursions: it runs its layers once"
    fix = "Give a run with model.sharing other than 'none'; mor evaluate measures its loss"
    check(model.sharing != "none", "model.sharing", model.sharing, rule, fix)
    calibrated = None if calibration is None else load(weights, calibration)
    tokenizer = data.load_tokenizer(weights.cfg.data.tokenizer)
    params = weights.params()
    check_finite(params, str(weights))
    model = compute_config(model, None)
    routings, notes = applicable_routings(model, calibrated is not None), ()
    if "causal" not in routings:
        note = "only top-k routing and no sample: causal routing needs thresholds, because these "
        notes = (note + "routers were not trained to predict the selection (mor calibrate)",)
    largest = 2 * model.num_recursions
    if calibrated is not None:
        largest = calibrated.recursions
    elif model.router.kind == "token" or not model.share_norms:
        largest = model.num_recursions
    truncated = TruncatedModel(
        weights=weights,
        cfg=dataclasses.replace(weights.cfg, model=model),
        params=params,
        tokenizer=tokenizer,
        calibration=calibrated,
        numbers=tuple(range(1, largest + 1) if numbers is None else sorted(set(numbers))),
        routings=routings,
        notes=notes,
    )
    for recursions in truncated.numbers:
        # Fail before the first measurement, not after an hour of them.
        truncated.at(recursions)
    return truncated


@dataclasses.dataclass(frozen=True, eq=False)
class DepthScaling:
    """Losses and samples by number of recursions. records: as docs/analysis.md describes them."""

    model: TruncatedModel
    records: list[Record]

    def of(self, statistic: str, **fields: Any) -> list[Record]:
        """Records of `statistic` (`loss` or `sample`) with these field values."""
        criteria = {"statistic": statistic, **fields}
        return [r for r in self.records if all(r[k] == v for k, v in criteria.items())]

    def files(self) -> dict[str, FileContents]:
        """recursions.jsonl and recursions.png."""
        curves = {ROUTINGS[m]: self.of("loss", routing=m) for m in self.model.routings}
        if self.model.cfg.model.router.kind == "none":
            curves = {"": self.of("loss")}
        about, trained = self.model.weights.name, self.model.cfg.model.num_recursions
        return {
            "recursions.jsonl": json_lines(self.records),
            "recursions.png": lambda path: recursion_figure(curves, trained, about, path),
        }

    def facts(self) -> Record:
        """JSON values."""
        return {"trained": self.model.cfg.model.num_recursions, "records": self.records}

    def lines(self) -> list[str]:
        """A table, then the samples, for a terminal."""
        head = f"{'recursions':<14}{'routing':<9}{'loss':>8}{'perplexity':>12}"
        lines = [f"{head}{'mean depth':>12}{'work':>8}"]
        for record in self.of("loss"):
            trained = " trained" if record["trained"] else ""
            name = f"{record['recursions']}{trained}"
            routed = self.model.cfg.model.router.kind != "none"
            routing = ROUTINGS[record["routing"]] if routed else "none"
            lines.append(
                f"{name:<14}{routing:<9}{record['loss']:>8.4f}"
                f"{record['perplexity']:>12.2f}{record['depth']:>12.3f}{record['work']:>8.1%}"
            )
        lines.append(
            "work: FLOPs of a forward pass; 100%: as trained, every token at every recursion"
        )
        for record in self.of("sample"):
            depth = f", mean depth {record['depth']:.2f}" if record["depth"] is not None else ""
            lines += ["", f"with {record['recursions']}{depth}:"]
            lines += [
                f"  {_printable(line)}" for line in (record["prompt"] + record["text"]).split("\n")
            ]
        return lines


def _printable(line: str) -> str:
    """The line with control characters replaced, which could steer the terminal."""
    return "".join(char if char.isprintable() or char == "\t" else "\ufffd" for char in line)


def measure(model: TruncatedModel, sequences: TokenBatches, sample: Sample) -> DepthScaling:
    """Loss and sample for each number of recursions. Raises `ValueError` for a bad `sample`."""
    prompt = tuple(model.tokenizer.encode(sample.text).tolist())
    rule = "must not be negative; 0 means no sample"
    check(sample.max_tokens >= 0, "sample.max_tokens", sample.max_tokens, rule, "Try 64")
    with_sample = sample.max_tokens != 0 and "causal" in model.routings
    if with_sample:
        request = Request(
            prompt=prompt or (model.tokenizer.eos_id,),
            max_tokens=sample.max_tokens,
            sampling=sample.sampling,
        )
        request.validate(model.cfg.model.vocab_size, model.cfg.model.max_seq_len, "sample")
    records, samples = [], []
    for recursions in model.numbers:
        loaded = model.at(recursions)
        records += _losses(model, loaded, sequences)
        if with_sample:
            samples.append(_sample(loaded, request, sample.text))
    return DepthScaling(model, records + samples)


def _losses(model: TruncatedModel, loaded: LoadedModel, sequences: TokenBatches) -> list[Record]:
    """One record per routing."""
    cfg = dataclasses.replace(model.cfg, model=loaded.cfg, seq_len=sequences.length)
    values = _evaluator(cfg, sequences, loaded.thresholds)(loaded.params)
    trained, records = model.cfg.model, []
    full = flops(trained, sequences.length, (1.0,) * trained.num_recursions).forward()
    for routing in model.routings:
        depths = values.get(f"depth_share_{routing}")
        shares = (1.0,) * loaded.cfg.num_recursions
        if depths is not None:
            # Rounding may raise a sum of shares above 1.
            shares = tuple(min(1.0, sum(depths[r + 1 :])) for r in range(loaded.cfg.num_recursions))
        loss = values[f"loss_{routing}"]
        records.append(
            {
                "statistic": "loss",
                "recursions": loaded.cfg.num_recursions,
                "trained": loaded.cfg.num_recursions == trained.num_recursions,
                "routing": routing,
                "loss": rounded(loss),
                "perplexity": rounded(math.exp(loss)),
                "accuracy": rounded(values[f"accuracy_{routing}"]),
                "depth": rounded(sum(shares)),
                "shares": [rounded(share) for share in shares],
                "work": rounded(flops(loaded.cfg, sequences.length, shares).forward() / full),
            }
        )
    return records


def _evaluator(
    cfg: TrainConfig, sequences: TokenBatches, thresholds: tuple[float, ...] | None
) -> Evaluator:
    def step(params: Params, batch: Batch, mode: str) -> Any:
        return eval_step(cfg, params, batch, mode, thresholds)

    function = CheckedFunction(step, "batch_size")
    return Evaluator(
        cfg, _with_counted_targets(sequences), lambda *args: function(*args[:2], mode=args[2])
    )


def _with_counted_targets(sequences: TokenBatches) -> list[Batch]:
    """The batches, with targets only at tokens that count."""
    pairs = zip(sequences.batches, sequences.counted, strict=True)
    return [
        dataclasses.replace(batch, targets=np.where(counted, batch.targets, IGNORE))
        for batch, counted in pairs
    ]


def _sample(loaded: LoadedModel, request: Request, text: str) -> Record:
    longest = 1 << (len(request.prompt) + request.max_tokens - 1).bit_length()
    settings = EngineConfig(slots=1, max_length=min(longest, loaded.cfg.max_seq_len))
    with Engine(loaded, settings) as engine:
        tokens, finished = engine.submit(request).result()
    check(finished.reason != "error", "sample", text, finished.message, "Try another text")
    depths = [token.depth for token in tokens]
    routed = loaded.cfg.router.kind != "none" and bool(depths)
    return {
        "statistic": "sample",
        "recursions": loaded.cfg.num_recursions,
        "prompt": text,
        "text": "".join(token.text for token in tokens) + finished.text,
        "tokens": [token.id for token in tokens],
        "depths": depths,
        "depth": rounded(np.mean(depths)) if routed else None,
        "reason": finished.reason,
    }
