"""Generation up to a stop text by the inference engine, with lm-eval's settings."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mor_jax.config.parsing import check, fail
from mor_jax.inference.engine.engine import Engine, EngineConfig
from mor_jax.inference.engine.request import Request, SamplingParams
from mor_jax.inference.load_model import LoadedModel

_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_DRAWS = ("top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
_KNOWN = ("until", "do_sample", "temperature", "seed", *_DRAWS, *_LENGTHS)
# Settings of other engines, at values that change nothing.
_NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True, "typical_p": 1.0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """Settings of one generation. stop: texts that end it."""

    max_tokens: int
    stop: tuple[str, ...] = ()
    sampling: SamplingParams


def check_names(settings: Mapping[str, Any]) -> None:
    """Raises `ValueError` for a setting that the engine does not have."""
    for name, value in settings.items():
        if name not in _KNOWN and not (name in _NEUTRAL and value == _NEUTRAL[name]):
            rule = f"is not supported; supported are {', '.join(_KNOWN)}"
            fail(f"gen_kwargs.{name}", value, rule, "Leave it out")


def generation_request(
    settings: Mapping[str, Any], max_tokens: int, max_length: int
) -> GenerationRequest:
    """`generation_kwargs` of a task. Greedy without `do_sample` or a temperature.

    max_tokens: default. max_length: of context and generation together. Raises `ValueError` for
    a setting that the engine does not have.
    """
    check_names(settings)
    given = {name: value for name, value in settings.items() if value is not None}
    name = next((name for name in _LENGTHS if name in given), "max_gen_toks")
    number = _number(given, name, whole=True) if name in given else max_tokens
    rule = (
        f"must be between 1 and {max_length - 1}; context and generation share {max_length} tokens"
    )
    fix = f"Set --gen_kwargs {name}={max(max_length // 2, 1)}"
    check(0 < number < max_length, f"gen_kwargs.{name}", number, rule, fix)
    until = given.get("until") or []
    stop = (until,) if isinstance(until, str) else until
    rule, fix = "must be a text or a list of texts", "Write it like ['\\n']"
    ok = isinstance(stop, list | tuple) and all(isinstance(text, str) for text in stop)
    check(ok, "gen_kwargs.until", until, rule, fix)
    temperature = _number(given, "temperature") if "temperature" in given else 0.0
    if not given.get("do_sample", temperature > 0):
        temperature = 0.0
    draws = {name: _number(given, name, name == "top_k") for name in _DRAWS if name in given}
    # In transformers 0 means all tokens.
    if draws.get("top_k") == 0:
        del draws["top_k"]
    seed = _number(given, "seed", whole=True) if "seed" in given else None
    sampling = SamplingParams(temperature=temperature, seed=seed, **draws)
    sampling.validate("gen_kwargs")
    return GenerationRequest(max_tokens=number, stop=tuple(filter(None, stop)), sampling=sampling)


def _number(settings: Mapping[str, Any], name: str, whole: bool = False) -> Any:
    """A setting as a number, also if it is a string."""
    value = settings[name]
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    rule = "must be a whole number" if whole else "must be a number"
    ok = math.isfinite(number) and (not whole or number.is_integer())
    check(ok, f"gen_kwargs.{name}", value, rule, "Leave it out")
    return int(number) if whole else number


def requests(
    contexts: Sequence[Sequence[int]], generations: Sequence[GenerationRequest], seed: int
) -> list[Request]:
    """Engine requests. seed: base seed; the index of a request is added to it."""
    made = []
    for place, (context, wish) in enumerate(zip(contexts, generations, strict=True)):
        own = wish.sampling.seed
        own = (seed + place) % 2**32 if own is None else (own + place) % 2**32
        sampling = dataclasses.replace(wish.sampling, seed=own)
        limits = {"max_tokens": wish.max_tokens, "stop": wish.stop}
        made.append(Request(prompt=tuple(context), sampling=sampling, **limits))
    return made


def answers(
    served: LoadedModel, asked: Sequence[Request], slots: int | None, progress: Callable[[], None]
) -> Iterator[str]:
    """Texts in the order of the requests. progress: called for each.

    Raises:
        ValueError: a request does not fit the model.
        RuntimeError: the engine failed.
    """
    longest = max(len(one.prompt) + one.max_tokens for one in asked)
    cfg = EngineConfig(
        slots=slots, max_length=longest, max_waiting=len(asked) + 1, dtype=served.cfg.dtype
    )
    with Engine(served, cfg) as engine:
        handles = [engine.submit(request) for request in asked]
        for handle in handles:
            tokens, end = handle.result()
            if end.reason == "error":
                raise RuntimeError(f"generation failed: {end.message}")
            progress()
            yield "".join(token.text for token in tokens) + end.text
