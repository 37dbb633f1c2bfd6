"""`mor_jax.load` and `Model`: generation, scores and depths of a trained or exported model."""

import dataclasses
import os
import re
import threading
from functools import cached_property
from typing import Any, overload

import numpy as np

from mor_jax.api.scoring import Scorer
from mor_jax.api.source import run_directory
from mor_jax.config import ModelConfig
from mor_jax.config.parsing import check, parse
from mor_jax.data import Tokenizer
from mor_jax.inference.cli.prompts import COMMAND_LINE, PromptSettings, from_texts, prepare
from mor_jax.inference.config import EngineConfig, compute_config, plan_cache
from mor_jax.inference.engine.engine import Engine
from mor_jax.inference.engine.request import Finished
from mor_jax.inference.load_model import LoadedModel, load_model
from mor_jax.runtime import platform
from mor_jax.types import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """Text that continues a prompt.

    text: without the prompt. tokens: int32 [l]. depths: int32 [l], recursions of the token that
    predicted each; 0 without a router. logprobs: float32 [l], natural, under the model's own
    distribution. finish_reason: `stop` (end of document or a stop string) or `length`.
    """

    text: str
    tokens: np.ndarray
    depths: np.ndarray
    logprobs: np.ndarray
    finish_reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """Log-probabilities of a text under causal routing.

    tokens: int32 [l]. logprobs: float32 [l], natural, of each token after those before it; the
    first of a text without context is NaN, because nothing predicts it.
    """

    tokens: np.ndarray
    logprobs: np.ndarray

    @property
    def total(self) -> float:
        """Sum of the log-probabilities, in nats."""
        return float(np.nansum(self.logprobs, dtype=np.float64))

    @property
    def loss(self) -> float:
        """Mean negative log-probability, in nats per token; NaN where no token is predicted."""
        known = self.logprobs[~np.isnan(self.logprobs)]
        return float(-np.mean(known, dtype=np.float64)) if len(known) else float("nan")

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return float(np.exp(self.loss))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Depths:
    """How many recursions each token of a text goes through, under causal routing.

    tokens: int32 [l]. pieces: the text of each. depths: int32 [l], 0 to the model's recursions.
    """

    tokens: np.ndarray
    pieces: tuple[str, ...]
    depths: np.ndarray

    @property
    def mean(self) -> float:
        """Mean depth, in recursions per token."""
        return float(np.mean(self.depths))


