"""The routing of every token of a text, under causal and top-k routing, as NumPy arrays."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from mor_jax import data
from mor_jax.analysis.passes import compiled
from mor_jax.analysis.text_input import TokenBatches
from mor_jax.checkpoint.load_weights import RunWeights
from mor_jax.config import ModelConfig, TrainConfig
from mor_jax.config.parsing import fail
from mor_jax.data.tokenizers.base import Tokenizer
from mor_jax.inference.calibration_file import load
from mor_jax.inference.config import compute_config
from mor_jax.inference.load_model import check_finite, is_causal, prepare_model
from mor_jax.types import Params

ROUTINGS = {"causal": "causal", "topk": "top-k"}
"""Name in records -> name in tables."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class RoutedModel:
    """The weights of a run, ready for analysis.

    cfg: of the run, with the model as it runs here. thresholds: of causal routing of expert-choice,
    one per recursion. calibration: its name, None without. modes: routings that apply, that of
    generation first. notes: lines for the report.
    """

    weights: RunWeights
    cfg: TrainConfig
    params: Params
    tokenizer: Tokenizer
    thresholds: tuple[float, ...] | None
    calibration: str | None
    modes: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def model(self) -> ModelConfig:
        """The model's configuration as it runs here."""
        return self.cfg.model

    @property
    def name(self) -> str:
        """For titles: the run's name, the step, and changes against training."""
        return f"{self.weights.name}{self._changes}"

    def __str__(self) -> str:
        return f"{self.weights}{self._changes}"

    @property
    def _changes(self) -> str:
        return self.weights.changes(self.model.num_recursions, self.calibration)


def routed_model(
    weights: RunWeights, calibration: str | None = None, recursions: int | None = None
) -> RoutedModel:
    """Loads `weights` for analysis; calibration, recursions: as in `load_model`.

    Raises:
        ValueError: the model has no routers, a parameter is not finite, or calibration,
            recursions or tokenizer do not fit it.
    """
    check_routed(weights)
    calibrated = None if calibration is None else load(weights, calibration)
    tokenizer = data.load_tokenizer(weights.cfg.data.tokenizer)
    params = weights.params()
    check_finite(params, str(weights))
    model, params, thresholds, _ = prepare_model(weights.cfg.model, params, calibrated, recursions)
    # Rounding changes logits, so the dtype is the one that calibrations use.
    model = compute_config(model, None)
    modes, notes = applicable_routings(model, calibrated is not None), ()
    if "causal" not in modes:
        note = "only top-k routing: these routers were not trained to predict the selection, so "
        notes = (note + "causal routing needs thresholds (mor calibrate, --calibration)",)
    return RoutedModel(
        weights=weights,
        cfg=dataclasses.replace(weights.cfg, model=model),
        params=params,
        tokenizer=tokenizer,
        thresholds=thresholds,
        calibration=calibration,
        modes=modes,
        notes=notes,
    )


def applicable_routings(model: ModelConfig, calibrated: bool) -> tuple[str, ...]:
    """Routings that differ and that the model can run, that of generation first."""
    router = model.router
    if router.kind == "none" or (router.kind == "token" and router.capacity_factor is None):
        # The two are equal where no recursion has a capacity limit.
        return ("causal",)
    return ("causal", "topk") if calibrated or is_causal(model) else ("topk",)


