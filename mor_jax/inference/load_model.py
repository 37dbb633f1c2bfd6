"""Loads a run's weights, tokenizer and chat template for causal generation."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from mor_jax import data
from mor_jax.checkpoint.load_weights import load_run
from mor_jax.checkpoint.manifest import describe
from mor_jax.config import ModelConfig
from mor_jax.config.parsing import check, fail
from mor_jax.data.tokenizers.base import Tokenizer
from mor_jax.inference.calibration_file import Calibration, created, load
from mor_jax.inference.calibration_targets import takes_all, trained_shares
from mor_jax.inference.recursion_depth import with_recursions
from mor_jax.models.flops import routed_shares
from mor_jax.models.params import paths
from mor_jax.types import Params

_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LoadedModel:
    """A model to generate with.

    name: the run's directory and its step. params: float32. thresholds: for expert-choice, the
    logit that a token must reach at each recursion; None: 0. shares: share of all tokens that is
    expected to go through each recursion. eos_ids: tokens that end a text. chat_template: Jinja
    source, None where the tokenizer has none; special_tokens: what it may name, such as
    `bos_token`. created: Unix time of the weights, in seconds.
    """

    name: str
    cfg: ModelConfig
    params: Params
    thresholds: tuple[float, ...] | None
    shares: tuple[float, ...]
    tokenizer: Tokenizer
    chat_template: str | None
    special_tokens: Mapping[str, str]
    eos_ids: frozenset[int]
    created: int


def load_model(
    directory: epath.PathLike,
    *,
    step: int | None = None,
    calibration: str | None = None,
    recursions: int | None = None,
) -> LoadedModel:
    """The newest weights of a run, or those of `step`, ready for causal generation.

    calibration: one of the run's by name, or a file. recursions: to run in place of those trained
    (or calibrated).

    Raises:
        ValueError: no weights, a parameter that is not finite (named), a tokenizer that does not
            fit, a calibration that does not fit the weights, recursions that the model cannot run,
            or routers that never learned to decide without later tokens and no calibration.
    """
    run = load_run(directory, step)
    calibrated = None if calibration is None else load(run, calibration)
    if calibrated is None:
        check_causal(run.cfg.model)
    tokenizer = data.load_tokenizer(run.cfg.data.tokenizer)
    data.check_vocabulary(tokenizer, run.cfg.model.vocab_size)
    params = run.params()
    check_finite(params, str(run))
    cfg, params, thresholds, shares = prepare_model(run.cfg.model, params, calibrated, recursions)
    tokenizer_files = _files(tokenizer)
    return LoadedModel(
        name=f"{run.path.name}-{run.step}" if run.step else run.path.name,
        cfg=cfg,
        params=params,
        thresholds=thresholds,
        shares=shares,
        tokenizer=tokenizer,
        chat_template=_template(tokenizer_files),
        special_tokens=_special_tokens(tokenizer_files),
        eos_ids=_eos_ids(tokenizer_files, tokenizer, cfg.vocab_size),
        created=created(run),
    )


def check_causal(cfg: ModelConfig) -> None:
    """Raises `ValueError` for routers that cannot select tokens causally.

    Expert-choice selects the best tokens of a sequence, later ones included. A router that was not
    trained to predict this choice has logits on an unknown scale, so it needs calibration.
    """
    if is_causal(cfg):
        return
    rule = "no causal routing: these routers were never trained to predict who is chosen"
    fix = "Make thresholds from data with mor calibrate, then name them with --calibration"
    fail("model.router.causal_routing", cfg.router.causal_routing, rule, fix)


def is_causal(cfg: ModelConfig) -> bool:
    """Whether tokens can be routed by their own scores without a calibration."""
    router = cfg.router
    return router.kind != "expert" or router.causal_routing != "none" or all(takes_all(cfg))


def check_finite(params: Params, where: str) -> None:
    """Raises `ValueError`, naming the first array that holds a NaN or an infinity."""
    leaves = jax.tree.leaves(params)
    fine = jax.device_get([jnp.all(jnp.isfinite(leaf)) for leaf in leaves])
    for name, leaf, ok in zip(paths(params), leaves, fine, strict=True):
        if not ok:
            number = int(np.sum(~np.isfinite(np.asarray(leaf))))
            rule = f"holds {number} values of {leaf.size} that are not finite"
            fail(f"{where}: {name}", describe({name: leaf})[name], rule, "Take an earlier step")


def expected_shares(cfg: ModelConfig) -> tuple[float, ...]:
    """Share of all tokens that goes through each recursion, as trained, in [0, 1]."""
    if cfg.router.kind == "expert":
        return trained_shares(cfg)
    return routed_shares(cfg, cfg.max_seq_len)


def prepare_model(
    cfg: ModelConfig, params: Params, calibration: Calibration | None, recursions: int | None
) -> tuple[ModelConfig, Params, tuple[float, ...] | None, tuple[float, ...]]:
    """Model, parameters, thresholds and expected shares at the depth that is asked for.

    recursions: None for those calibrated, or trained. Raises `ValueError` if the model cannot run
    so many, or the calibration does not cover them.
    """
    if calibration is None:
        if recursions is not None:
            cfg, params, _ = with_recursions(cfg, params, recursions)
        return cfg, params, None, expected_shares(cfg)
    number = calibration.recursions if recursions is None else recursions
    rule = f"the calibration is for {calibration.recursions} recursions"
    fix = f"Leave it out, or calibrate with --recursions={number}"
    check(number <= calibration.recursions, "recursions", recursions, rule, fix)
    cfg, params, _ = with_recursions(cfg, params, calibration.recursions)
    cfg, params = calibration.apply(cfg, params)
    cfg, params, thresholds = with_recursions(cfg, params, number, calibration.thresholds)
    return cfg, params, thresholds, calibration.shares[:number]


def _files(tokenizer: Tokenizer) -> dict[str, Any]:
    """The tokenizer's chat and generation files, parsed, by file name."""
    if tokenizer.name == "bytes":
        return {}
    path = Path(tokenizer.name).expanduser()
    directory = path if path.is_dir() else path.parent
    parsed: dict[str, Any] = {}
    for name in ("tokenizer_config.json", "generation_config.json", "chat_template.json"):
        if (directory / name).is_file():
            parsed[name] = _object(directory / name)
    template = directory / "chat_template.jinja"
    if template.is_file():
        parsed[template.name] = template.read_text(encoding="utf-8")
    return parsed


