"""Depth at test time: loss and a sample against the number of recursions."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from mor_jax import data
from mor_jax.analysis.figures import recursion_figure
from mor_jax.analysis.output_directory import Write, json_lines, number
from mor_jax.analysis.routing_record import ROUTINGS
from mor_jax.analysis.text_input import TokenBatches
from mor_jax.checkpoint.load_weights import RunWeights
from mor_jax.config import TrainConfig
from mor_jax.config.parsing import check
from mor_jax.data.tokenizers.base import Tokenizer
from mor_jax.inference.calibration_file import Calibration, load
from mor_jax.inference.config import EngineConfig, compute_config
from mor_jax.inference.engine.engine import Engine
from mor_jax.inference.engine.request import Request, SamplingParams
from mor_jax.inference.load_model import LoadedModel, check_finite, is_causal, prepare_model
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

    found: RunWeights
    cfg: TrainConfig
    params: Params
    tokenizer: Tokenizer
    calibration: Calibration | None
    numbers: tuple[int, ...]
    routings: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def usual(self) -> int:
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
            name=str(self.found),
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
    found: RunWeights, calibration: str | None, wanted: Sequence[int] | None
) -> TruncatedModel:
    """Loads the weights `found` for several numbers of recursions.

    wanted: the numbers; None: from 1 to twice the trained number, as far as the model allows.

    Raises:
        ValueError: a vanilla model, a parameter that is not finite, or a calibration, tokenizer or
            number of recursions that does not fit.
    """
    model = found.cfg.model
    rule = "a vanilla model has no recursions: it runs its layers once"
    fix = "Give a run with model.sharing other than 'none'; mor evaluate measures its loss"
    check(model.sharing != "none", "model.sharing", model.sharing, rule, fix)
    calibrated = None if calibration is None else load(found, calibration)
    tokenizer = data.load_tokenizer(found.cfg.data.tokenizer)
    params = found.params()
    check_finite(params, str(found))
    model = compute_config(model, None)
    routings, notes = ("causal", "topk"), ()
    if model.router.kind == "none":
        routings = ("causal",)
    elif calibrated is None and not is_causal(model):
        routings = ("topk",)
        note = "only top-k routing and no sample: causal routing needs thresholds, because these "
        notes = (note + "routers were not trained to predict the selection (mor calibrate)",)
    elif model.router.kind == "token" and model.router.capacity_factor is None:
        routings = ("causal",)
    most = 2 * model.num_recursions
    if calibrated is not None:
        most = calibrated.recursions
    elif model.router.kind == "token" or not model.share_norms:
        most = model.num_recursions
    made = TruncatedModel(
        found=found,
        cfg=dataclasses.replace(found.cfg, model=model),
        params=params,
        tokenizer=tokenizer,
        calibration=calibrated,
        numbers=tuple(range(1, most + 1) if wanted is None else sorted(set(wanted))),
        routings=routings,
        notes=notes,
    )
    for each in made.numbers:
        # Fail before the first measurement, not after an hour of them.
        made.at(each)
    return made


@dataclasses.dataclass(frozen=True, eq=False)
class DepthScaling:
    """Losses and samples by number of recursions. records: as docs/analysis.md describes them."""

    model: TruncatedModel
    records: list[Record]

    def of(self, statistic: str, **fields: Any) -> list[Record]:
        """Records of `statistic` (`loss` or `sample`) with these field values."""
        wanted = {"statistic": statistic, **fields}
        return [r for r in self.records if all(r[k] == v for k, v in wanted.items())]

    def files(self) -> dict[str, Write]:
        """recursions.jsonl and recursions.png."""
        curves = {ROUTINGS[m]: self.of("loss", routing=m) for m in self.model.routings}
        if self.model.cfg.model.router.kind == "none":
            curves = {"": self.of("loss")}
        about, trained = self.model.found.name, self.model.cfg.model.num_recursions
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
        made = [f"{head}{'mean depth':>12}{'work':>8}"]
        for one in self.of("loss"):
            trained = " trained" if one["trained"] else ""
            name = f"{one['recursions']}{trained}"
            routed = self.model.cfg.model.router.kind != "none"
            made.append(
                f"{name:<14}{ROUTINGS[one['routing']] if routed else 'none':<9}{one['loss']:>8.4f}"
                f"{one['perplexity']:>12.2f}{one['depth']:>12.3f}{one['work']:>8.1%}"
            )
        made.append(
            "work: FLOPs of a forward pass; 100%: as trained, every token at every recursion"
        )
        for one in self.of("sample"):
            depth = f", mean depth {one['depth']:.2f}" if one["depth"] is not None else ""
            made += ["", f"with {one['recursions']}{depth}:"]
            made += [f"  {_printable(line)}" for line in (one["prompt"] + one["text"]).split("\n")]
        return made


def _printable(line: str) -> str:
    """The line with control characters replaced, which could steer the terminal."""
    return "".join(char if char.isprintable() or char == "\t" else "\ufffd" for char in line)


def measure(model: TruncatedModel, rows: TokenBatches, sample: Sample) -> DepthScaling:
    """Loss and sample for each number of recursions. Raises `ValueError` for a bad `sample`."""
    prompt = tuple(model.tokenizer.encode(sample.text).tolist())
    rule = "must not be negative; 0 means no sample"
    check(sample.max_tokens >= 0, "sample.max_tokens", sample.max_tokens, rule, "Try 64")
    wanted = sample.max_tokens != 0 and "causal" in model.routings
    if wanted:
        request = Request(
            prompt=prompt or (model.tokenizer.eos_id,),
            max_tokens=sample.max_tokens,
            sampling=sample.sampling,
        )
        request.validate(model.cfg.model.vocab_size, model.cfg.model.max_seq_len, "sample")
    records, samples = [], []
    for recursions in model.numbers:
        served = model.at(recursions)
        records += _losses(model, served, rows)
        if wanted:
            samples.append(_sample(served, request, sample.text))
    return DepthScaling(model, records + samples)


def _losses(model: TruncatedModel, served: LoadedModel, rows: TokenBatches) -> list[Record]:
    """One record per routing."""
    cfg = dataclasses.replace(model.cfg, model=served.cfg, seq_len=rows.length)
    found = _evaluator(cfg, rows, served.thresholds)(served.params)
    trained, records = model.cfg.model, []
    full = flops(trained, rows.length, (1.0,) * trained.num_recursions).forward()
    for routing in model.routings:
        depths = found.get(f"depth_share_{routing}")
        shares = (1.0,) * served.cfg.num_recursions
        if depths is not None:
            # Rounding may raise a sum of shares above 1.
            shares = tuple(min(1.0, sum(depths[r + 1 :])) for r in range(served.cfg.num_recursions))
        loss = found[f"loss_{routing}"]
        records.append(
            {
                "statistic": "loss",
                "recursions": served.cfg.num_recursions,
                "trained": served.cfg.num_recursions == trained.num_recursions,
                "routing": routing,
                "loss": number(loss),
                "perplexity": number(math.exp(loss)),
                "accuracy": number(found[f"accuracy_{routing}"]),
                "depth": number(sum(shares)),
                "shares": [number(share) for share in shares],
                "work": number(flops(served.cfg, rows.length, shares).forward() / full),
            }
        )
    return records


def _evaluator(
    cfg: TrainConfig, rows: TokenBatches, thresholds: tuple[float, ...] | None
) -> Evaluator:
    def step(params: Params, batch: Batch, mode: str) -> Any:
        return eval_step(cfg, params, batch, mode, thresholds)

    program = CheckedFunction(step, "batch_size")
    return Evaluator(cfg, _counted(rows), lambda *given: program(*given[:2], mode=given[2]))


def _counted(rows: TokenBatches) -> list[Batch]:
    """The batches, with targets only at tokens that count."""
    pairs = zip(rows.batches, rows.fresh, strict=True)
    return [
        dataclasses.replace(batch, targets=np.where(fresh, batch.targets, IGNORE))
        for batch, fresh in pairs
    ]


def _sample(served: LoadedModel, request: Request, text: str) -> Record:
    longest = 1 << (len(request.prompt) + request.max_tokens - 1).bit_length()
    settings = EngineConfig(slots=1, max_length=min(longest, served.cfg.max_seq_len))
    with Engine(served, settings) as engine:
        tokens, finished = engine.submit(request).result()
    check(finished.reason != "error", "sample", text, finished.message, "Try another text")
    depths = [token.depth for token in tokens]
    routed = served.cfg.router.kind != "none" and bool(depths)
    return {
        "statistic": "sample",
        "recursions": served.cfg.num_recursions,
        "prompt": text,
        "text": "".join(token.text for token in tokens) + finished.text,
        "tokens": [token.id for token in tokens],
        "depths": depths,
        "depth": number(np.mean(depths)) if routed else None,
        "reason": finished.reason,
    }
