"""Messages to a prompt, by the template that came with the tokenizer.

Templates are Jinja, rendered in its sandbox with the names that Hugging Face templates use. What
people write can never become a special token: a message that spells one out is read as plain text,
so nobody can speak in another's role.
"""

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as Encoder

from mor_jax.data.tokenizers import Tokenizer
from mor_jax.serve.http.refusals import Refusal

# Splits special tokens that a message spells out. No character: it cannot stand in a text.
_GUARD = "\ufdd0"


class ChatTemplate:
    """Renders messages and gives them as tokens. `render` and `tokens` may run in any thread."""

    def __init__(self, source: str, tokenizer: Tokenizer, names: Mapping[str, str]) -> None:
        """names: bos_token, eos_token, ... Raises `ValueError` if the template cannot be read."""
        self._plain = tokenizer
        self._names = {"bos_token": "", "eos_token": "", **names}
        self._encoder, self._special = _encoder(tokenizer.files())
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = _now
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ValueError(f"the chat template of the tokenizer is broken: {error}") from None
        texts = sorted(self._special, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, texts))) if texts else None

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The prompt as text, up to where the assistant answers. Raises `Refusal`."""
        variables = {**self._names, "tools": None, "documents": None, "messages": list(messages)}
        try:
            return self._template.render(**variables, add_generation_prompt=True)
        # A template is a program: what it does with unusual messages is the request's fault.
        except Exception as error:
            what = f"{type(error).__name__}: {error}"[:300]
            message = f"messages: the model's chat template does not take them ({what})"
            raise Refusal(400, message, param="messages") from None

    def tokens(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        """The prompt as token numbers. Raises `Refusal`."""
        guarded = [{key: self._guard(text) for key, text in m.items()} for m in messages]
        text = self.render(guarded)
        if _GUARD not in text and self._encoder is not None:
            return tuple(self._encoder.encode(text, add_special_tokens=False).ids)
        return tuple(self._pieces(text))

    def _guard(self, text: str) -> str:
        text = text.replace(_GUARD, "")
        if self._pattern is None:
            return text
        return self._pattern.sub(lambda found: found[0][0] + _GUARD + found[0][1:], text)

    def _pieces(self, text: str) -> list[int]:
        found: list[int] = []
        for part in re.split(f"({self._pattern.pattern})", text) if self._pattern else [text]:
            if part in self._special:
                found.append(self._special[part])
            elif part:
                found.extend(self._plain.encode(part.replace(_GUARD, "")).tolist())
        return found


def _encoder(files: Mapping[str, bytes]) -> tuple[Encoder | None, dict[str, int]]:
    """A tokenizer that reads special tokens as such, and their numbers by name."""
    if "tokenizer.json" not in files:
        return None, {}
    encoder = Encoder.from_str(files["tokenizer.json"].decode("utf-8"))
    encoder.no_truncation()
    encoder.no_padding()
    added = encoder.get_added_tokens_decoder().items()
    return encoder, {token.content: number for number, token in added if token.special}


def _tojson(value: Any, indent: int | None = None) -> str:
    # Jinja's own escapes for HTML, which a prompt is not.
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
