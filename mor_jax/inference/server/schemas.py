"""Request schemas of the completions and chat endpoints, validated before tokenisation."""

import dataclasses
from typing import Any

from mor_jax.inference.engine.request import MAX_LOGPROBS, SamplingParams
from mor_jax.inference.server.errors import from_value_error, raise_error, require
from mor_jax.inference.server.fields import Fields
from mor_jax.inference.server.limits import MAX_STOP_LENGTH, MAX_STOPS, Limits

Prompt = str | tuple[int, ...]

# Accepted and ignored: they describe the user or the billing, not the response.
_IGNORED = (
    "user",
    "metadata",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "parallel_tool_calls",
)

# Not supported; rejected unless null or one of these values, which request nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "logit_bias": ({},),
    "store": (False,),
    "suffix": ("",),
}
# The same for chat. The completions endpoint also names them in its errors.
_UNSUPPORTED_IN_CHAT: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommonFields:
    """Fields of both endpoints.

    max_tokens: None if left out. max_tokens_field: its name in the request. timeout: seconds; None:
    the server's. logprobs: alternatives per token; None: no log-probabilities. depths: return the
    depth of each token.
    """

    model: str | None
    n: int
    stream: bool
    include_usage: bool
    max_tokens: int | None
    max_tokens_field: str
    sampling: SamplingParams
    stop: tuple[str, ...]
    stop_tokens: tuple[int, ...]
    ignore_eos: bool
    timeout: float | None
    logprobs: int | None
    depths: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompletionRequest:
    """A request to /v1/completions. paths: name of each prompt in the request, such as `prompt[1]`.
    echo: repeat the prompt before the output."""

    options: CommonFields
    prompts: tuple[Prompt, ...]
    paths: tuple[str, ...]
    echo: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatRequest:
    """A request to /v1/chat/completions. messages: role, content (a string), optionally name."""

    options: CommonFields
    messages: tuple[dict[str, str], ...]


def completion(values: dict[str, Any], limits: Limits) -> CompletionRequest:
    """Validates the body of a request to /v1/completions. Raises `APIError`."""
    fields = Fields(values)
    logprobs = fields.integer("logprobs", 0, MAX_LOGPROBS)
    for name in _UNSUPPORTED_IN_CHAT.keys() - {"echo"}:
        fields.reject_unless(name)
    echo = fields.boolean("echo")
    options = _options(fields, logprobs)
    if echo and logprobs is not None:
        rule = "cannot be combined with echo: prompts are not scored"
        raise_error("logprobs", logprobs, rule, "Leave one of them out")
    raw_prompts = fields.take("prompt")
    prompts = _prompts(raw_prompts, limits)
    fields.reject_unknown()
    _check_choices(len(prompts), options.n, limits)
    # A single prompt needs no list.
    is_single = isinstance(raw_prompts, str) or type(raw_prompts[0]) is int
    paths = ("prompt",) if is_single else tuple(f"prompt[{i}]" for i in range(len(prompts)))
    return CompletionRequest(options=options, prompts=prompts, paths=paths, echo=echo)


def chat(values: dict[str, Any], limits: Limits) -> ChatRequest:
    """Validates the body of a request to /v1/chat/completions. Raises `APIError`."""
    fields = Fields(values)
    logprobs_requested = fields.boolean("logprobs")
    alternatives = fields.integer("top_logprobs", 0, MAX_LOGPROBS)
    if alternatives is not None and not logprobs_requested:
        raise_error("top_logprobs", alternatives, "needs logprobs", 'Set "logprobs": true')
    for name, values in _UNSUPPORTED_IN_CHAT.items():
        fields.reject_unless(name, *values)
    options = _options(fields, (alternatives or 0) if logprobs_requested else None)
    messages = _messages(fields.take("messages"))
    fields.reject_unknown()
    _check_choices(1, options.n, limits)
    return ChatRequest(options=options, messages=messages)


def _options(fields: Fields, logprobs: int | None) -> CommonFields:
    for name in _IGNORED:
        fields.take(name)
    for name, values in _UNSUPPORTED.items():
        fields.reject_unless(name, *values)
    # max_completion_tokens takes precedence, as in OpenAI's API.
    max_tokens = fields.integer("max_tokens", 1, 2**31 - 1)
    max_completion_tokens = fields.integer("max_completion_tokens", 1, 2**31 - 1)
    usage = fields.group("stream_options")
    stream, include_usage = fields.boolean("stream"), usage.boolean("include_usage")
    # OpenAI pads events against traffic analysis; accepted and ignored.
    usage.take("include_obfuscation")
    usage.reject_unknown()
    if fields.take("stream_options") is not None and not stream:
        raise_error("stream_options", fields.take("stream_options"), "needs stream", "Leave it out")
    timeout = fields.number("timeout", 0.0) if fields.take("timeout") is not None else None
    ok = timeout is None or timeout > 0
    require(ok, "timeout", timeout, "must be greater than 0, in seconds", "Leave it out")
    return CommonFields(
        model=fields.text("model"),
        n=fields.integer("n", 1, 2**16) or 1,
        stream=stream,
        include_usage=include_usage,
        max_tokens=max_tokens if max_completion_tokens is None else max_completion_tokens,
        max_tokens_field="max_tokens" if max_completion_tokens is None else "max_completion_tokens",
        sampling=_sampling(fields),
        stop=_stops(fields.take("stop")),
        stop_tokens=_stop_tokens(fields.take("stop_token_ids")),
        ignore_eos=fields.boolean("ignore_eos"),
        timeout=timeout,
        logprobs=logprobs,
        depths=fields.boolean("depths"),
    )


