"""Turns chat messages into a prompt with the tokenizer's template.

Templates are Jinja, rendered in its sandbox with the names that Hugging Face templates use. What
users write can never become a special token: a message that spells one out is encoded as plain
text, so no user can speak in another role.
"""

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from tokenizers import Tokenizer as Encoder

from mor_jax.config.optional_import import require_package
from mor_jax.config.parsing import fail
from mor_jax.data.tokenizers.base import Tokenizer
from mor_jax.inference.load_model import LoadedModel

# Splits special tokens that a message spells out. No character: it cannot stand in a text.
_GUARD = "\ufdd0"

# Characters of an error in a template that a message repeats.
_MAX_ERROR = 300


class ChatTemplate:
    """Renders messages (role, content, maybe name) as tokens; from any thread."""

    def __init__(self, model: LoadedModel) -> None:
        """Raises `ValueError` if the model has no template, or one that cannot be read."""
        if model.chat_template is None:
            rule = "the tokenizer of this model has no chat template"
            fail("chat", model.name, rule, "Give prompts as they are, or put one beside it")
        self._tokenizer = model.tokenizer
        self._names = {"bos_token": "", "eos_token": "", **model.special_tokens}
        self._encoder, self._special = _encoder(model.tokenizer)
        try:
            self._template = _environment(model.name).from_string(model.chat_template)
        # jinja2.TemplateError, of a package that may be missing, and what its reader trips over.
        except Exception as error:
            fail("chat_template", model.name, f"is broken ({error})", "Repair it")
        texts = sorted(self._special, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, texts))) if texts else None

    def tokens(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        """The prompt, up to where the assistant answers.

        Raises `ValueError` if the template does not take these messages.
        """
        guarded = [{key: self._guard(text) for key, text in m.items()} for m in messages]
        text = self.render(guarded)
        if _GUARD not in text and self._encoder is not None:
            return tuple(self._encoder.encode(text, add_special_tokens=False).ids)
        return tuple(self._encode_guarded(text))

    def render(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True
    ) -> str:
        """The prompt as text, up to where the assistant answers.

        With `add_generation_prompt=False` it ends with the last message. Raises `ValueError` as
        `tokens`."""
        variables = {**self._names, "tools": None, "documents": None, "messages": list(messages)}
        try:
            return self._template.render(**variables, add_generation_prompt=add_generation_prompt)
        # A template is a program: what it does with unusual messages is their fault.
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"[:_MAX_ERROR]
            rule = f"the model's chat template does not take them ({reason})"
            roles = [message.get("role") for message in messages[:10]]
            fail("messages", roles, rule, "Begin with user, then take turns")

    def _guard(self, text: str) -> str:
        text = text.replace(_GUARD, "")
        if self._pattern is None:
            return text
        return self._pattern.sub(lambda match: match[0][0] + _GUARD + match[0][1:], text)

    def _encode_guarded(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in re.split(f"({self._pattern.pattern})", text) if self._pattern else [text]:
            if part in self._special:
                ids.append(self._special[part])
            elif part:
                ids.extend(self._tokenizer.encode(part.replace(_GUARD, "")).tolist())
        return ids


def _environment(name: str) -> Any:
    """Jinja's sandbox, as Hugging Face sets it up for templates."""
    sandbox = require_package("jinja2.sandbox", "chat_template", name)
    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _now
    return environment


def _encoder(tokenizer: Tokenizer) -> tuple[Encoder | None, dict[str, int]]:
    """A tokenizer that reads special tokens as such, and their numbers by name."""
    files = tokenizer.files()
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
    raise ValueError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
