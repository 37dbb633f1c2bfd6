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
class Model:
    """The weights of a run, ready for analysis.

    cfg: of the run, with the model as it runs here. thresholds: of causal routing of expert-choice,
    one per recursion. calibration: its name, None without. modes: routings that apply, that of
    generation first. notes: lines for the report.
    """

    found: RunWeights
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
        return f"{self.found.name}{self._changes}"

    def __str__(self) -> str:
        return f"{self.found}{self._changes}"

    @property
    def _changes(self) -> str:
        return self.found.changes(self.model.num_recursions, self.calibration)


def routed_model(
    found: RunWeights, calibration: str | None = None, recursions: int | None = None
) -> Model:
    """Loads the weights `found` for analysis; calibration, recursions: as in `load_model`.

    Raises:
        ValueError: the model has no routers, a parameter is not finite, or calibration,
            recursions or tokenizer do not fit it.
    """
    check_routed(found)
    calibrated = None if calibration is None else load(found, calibration)
    tokenizer = data.load_tokenizer(found.cfg.data.tokenizer)
    params = found.params()
    check_finite(params, str(found))
    model, params, thresholds, _ = prepare_model(found.cfg.model, params, calibrated, recursions)
    # Rounding moves logits: the dtype is the one that calibrations are made in.
    model = compute_config(model, None)
    modes, notes = ("causal", "topk"), ()
    if calibrated is None and not is_causal(model):
        modes = ("topk",)
        note = "only top-k routing: these routers were not trained to predict the selection, so "
        notes = (note + "causal routing needs thresholds (mor calibrate, --calibration)",)
    if model.router.kind == "token" and model.router.capacity_factor is None:
        # The two routings are equal where no recursion has a capacity limit.
        modes = ("causal",)
    return Model(
        found=found,
        cfg=dataclasses.replace(found.cfg, model=model),
        params=params,
        tokenizer=tokenizer,
        thresholds=thresholds,
        calibration=calibration,
        modes=modes,
        notes=notes,
    )


def check_routed(found: RunWeights) -> None:
    """Raises `ValueError` for a model without routers; the message names an alternative."""
    model = found.cfg.model
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

    token: ID; row: index of the sequence; position: in it; each int32 [n]. passes: by routing.
    """

    model: Model
    rows: TokenBatches
    token: np.ndarray
    row: np.ndarray
    position: np.ndarray
    passes: dict[str, RoutingPass]

    @property
    def first(self) -> RoutingPass:
        """The pass under the first routing: that of generation, if it applies to the model."""
        return self.passes[self.model.modes[0]]

    def row_starts(self) -> np.ndarray:
        """Indices of the first token of each sequence, ascending."""
        return np.flatnonzero(np.append(True, np.diff(self.row) != 0))


def observe(model: Model, rows: TokenBatches) -> RoutingRecord:
    """Runs the model on all batches; stores a few dozen bytes per token on the host."""
    run = compiled(model.model, model.modes)
    given = None if model.thresholds is None else jnp.asarray(model.thresholds, jnp.float32)
    found: dict[str, list[list[np.ndarray]]] = {mode: [] for mode in model.modes}
    token, row, position = [], [], []
    for number, (batch, fresh) in enumerate(zip(rows.batches, rows.fresh, strict=True)):
        seen = jax.device_get(run(model.params, batch, given))
        where = np.nonzero(fresh)
        token.append(np.asarray(batch.tokens)[where].astype(np.int32))
        row.append((number * len(fresh) + where[0]).astype(np.int32))
        position.append(where[1].astype(np.int32))
        for mode, one in seen.items():
            before = np.full_like(one.ahead, np.nan)
            before[:, 1:] = one.ahead[:, :-1]
            parts = [one.depth.astype(np.int16), one.ahead, before]
            kept = [part[where] for part in parts]
            kept += [one.logits[:, *where]] + ([] if one.main is None else [one.main[:, *where]])
            found[mode].append(kept)
    made = {mode: _joined(parts, rows.joined) for mode, parts in found.items()}
    return RoutingRecord(
        model=model,
        rows=rows,
        token=np.concatenate(token),
        row=np.concatenate(row),
        position=np.concatenate(position),
        passes=made,
    )


def _joined(parts: list[list[np.ndarray]], joined: bool) -> RoutingPass:
    each = [np.concatenate(part, axis=-1) for part in zip(*parts, strict=True)]
    depth, ahead, loss, logits = each[:4]
    if joined:
        # In one text the end of a window predicts the first token of the next.
        loss = np.append(np.float32(np.nan), ahead[:-1])
    return RoutingPass(
        depth=depth, ahead=ahead, loss=loss, logits=logits, main=each[4] if each[4:] else None
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
