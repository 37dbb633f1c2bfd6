"""Prompts of `mor generate`, from its options or from JSON lines.

Prompts are read before the model is loaded, so that an invalid line is reported at once; `prepare`
then turns them into engine requests.
"""

import dataclasses
import json
import secrets
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from mor_jax.config.parsing import check, fail, parse
from mor_jax.inference.chat_template import ChatTemplate
from mor_jax.inference.detokenizer import text_before
from mor_jax.inference.engine.request import Request, SamplingParams
from mor_jax.inference.load_model import LoadedModel

DEFAULT_MAX_TOKENS = 256
"""Default of `max_tokens`, unless the context has less left."""

MAX_CHOICES = 10_000
"""Most completions of one prompt."""

COMMAND_LINE = "answer"
"""Name in errors for the settings of the command line."""

Message = dict[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptSettings:
    """Generation settings under the names of the options and of JSON lines.

    As in `SamplingParams` and `Request`. max_tokens: None for `DEFAULT_MAX_TOKENS`, or what the
    context has left. n: completions per prompt. seed: of the first completion, the others count up
    from it; None draws one.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def sampling(self, seed: int) -> SamplingParams:
        """The sampling params of one completion."""
        names = [field.name for field in dataclasses.fields(SamplingParams) if field.name != "seed"]
        return SamplingParams(**{name: getattr(self, name) for name in names}, seed=seed)

    def request(self, prompt: Sequence[int], seed: int, max_length: int) -> Request:
        """The request for one completion. max_length: of prompt and output together."""
        tokens_left = max(max_length - len(prompt), 1)
        return Request(
            prompt=tuple(prompt),
            max_tokens=min(DEFAULT_MAX_TOKENS, tokens_left)
            if self.max_tokens is None
            else self.max_tokens,
            sampling=self.sampling(seed),
            stop=self.stop,
            ignore_eos=self.ignore_eos,
            logprobs=self.logprobs,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptInput:
    """One prompt as read.

    location, settings_path: names in errors of the prompt and of its settings. id: any JSON value,
    returned with the completions. prompt: a text or token ids; ignored if there are messages, those
    of a chat.
    """

    location: str
    settings_path: str
    id: Any
    prompt: str | tuple[int, ...] = ""
    messages: tuple[Message, ...] = ()
    settings: PromptSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt for the engine. text: to display. requests: one for each completion."""

    id: Any
    text: str
    tokens: tuple[int, ...]
    requests: tuple[Request, ...]


def from_texts(
    texts: Sequence[str], settings: PromptSettings, chat: bool = False, system: str | None = None
) -> list[PromptInput]:
    """Prompts of the command line, numbered from 1; without a seed they share a random one.

    chat: each text is a user message, after the message `system` if there is one. Raises
    `ValueError` on a text that is not valid Unicode.
    """
    if settings.seed is None:
        settings = dataclasses.replace(settings, seed=secrets.randbits(32))
    system_message = () if system is None else ({"role": "system", "content": system},)
    _check_text("system", system or "")
    inputs = []
    for number, text in enumerate(texts, 1):
        location = f"prompt {number}"
        _check_text(location, text)
        messages = (*system_message, {"role": "user", "content": text}) if chat else ()
        inputs.append(
            PromptInput(
                location=location,
                settings_path=COMMAND_LINE,
                id=number,
                prompt=text,
                messages=messages,
                settings=settings,
            )
        )
    return inputs


def from_lines(
    lines: Iterable[str | bytes], settings: PromptSettings, name: str = "-"
) -> list[PromptInput]:
    """Prompts from JSON lines: `{"prompt": TEXT or [TOKEN, ...]}` or `{"messages": [...]}`, each
    with an optional `id` (default: the line number) and any of `PromptSettings`, which override
    `settings`.

    name: of the file. Empty lines are skipped. Raises `ValueError`, naming the line.
    """
    inputs = [
        _parse_line(f"line {number}", number, line, settings)
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    rule = "needs at least one line that is not empty"
    check(bool(inputs), "jsonl", name, rule, 'Write lines like {"prompt": "Once upon"}')
    return inputs


def prepare(inputs: Sequence[PromptInput], model: LoadedModel, max_length: int) -> list[Prompt]:
    """Tokens and requests of every prompt; an empty text becomes the EOS token.

    Raises `ValueError` if a request does not fit the model, or the model has no chat template.
    """
    template: ChatTemplate | None = None
    prompts = []
    for prompt_input in inputs:
        if prompt_input.messages:
            template = template or ChatTemplate(model)
            text, tokens = _rendered(prompt_input, template)
        elif isinstance(prompt_input.prompt, str):
            text, tokens = prompt_input.prompt, model.tokenizer.encode(prompt_input.prompt).tolist()
        else:
            text, tokens = text_before(model.tokenizer, prompt_input.prompt), prompt_input.prompt
        prompts.append(
            _prompt(prompt_input, text, tokens or (model.tokenizer.eos_id,), model, max_length)
        )
    return prompts


def _prompt(
    prompt_input: PromptInput, text: str, tokens: Sequence[int], model: LoadedModel, max_length: int
) -> Prompt:
    settings, number = prompt_input.settings, len(tokens)
    rule = f"has {number} tokens; prompt and output may have at most {max_length} together"
    check(
        number < max_length,
        f"{prompt_input.location}.prompt",
        f"{text[:40]}...",
        rule,
        "Shorten it",
    )
    ok, rule = 0 < settings.n <= MAX_CHOICES, f"must be in 1 .. {MAX_CHOICES}"
    check(ok, f"{prompt_input.settings_path}.n", settings.n, rule, "Try 1")
    seed = secrets.randbits(32) if settings.seed is None else settings.seed
    # The first seed is validated unchanged: 2**32 must not pass as 0.
    seeds = [seed, *((seed + i) % 2**32 for i in range(1, settings.n))]
    requests = tuple(settings.request(tokens, seed, max_length) for seed in seeds)
    for request in requests[:1]:
        request.validate(model.cfg.vocab_size, max_length, prompt_input.settings_path)
    return Prompt(id=prompt_input.id, text=text, tokens=tuple(tokens), requests=requests)


def _rendered(prompt_input: PromptInput, template: ChatTemplate) -> tuple[str, tuple[int, ...]]:
    try:
        return template.render(prompt_input.messages), template.tokens(prompt_input.messages)
    except ValueError as error:
        raise ValueError(f"{prompt_input.location}: {error}") from None


def _parse_line(
    location: str, number: int, line: str | bytes, settings: PromptSettings
) -> PromptInput:
    fix = 'Write one object per line, like {"prompt": "Once upon"}'
    try:
        parsed = json.loads(line, parse_constant=_reject_constant)
    except (ValueError, RecursionError) as error:
        fail(location, _shorten(line), f"is not valid JSON ({error})", fix)
    check(isinstance(parsed, dict), location, _shorten(line), "must be a JSON object", fix)
    values = {**parsed}
    prompt_id = values.pop("id", number)
    kinds = [name for name in ("prompt", "messages") if name in values]
    check(len(kinds) == 1, location, _shorten(line), "needs either 'prompt' or 'messages'", fix)
    path, value = f"{location}.{kinds[0]}", values.pop(kinds[0])
    chat = kinds[0] == "messages"
    prompt = "" if chat else _read_prompt(path, value)
    messages = _read_messages(path, value) if chat else ()
    if isinstance(values.get("stop"), str):
        values["stop"] = [values["stop"]]
    settings = parse(PromptSettings, {**dataclasses.asdict(settings), **values}, f"{location}.")
    return PromptInput(
        location=location,
        settings_path=location,
        id=prompt_id,
        prompt=prompt,
        messages=messages,
        settings=settings,
    )


def _reject_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


def _read_prompt(path: str, value: Any) -> str | tuple[int, ...]:
    if isinstance(value, str):
        _check_text(path, value)
        return value
    rule = "must be a text or a list of token ids"
    ok = isinstance(value, list) and value and all(type(item) is int for item in value)
    check(bool(ok), path, value, rule, 'Write it like "Once upon" or [412, 77]')
    return tuple(value)


def _read_messages(path: str, value: Any) -> tuple[Message, ...]:
    fix = 'Write it like [{"role": "user", "content": "Hello"}]'
    ok = isinstance(value, list) and value
    check(bool(ok), path, value, "must be a list of messages", fix)
    for i, message in enumerate(value):
        ok = isinstance(message, dict) and set(message) == {"role", "content"}
        ok = ok and all(isinstance(text, str) for text in message.values())
        check(ok, f"{path}[{i}]", message, "needs a 'role' and a 'content', both texts", fix)
        for name, text in message.items():
            _check_text(f"{path}[{i}].{name}", text)
    return tuple(value)


def _check_text(path: str, text: str) -> None:
    # Lone surrogates come from \ud800 in JSON, or from command-line bytes that are not UTF-8.
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        rule = "is not valid Unicode: it has half of a surrogate pair, or bytes that are not UTF-8"
        fail(path, text[:80], rule, "Write it as UTF-8")


def _shorten(line: str | bytes) -> str:
    text = line.decode("utf-8", "replace") if isinstance(line, bytes) else line
    return text.strip()[:80]
