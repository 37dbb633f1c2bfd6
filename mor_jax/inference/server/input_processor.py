"""Turns the body of an HTTP request into engine requests: parsing, validation, tokenisation.

This may take long for a long prompt, so it runs on a separate thread.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from mor_jax.data.tokenizers.base import Tokenizer
from mor_jax.inference.chat_template import ChatTemplate
from mor_jax.inference.detokenizer import text_before
from mor_jax.inference.engine.request import Request
from mor_jax.inference.load_model import LoadedModel
from mor_jax.inference.server import fields, schemas
from mor_jax.inference.server.errors import APIError, from_value_error, raise_error, require
from mor_jax.inference.server.limits import Limits
from mor_jax.inference.server.output_processor import (
    ChatFormatter,
    CompletionFormatter,
    ResponseFormatter,
)
from mor_jax.inference.token_bytes import token_bytes

# OpenAI's default for completions; a chat may use the rest of the context.
_COMPLETION_TOKENS = 16

# Seconds; the engine requires a positive deadline.
_MIN_DEADLINE = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessedInput:
    """An HTTP request that is ready for the engine.

    requests: one for each choice, the choices of a prompt next to each other. echoes: text before
    each choice. prompt_tokens: number of tokens of each prompt.
    """

    formatter: ResponseFormatter
    requests: tuple[Request, ...]
    echoes: tuple[str, ...]
    prompt_tokens: tuple[int, ...]
    stream: bool
    include_usage: bool

    def after(self, seconds: float) -> "ProcessedInput":
        """The same with every deadline shortened by `seconds`, the time since its arrival.

        A deadline that has passed becomes the shortest that the engine accepts, so that the request
        ends like any other late one.
        """
        requests = tuple(
            request
            if request.deadline is None
            else dataclasses.replace(
                request, deadline=max(request.deadline - seconds, _MIN_DEADLINE)
            )
            for request in self.requests
        )
        return dataclasses.replace(self, requests=requests)


class InputProcessor:
    """Processes requests for one model. `completion` and `chat` raise `APIError`."""

    def __init__(self, model: LoadedModel, max_length: int, limits: Limits) -> None:
        """max_length: tokens of prompt and output together. Raises `ValueError` if the model's chat
        template cannot be read."""
        self._model, self._limits = model, limits
        self._token_bytes = token_bytes(model.tokenizer)
        self._max_length = max_length
        self._template = None if model.chat_template is None else ChatTemplate(model)

    @property
    def supports_chat(self) -> bool:
        """Whether the model has a chat template."""
        return self._template is not None

    def completion(self, body: bytes) -> ProcessedInput:
        """A request to /v1/completions."""
        parsed = schemas.completion(fields.parse_object(body), self._limits)
        self._check_model(parsed.options.model)
        tokenizer = self._model.tokenizer
        raw_prompts = parsed.prompts
        texts = [prompt for prompt in raw_prompts if isinstance(prompt, str)]
        encoded = iter(tokenizer.encode_batch(texts))
        # As in OpenAI's API: an empty prompt becomes the EOS token.
        start = (tokenizer.eos_id,)
        prompts = [
            tuple(next(encoded).tolist()) or start if isinstance(p, str) else p for p in raw_prompts
        ]
        echoes = [""] * len(prompts)
        if parsed.echo:
            echoes = [_echo(tokenizer, p) for p in raw_prompts]
        options = parsed.options
        formatter = CompletionFormatter(self._token_bytes, options.logprobs, options.depths)
        for path, tokens in zip(parsed.paths, prompts, strict=True):
            self._check_tokens(path, tokens)
        return self._to_processed(
            options, formatter, dict(zip(parsed.paths, prompts, strict=True)), echoes
        )

    def chat(self, body: bytes) -> ProcessedInput:
        """A request to /v1/chat/completions."""
        parsed = schemas.chat(fields.parse_object(body), self._limits)
        self._check_model(parsed.options.model)
        if self._template is None:
            message = "this model's tokenizer has no chat template. Use /v1/completions"
            raise APIError(400, message, param="messages", code="no_chat_template")
        try:
            prompt = self._template.tokens(parsed.messages)
        except ValueError as error:
            raise from_value_error(error) from None
        prompt = prompt or (self._model.tokenizer.eos_id,)
        options = parsed.options
        formatter = ChatFormatter(self._token_bytes, options.logprobs, options.depths)
        return self._to_processed(options, formatter, {"messages": prompt}, [""])

    def _check_model(self, name: str | None) -> None:
        model = self._model.name
        if name is not None and name != model:
            fix = f"Use {model}"
            raise_error(
                "model", name, "is not served here", fix, code="model_not_found", status=404
            )

    def _check_tokens(self, path: str, tokens: Sequence[int]) -> None:
        size = self._model.cfg.vocab_size
        for i, token in enumerate(tokens):
            rule = f"must be in 0 .. {size - 1}, the model's vocabulary"
            fix = "Use the tokenizer of this model"
            require(0 <= token < size, f"{path}[{i}]", token, rule, fix)

    def _to_processed(
        self,
        options: schemas.CommonFields,
        formatter: ResponseFormatter,
        prompts: Mapping[str, tuple[int, ...]],
        echoes: Sequence[str],
    ) -> ProcessedInput:
        """prompts: token ids by the name of the prompt in the request."""
        self._check_tokens("stop_token_ids", options.stop_tokens)
        requests = []
        for path, prompt in prompts.items():
            request = self._request(options, formatter, prompt, path)
            requests += [_with_seed_offset(request, k) for k in range(options.n)]
        return ProcessedInput(
            formatter=formatter,
            requests=tuple(requests),
            echoes=tuple(echo for echo in echoes for _ in range(options.n)),
            prompt_tokens=tuple(map(len, prompts.values())),
            stream=options.stream,
            include_usage=options.include_usage,
        )

    def _request(
        self,
        options: schemas.CommonFields,
        formatter: ResponseFormatter,
        prompt: tuple[int, ...],
        path: str,
    ) -> Request:
        # Clients that shorten a conversation until it fits search for these words.
        rule = f"This model's maximum context length is {self._max_length} tokens"
        rule += f", prompt and output together. {path} has {len(prompt)}"
        code, tokens_left = "context_length_exceeded", self._max_length - len(prompt)
        if tokens_left <= 0:
            raise APIError(400, f"{rule}. Shorten it", param=path, code=code)
        max_tokens = options.max_tokens
        if max_tokens is None:
            max_tokens = (
                tokens_left
                if isinstance(formatter, ChatFormatter)
                else min(_COMPLETION_TOKENS, tokens_left)
            )
        if max_tokens > tokens_left:
            message = f"{rule}, and {options.max_tokens_field}={max_tokens} exceeds the rest"
            message += f". Use at most {tokens_left}"
            raise APIError(400, message, param=options.max_tokens_field, code=code)
        max_timeout = self._limits.timeout
        return Request(
            prompt=prompt,
            max_tokens=max_tokens,
            sampling=options.sampling,
            stop=options.stop,
            stop_tokens=options.stop_tokens,
            ignore_eos=options.ignore_eos,
            logprobs=options.logprobs,
            deadline=max_timeout if options.timeout is None else min(options.timeout, max_timeout),
        )


def _echo(tokenizer: Tokenizer, prompt: schemas.Prompt) -> str:
    """A prompt as text, without an incomplete last character, which belongs to the output."""
    # U+FFFD also stands for an incomplete character, and the output treats it as one.
    if isinstance(prompt, str) and not prompt.endswith("\ufffd"):
        return prompt
    tokens = tokenizer.encode(prompt).tolist() if isinstance(prompt, str) else prompt
    return text_before(tokenizer, tokens)


def _with_seed_offset(request: Request, offset: int) -> Request:
    """The request for choice `offset` of the same prompt, with its seed raised by `offset`."""
    seed = request.sampling.seed
    if seed is None or offset == 0:
        return request
    sampling = dataclasses.replace(request.sampling, seed=(seed + offset) % 2**32)
    return dataclasses.replace(request, sampling=sampling)