class Model:
    """Weights with their tokenizer, ready to use. Made by `load`.

    Generation runs in an engine in a thread of its own, which starts with the first call; `close`,
    or leaving a `with` block, ends it. Calls from several threads are safe.
    """

    def __init__(self, loaded: LoadedModel):
        self._loaded = loaded
        self._engine: Engine | None = None
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        cfg = self.cfg
        return f"Model({self._loaded.name!r}, {cfg.num_layers} layers, sharing={cfg.sharing!r})"

    def __enter__(self) -> "Model":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def cfg(self) -> ModelConfig:
        """The model's configuration."""
        return self._loaded.cfg

    @property
    def params(self) -> Params:
        """Nested dictionary of float32 arrays."""
        return self._loaded.params

    @property
    def tokenizer(self) -> Tokenizer:
        """Text to token numbers and back."""
        return self._loaded.tokenizer

    @overload
    def generate(self, prompt: str, **settings: Any) -> Generation: ...
    @overload
    def generate(
        self, prompt: list[str] | tuple[str, ...], **settings: Any
    ) -> list[Generation]: ...
    def generate(
        self, prompt: str | list[str] | tuple[str, ...], **settings: Any
    ) -> Generation | list[Generation]:
        """Continues a prompt, or several at one time.

        Args:
            prompt: a text, or a list of them.
            settings: those of `mor generate`: `max_tokens` (default 256, or what the context has
                left), `temperature` (1; 0 takes the likeliest token), `top_k`, `top_p`, `min_p`,
                `repetition_penalty`, `presence_penalty`, `frequency_penalty`, `seed` (None draws
                one), `stop` (a text or several), `ignore_eos`.

        Returns:
            A `Generation` for a text, a list in the order of the prompts for a list.

        Raises:
            ValueError: an unknown setting, one out of range, or a prompt that does not fit the
                context.
        """
        prompts = list(prompt) if isinstance(prompt, list | tuple) else [prompt]
        for one in prompts:
            _check_text("prompt", one)
        if not prompts:
            return []
        try:
            inputs = from_texts(prompts, _settings(settings))
            requests = [p.requests[0] for p in prepare(inputs, self._loaded, self._context)]
        except ValueError as error:
            # Settings and prompts as the caller names them, not as a command line does.
            message = re.sub(r"^prompt (\d+)\.prompt=", r"prompt=", str(error))
            raise ValueError(message.removeprefix(f"{COMMAND_LINE}.")) from None
        with self._lock:
            engine = self._running_engine(len(requests))
            handles = [engine.submit(request) for request in requests]
        made = [_generation(*handle.result()) for handle in handles]
        return made[0] if isinstance(prompt, str) else made

    def score(self, text: str, *, context: str = "") -> Score:
        """Log-probabilities of the tokens of `text`, after those of `context`.

        Routing is causal, as in generation: no later token changes an earlier value.

        Raises:
            ValueError: no token, or more than the model's context.
        """
        _check_text("context", context)
        before = self._encode(context) if context else np.zeros(0, np.int32)
        tokens = self._encode(text)
        both = np.concatenate([before, tokens])
        self._check_length(text, both, "Score it in parts, each with the text before as context=")
        logprobs, _ = self._scorer(both)
        return Score(tokens=tokens, logprobs=logprobs[len(before) :])

    def depths(self, text: str) -> Depths:
        """How many recursions each token of `text` goes through.

        Raises:
            ValueError: no token, more than the model's context, or a model without routers.
        """
        rule = "every token of this model has the same depth"
        check(self.cfg.router.kind != "none", "router.kind", "none", rule, "Load a routed model")
        tokens = self._encode(text)
        self._check_length(text, tokens, "Shorten the text")
        _, depths = self._scorer(tokens)
        assert depths is not None
        pieces = tuple(self.tokenizer.decode([token]) for token in tokens.tolist())
        return Depths(tokens=tokens, pieces=pieces, depths=depths)

    def close(self) -> None:
        """Ends the engine's thread, if it runs. The model can be used again afterwards."""
        with self._lock:
            engine, self._engine = self._engine, None
        if engine is not None:
            engine.stop()

    def _running_engine(self, requests: int) -> Engine:
        """An engine with a slot for each request, up to 32."""
        slots = min(32, 1 << (requests - 1).bit_length())
        if self._engine is None or (self._engine.plan.slots < slots):
            if self._engine is not None:
                self._engine.stop()
            config = EngineConfig(slots=slots, max_waiting=2**31)
            self._engine = Engine(self._loaded, config)
            self._engine.start()
        return self._engine

    def _encode(self, text: str) -> np.ndarray:
        _check_text("text", text)
        tokens = np.asarray(self.tokenizer.encode(text), np.int32)
        check(len(tokens) > 0, "text", text, "has no token", "Give a text that is not empty")
        return tokens

    def _check_length(self, text: str, tokens: np.ndarray, fix: str) -> None:
        most = self.cfg.max_seq_len
        shown = text if len(text) <= 40 else f"{text[:40]}..."
        rule = f"{len(tokens):,} tokens exceed the model's context, model.max_seq_len={most}"
        check(len(tokens) <= most, "text", shown, rule, fix)

    @cached_property
    def _context(self) -> int:
        """Tokens that a prompt and its answer may have."""
        return plan_cache(self._loaded, EngineConfig(slots=1)).max_length

    @cached_property
    def _scorer(self) -> Scorer:
        loaded = self._loaded
        return Scorer(compute_config(loaded.cfg, None), loaded.params, loaded.thresholds)


def load(
    source: str | os.PathLike[str],
    *,
    step: int | None = None,
    calibration: str | None = None,
    recursions: int | None = None,
) -> Model:
    """Loads weights for generation, scores and depths.

    Args:
        source: a run directory; an export in the format of Hugging Face, or a plain Llama in it; a
            GGUF file.
        step: of the checkpoint of a run; None for the newest good one.
        calibration: name or file of thresholds for causal routing, made by `mor calibrate`.
        recursions: to run instead of those trained.

    Raises:
        ValueError: no weights, a parameter that is not finite, a tokenizer or a calibration that
            does not fit, recursions that the model cannot run, or routers that were not trained to
            decide without later tokens and no calibration.
    """
    platform.use_cpu_without_accelerator()
    with run_directory(source) as directory:
        loaded = load_model(directory, step=step, calibration=calibration, recursions=recursions)
    return Model(loaded)


def _check_text(name: str, value: object) -> None:
    rule = "must be a string"
    check(isinstance(value, str), name, value, rule, "Decode bytes, or write it in quotes")


def _settings(settings: dict[str, Any]) -> PromptSettings:
    values = dict(settings)
    if isinstance(values.get("stop"), str):
        values["stop"] = (values["stop"],)
    for name in ("n", "logprobs"):
        rule = "not a setting of Model.generate"
        check(name not in values, name, values.get(name), rule, "Call it once for each answer")
    return dataclasses.replace(parse(PromptSettings, values, ""), logprobs=0)


def _generation(tokens: list[Any], finished: Finished) -> Generation:
    if finished.reason == "error":
        raise RuntimeError(finished.message)
    return Generation(
        text="".join(token.text for token in tokens) + finished.text,
        tokens=np.array([token.id for token in tokens], np.int32),
        depths=np.array([token.depth for token in tokens], np.int32),
        logprobs=np.array([token.logprob for token in tokens], np.float32),
        finish_reason=finished.reason,
    )