def check_routed(weights: RunWeights) -> None:
    """Raises `ValueError` for a model without routers; the message names an alternative."""
    model = weights.cfg.model
    if model.router.kind != "none":
        return
    if model.sharing == "none":
        rule = "this model has no routers: every token goes through every layer"
        fail("model.sharing", model.sharing, rule, "mor evaluate measures its loss")
    rule = f"this model has no routers: every token takes all {model.num_recursions} recursions"
    fix = "mor analyze depth measures loss against the number of recursions"
    fail("model.router.kind", model.router.kind, rule, fix)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoutingPass:
    """All tokens under one routing.

    depth: int16 [n]. ahead: loss of the next token; loss: loss of this token, predicted from the
    one before; both in nats, float32 [n], NaN where there is none. logits, main: as in
    `RoutedOutput`, float32 [r n].
    """

    depth: np.ndarray
    ahead: np.ndarray
    loss: np.ndarray
    logits: np.ndarray
    main: np.ndarray | None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class RoutingRecord:
    """All tokens that count, in order.

    token: ID; sequence: index of its sequence; position: in it; each int32 [n]. passes: by routing.
    """

    model: RoutedModel
    sequences: TokenBatches
    token: np.ndarray
    sequence: np.ndarray
    position: np.ndarray
    passes: dict[str, RoutingPass]

    @property
    def first(self) -> RoutingPass:
        """The pass under the first routing: that of generation, if it applies to the model."""
        return self.passes[self.model.modes[0]]

    def sequence_starts(self) -> np.ndarray:
        """Indices of the first token of each sequence, ascending."""
        return np.flatnonzero(np.append(True, np.diff(self.sequence) != 0))


def observe(model: RoutedModel, sequences: TokenBatches) -> RoutingRecord:
    """Runs the model on all batches; stores a few dozen bytes per token on the host."""
    run = compiled(model.model, model.modes)
    thresholds = None if model.thresholds is None else jnp.asarray(model.thresholds, jnp.float32)
    arrays: dict[str, list[list[np.ndarray]]] = {mode: [] for mode in model.modes}
    token, sequence, position = [], [], []
    for batch_index, (batch, counted) in enumerate(
        zip(sequences.batches, sequences.counted, strict=True)
    ):
        outputs = jax.device_get(run(model.params, batch, thresholds))
        indices = np.nonzero(counted)
        token.append(np.asarray(batch.tokens)[indices].astype(np.int32))
        sequence.append((batch_index * len(counted) + indices[0]).astype(np.int32))
        position.append(indices[1].astype(np.int32))
        for mode, output in outputs.items():
            loss = np.full_like(output.ahead, np.nan)
            loss[:, 1:] = output.ahead[:, :-1]
            parts = [output.depth.astype(np.int16), output.ahead, loss]
            counted_values = [part[indices] for part in parts]
            counted_values.append(output.logits[:, *indices])
            if output.main is not None:
                counted_values.append(output.main[:, *indices])
            arrays[mode].append(counted_values)
    passes = {mode: _concatenate(parts, sequences.contiguous) for mode, parts in arrays.items()}
    return RoutingRecord(
        model=model,
        sequences=sequences,
        token=np.concatenate(token),
        sequence=np.concatenate(sequence),
        position=np.concatenate(position),
        passes=passes,
    )


def _concatenate(parts: list[list[np.ndarray]], contiguous: bool) -> RoutingPass:
    arrays = [np.concatenate(part, axis=-1) for part in zip(*parts, strict=True)]
    depth, ahead, loss, logits = arrays[:4]
    if contiguous:
        # In one text the end of a window predicts the first token of the next.
        loss = np.append(np.float32(np.nan), ahead[:-1])
    return RoutingPass(
        depth=depth, ahead=ahead, loss=loss, logits=logits, main=arrays[4] if arrays[4:] else None
    )


def scores(model: ModelConfig, logits: np.ndarray) -> np.ndarray:
    """Logits [r n] as probabilities in [0, 1]: of selection, or of each depth for token-choice.

    Expert-choice: the sigmoid, as in the auxiliary loss, whatever `router.activation` is.
    Token-choice: the softmax over depths, or the sigmoid, without alpha and balancing bias.
    """
    if model.router.kind == "token" and model.router.activation == "softmax":
        shifted = np.exp(logits - logits.max(axis=0, keepdims=True))
        return shifted / shifted.sum(axis=0, keepdims=True)
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-logits))
