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

from tokenizers import Tokenizer as Encoder

from mor_jax.config.optional_import import require_package
from mor_jax.config.parsing import fail
from mor_jax.data.tokenizers.base import Tokenizer
from mor_jax.inference.load_model import LoadedModel

# Splits special tokens that a message spells out. No character: it cannot stand in a text.
_GUARD = "\ufdd0"

# Characters of an error in a template that a message repeats.
_MOST = 300


class ChatTemplate:
    """Renders messages (role, content, maybe name) as tokens; from any thread."""

    def __init__(self, model: LoadedModel) -> None:
        """Raises `ValueError` if the model has no template, or one that cannot be read."""
        if model.chat_template is None:
            rule = "the tokenizer of this model has no chat template"
            fail("chat", model.name, rule, "Give prompts as they are, or put one beside it")
        self._plain = model.tokenizer
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
        return tuple(self._pieces(text))

    def render(self, messages: Sequence[Mapping[str, str]], *, generates: bool = True) -> str:
        """The prompt as text, up to where the assistant answers, or (not `generates`) where the
        last message ends. Raises `ValueError` as `tokens`."""
        variables = {**self._names, "tools": None, "documents": None, "messages": list(messages)}
        try:
            return self._template.render(**variables, add_generation_prompt=generates)
        # A template is a program: what it does with unusual messages is their fault.
        except Exception as error:
            what = f"{type(error).__name__}: {error}"[:_MOST]
            rule = f"the model's chat template does not take them ({what})"
            roles = [message.get("role") for message in messages[:10]]
            fail("messages", roles, rule, "Begin with user, then take turns")

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


def _environment(name: str) -> Any:
    """Jinja's sandbox, as Hugging Face sets it up for templates."""
    sandbox = require_package("jinja2.sandbox", "chat_template", name)
    made = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    made.filters["tojson"] = _tojson
    made.globals["raise_exception"] = _raise
    made.globals["strftime_now"] = _now
    return made


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