def _sampling(fields: Fields) -> SamplingParams:
    seed = fields.integer("seed", -(2**63), 2**64 - 1)
    top_k = fields.integer("top_k", -1, 2**31 - 1)
    sampling = SamplingParams(
        temperature=fields.number("temperature", 1.0),
        # Other APIs use 0 or -1 for all tokens.
        top_k=top_k if top_k is not None and top_k > 0 else None,
        top_p=fields.number("top_p", 1.0),
        min_p=fields.number("min_p", 0.0),
        repetition_penalty=fields.number("repetition_penalty", 1.0),
        presence_penalty=fields.number("presence_penalty", 0.0),
        frequency_penalty=fields.number("frequency_penalty", 0.0),
        seed=None if seed is None else seed % 2**32,
    )
    try:
        sampling.validate()
    except ValueError as error:
        raise from_value_error(error) from None
    return sampling


def _stops(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else [] if value is None else value
    ok = isinstance(stops, list) and all(isinstance(stop, str) for stop in stops)
    require(ok, "stop", value, "must be a string or a list of strings", "Leave it out")
    require(len(stops) <= MAX_STOPS, "stop", value, f"at most {MAX_STOPS} strings", "Use fewer")
    for i, stop in enumerate(stops):
        rule = f"must have 1 to {MAX_STOP_LENGTH} characters"
        require(0 < len(stop) <= MAX_STOP_LENGTH, f"stop[{i}]", stop, rule, "Leave it out")
    return tuple(stops)


def _stop_tokens(value: Any) -> tuple[int, ...]:
    tokens = [] if value is None else value
    ok = isinstance(tokens, list) and all(type(token) is int for token in tokens)
    require(ok, "stop_token_ids", value, "must be a list of token ids", "Leave it out")
    rule = f"at most {MAX_STOPS} tokens"
    require(len(tokens) <= MAX_STOPS, "stop_token_ids", value, rule, "Use fewer")
    return tuple(tokens)


def _prompts(value: Any, limits: Limits) -> tuple[Prompt, ...]:
    rule = "must be a string, a list of strings, a list of token ids, or a list of such lists"
    fix = 'Write "prompt": "Once upon a time"'
    require(isinstance(value, str | list) and value != [], "prompt", value, rule, fix)
    if isinstance(value, str):
        return (value,)
    if type(value[0]) is int:
        value = [value]
    max_count = limits.max_prompts
    require(
        len(value) <= max_count,
        "prompt",
        value,
        f"at most {max_count} prompts per request",
        "Send fewer",
    )
    prompts: list[Prompt] = []
    for i, item in enumerate(value):
        if isinstance(item, str) and isinstance(value[0], str):
            prompts.append(item)
        else:
            ok = isinstance(item, list) and isinstance(value[0], list) and item != []
            ok = ok and all(type(token) is int for token in item)
            require(ok, f"prompt[{i}]", item, rule, fix)
            prompts.append(tuple(item))
    return tuple(prompts)


def _check_choices(prompts: int, n: int, limits: Limits) -> None:
    max_count = limits.max_choices
    rule = f"{prompts} prompt{'s' * (prompts != 1)} times n must not exceed {max_count} choices"
    require(prompts * n <= max_count, "n", n, rule, f"Use at most {max_count // prompts}")


_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


def _messages(value: Any) -> tuple[dict[str, str], ...]:
    rule, fix = "must be a list of messages", 'Write [{"role": "user", "content": "Hello"}]'
    require(isinstance(value, list) and value != [], "messages", value, rule, fix)
    return tuple(_message(item, f"messages[{i}]") for i, item in enumerate(value))


def _message(value: Any, path: str) -> dict[str, str]:
    rule, fix = "must be an object with role and content", 'Write {"role": "user", "content": ".."}'
    require(isinstance(value, dict), path, value, rule, fix)
    fields = Fields(value, f"{path}.")
    role = fields.text("role")
    rule = f"must be one of {', '.join(_ROLES)}"
    require(role in _ROLES, f"{path}.role", role, rule, "Try user")
    out = {"role": _ROLES[role or ""], "content": _content(fields.take("content"), path)}
    name = fields.text("name")
    for other in ("tool_calls", "function_call", "audio", "refusal", "tool_call_id"):
        fields.reject_unless(other, [])
    # Clients send assistant messages back as received, with every field of their class.
    fields.reject_unknown("", [], {})
    return out if name is None else out | {"name": name}


def _content(value: Any, path: str) -> str:
    """The text of a message: a string, or a list of text parts."""
    if isinstance(value, str):
        return value
    rule, fix = "must be a string or a list of text parts", "Use a string"
    require(isinstance(value, list), f"{path}.content", value, rule, fix)
    texts = []
    for i, part in enumerate(value):
        ok = isinstance(part, dict) and part.get("type") == "text"
        ok = ok and isinstance(part.get("text"), str)
        require(
            ok, f"{path}.content[{i}]", part, "must be a text part; this model reads text only", fix
        )
        texts.append(part["text"])
    return "".join(texts)
