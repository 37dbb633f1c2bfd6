"""What `launch/generate.py` is asked to continue: prompts from its options or from JSON lines.

Reading comes before the model is loaded, so that a wrong line costs no waiting; `prepare` then
makes requests of what was read.
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

USUAL_TOKENS = 256
"""Longest answer where none is asked for, as far as the context has room."""

MOST_ANSWERS = 10_000
"""To one prompt."""

ANSWER = "answer"
"""What errors call the settings that hold for all prompts of a command line."""

Message = dict[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptSettings:
    """Settings of an answer under the names that options and JSON lines give them.

    As `Sampling` and `Request` have them. max_tokens: None for `USUAL_TOKENS`, or what room there
    is. n: answers. seed: that of the first answer, the others count up; None draws one.
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
        """How one answer is drawn."""
        names = [field.name for field in dataclasses.fields(SamplingParams) if field.name != "seed"]
        return SamplingParams(**{name: getattr(self, name) for name in names}, seed=seed)

    def request(self, prompt: Sequence[int], seed: int, max_length: int) -> Request:
        """One answer to these tokens. max_length: of prompt and answer together."""
        room = max(max_length - len(prompt), 1)
        return Request(
            prompt=tuple(prompt),
            max_tokens=min(USUAL_TOKENS, room) if self.max_tokens is None else self.max_tokens,
            sampling=self.sampling(seed),
            stop=self.stop,
            ignore_eos=self.ignore_eos,
            logprobs=self.logprobs,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptInput:
    """One prompt as it was read.

    where, settings: what errors call it, and what they write before the name of a setting. id: any
    JSON value that comes back with the answers. prompt: a text or token numbers; unread where there
    are messages, those of a chat.
    """

    where: str
    settings: str
    id: Any
    prompt: str | tuple[int, ...] = ""
    messages: tuple[Message, ...] = ()
    wishes: PromptSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt as the engine gets it. text: for people. requests: one for each answer."""

    id: Any
    text: str
    tokens: tuple[int, ...]
    requests: tuple[Request, ...]


def from_texts(
    texts: Sequence[str], wishes: PromptSettings, chat: bool = False, system: str | None = None
) -> list[PromptInput]:
    """Prompts of the command line, numbered from 1; without a seed they share one that is drawn.

    chat: each text is the message of a user, after the message `system` if there is one. Raises
    `ValueError` on a text that is none.
    """
    if wishes.seed is None:
        wishes = dataclasses.replace(wishes, seed=secrets.randbits(32))
    before = () if system is None else ({"role": "system", "content": system},)
    _check_text("system", system or "")
    asks = []
    for number, text in enumerate(texts, 1):
        where = f"prompt {number}"
        _check_text(where, text)
        messages = (*before, {"role": "user", "content": text}) if chat else ()
        asks.append(
            PromptInput(
                where=where,
                settings=ANSWER,
                id=number,
                prompt=text,
                messages=messages,
                wishes=wishes,
            )
        )
    return asks


def from_lines(
    lines: Iterable[str | bytes], wishes: PromptSettings, name: str = "-"
) -> list[PromptInput]:
    """Prompts from JSON lines: `{"prompt": TEXT or [TOKEN, ...]}` or `{"messages": [...]}`, each
    with an `id` (default: the line's number) and any settings of `Wishes`, which go first.

    name: of the file. Empty lines are left out. Raises `ValueError`, naming the line.
    """
    asks = [
        _ask(f"line {number}", number, line, wishes)
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    rule = "needs at least one line that is not empty"
    check(bool(asks), "jsonl", name, rule, 'Write lines like {"prompt": "Once upon"}')
    return asks


def prepare(asks: Sequence[PromptInput], model: LoadedModel, max_length: int) -> list[Prompt]:
    """Tokens and requests of every prompt; an empty text becomes the end of a document.

    Raises `ValueError` where the model cannot answer one, or has no chat template.
    """
    template: ChatTemplate | None = None
    made = []
    for ask in asks:
        if ask.messages:
            template = template or ChatTemplate(model)
            text, tokens = _rendered(ask, template)
        elif isinstance(ask.prompt, str):
            text, tokens = ask.prompt, model.tokenizer.encode(ask.prompt).tolist()
        else:
            text, tokens = text_before(model.tokenizer, ask.prompt), ask.prompt
        made.append(_prompt(ask, text, tokens or (model.tokenizer.eos_id,), model, max_length))
    return made


def _prompt(
    ask: PromptInput, text: str, tokens: Sequence[int], model: LoadedModel, max_length: int
) -> Prompt:
    wishes, number = ask.wishes, len(tokens)
    rule = f"has {number} tokens; prompt and answer may hold at most {max_length} together"
    check(number < max_length, f"{ask.where}.prompt", f"{text[:40]}...", rule, "Shorten it")
    ok, rule = 0 < wishes.n <= MOST_ANSWERS, f"must be in 1 .. {MOST_ANSWERS}"
    check(ok, f"{ask.settings}.n", wishes.n, rule, "Try 1")
    seed = secrets.randbits(32) if wishes.seed is None else wishes.seed
    # The first is checked as it was given: 2**32 must not pass as 0.
    seeds = [seed, *((seed + i) % 2**32 for i in range(1, wishes.n))]
    requests = tuple(wishes.request(tokens, seed, max_length) for seed in seeds)
    for request in requests[:1]:
        request.validate(model.cfg.vocab_size, max_length, ask.settings)
    return Prompt(id=ask.id, text=text, tokens=tuple(tokens), requests=requests)


def _rendered(ask: PromptInput, template: ChatTemplate) -> tuple[str, tuple[int, ...]]:
    try:
        return template.render(ask.messages), template.tokens(ask.messages)
    except ValueError as error:
        raise ValueError(f"{ask.where}: {error}") from None


def _ask(where: str, number: int, line: str | bytes, wishes: PromptSettings) -> PromptInput:
    fix = 'Write one object a line, like {"prompt": "Once upon"}'
    try:
        told = json.loads(line, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        fail(where, _start(line), f"is not valid JSON ({error})", fix)
    check(isinstance(told, dict), where, _start(line), "must be a JSON object", fix)
    given = {**told}
    given_id = given.pop("id", number)
    kinds = [name for name in ("prompt", "messages") if name in given]
    check(len(kinds) == 1, where, _start(line), "needs either 'prompt' or 'messages'", fix)
    path, value = f"{where}.{kinds[0]}", given.pop(kinds[0])
    chat = kinds[0] == "messages"
    prompt = "" if chat else _read_prompt(path, value)
    messages = _read_messages(path, value) if chat else ()
    if isinstance(given.get("stop"), str):
        given["stop"] = [given["stop"]]
    merged = parse(PromptSettings, {**dataclasses.asdict(wishes), **given}, f"{where}.")
    return PromptInput(
        where=where,
        settings=where,
        id=given_id,
        prompt=prompt,
        messages=messages,
        wishes=merged,
    )


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _read_prompt(path: str, value: Any) -> str | tuple[int, ...]:
    if isinstance(value, str):
        _check_text(path, value)
        return value
    rule = "must be a text or a list of token numbers"
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
    # Lone surrogates: from \ud800 in JSON, or from bytes on the command line that are no UTF-8.
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        rule = "is no text: it holds half of a surrogate pair, or bytes that are not UTF-8"
        fail(path, text[:80], rule, "Write it as UTF-8")


def _start(line: str | bytes) -> str:
    text = line.decode("utf-8", "replace") if isinstance(line, bytes) else line
    return text.strip()[:80]