def _object(path: Path) -> dict[str, Any]:
    fix = "Copy or download it again"
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        fail("data.tokenizer", str(path), f"is damaged ({error})", fix)
    check(isinstance(value, dict), "data.tokenizer", str(path), "holds no JSON object", fix)
    return value


def _template(tokenizer_files: Mapping[str, Any]) -> str | None:
    """The chat template; its own file takes precedence over the settings."""
    if "chat_template.jinja" in tokenizer_files:
        return tokenizer_files["chat_template.jinja"]
    for name in ("chat_template.json", "tokenizer_config.json"):
        value = tokenizer_files.get(name, {}).get("chat_template")
        if isinstance(value, list):
            named = {row.get("name"): row.get("template") for row in value if isinstance(row, dict)}
            value = named.get("default")
        if isinstance(value, str):
            return value
    return None


def _special_tokens(tokenizer_files: Mapping[str, Any]) -> dict[str, str]:
    value = tokenizer_files.get("tokenizer_config.json", {})
    parsed = {role: value.get(role) for role in _SPECIAL}
    # Written as a text or as a group of settings.
    texts = {r: t.get("content") if isinstance(t, dict) else t for r, t in parsed.items()}
    return {role: text for role, text in texts.items() if isinstance(text, str)}


def _eos_ids(
    tokenizer_files: Mapping[str, Any], tokenizer: Tokenizer, vocab_size: int
) -> frozenset[int]:
    """The tokenizer's EOS token, and those of the model's generation settings."""
    value = tokenizer_files.get("generation_config.json", {}).get("eos_token_id")
    ids = value if isinstance(value, list) else [value]
    known = {i for i in ids if type(i) is int and 0 <= i < vocab_size}
    return frozenset(known | {tokenizer.eos_id})


__all__ = [
    "LoadedModel",
    "check_causal",
    "check_finite",
    "expected_shares",
    "is_causal",
    "load_model",
    "prepare_model",
]
