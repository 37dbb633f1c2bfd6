"""Answers on the wire: one JSON object, or server-sent events as the answer grows."""

import asyncio
import time
from collections.abc import Iterator
from typing import Any

from starlette.types import Message, Receive, Send

from mor_jax.inference.server.errors import APIError
from mor_jax.inference.server.input_processor import ProcessedInput
from mor_jax.inference.server.json_encoding import encode, parts
from mor_jax.inference.server.output_processor import usage
from mor_jax.inference.server.serving import Generation, until_gone

# Bytes after which others get their turn, and tokens of a choice in one event: a few milliseconds.
_BLOCK = 16 * 2**10
_TOKENS = 32

_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    # nginx would hold events back otherwise.
    (b"x-accel-buffering", b"no"),
]


async def send_bytes(send: Send, status: int, headers: dict[str, str], body: bytes) -> None:
    """A whole response."""
    await send(_start(status, headers, len(body)))
    await send({"type": "http.response.body", "body": body})


def _start(status: int, headers: dict[str, str], length: int) -> Message:
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    raw.append((b"content-length", str(length).encode()))
    return {"type": "http.response.start", "status": status, "headers": raw}


async def send_json(send: Send, status: int, value: Any) -> None:
    """A whole response in JSON."""
    await send_bytes(send, status, {"content-type": "application/json"}, encode(value))


async def send_refusal(send: Send, refusal: APIError) -> None:
    """The response that turns a request away."""
    await send_bytes(send, refusal.status, refusal.headers(), refusal.encoded())


class HTTPResponse:
    """Writes the answer to one request. number: makes its id. model: the served one's name."""

    def __init__(
        self, prepared: ProcessedInput, generation: Generation, number: str, model: str
    ) -> None:
        self._prepared, self._generation = prepared, generation
        self._form = prepared.form
        self._head = {
            "id": self._form.prefix + number,
            "object": self._form.chunk_kind if prepared.stream else self._form.kind,
            "created": int(time.time()),
            "model": model,
        }

    async def send(self, receive: Receive, send: Send, ping: float) -> None:
        """Until all is written or the client has gone. Raises `APIError` before anything is."""
        watch = asyncio.create_task(until_gone(receive))
        watch.add_done_callback(self._gone)
        try:
            await (self._stream(send, ping) if self._prepared.stream else self._whole(send))
        finally:
            watch.remove_done_callback(self._gone)
            if watch.done():
                # While the last of it was being written.
                self._generation.leave()
            watch.cancel()

    def _gone(self, _: asyncio.Task[None]) -> None:
        self._generation.leave()

    async def _whole(self, send: Send) -> None:
        generation = self._generation
        while generation.open:
            await generation.wait()
        if generation.reason == "left":
            return
        choices = [self._form.whole(choice) for choice in generation.choices]
        value = self._head | {"choices": choices, "usage": self._usage()}
        blocks, size = list[bytes](), 0
        for block in _blocks(parts(value)):
            blocks.append(block)
            size += len(block)
            await asyncio.sleep(0)
            if generation.reason == "left":
                return
        await send(_start(200, {"content-type": "application/json"}, size))
        for i, block in enumerate(blocks, 1):
            more = i < len(blocks)
            await send({"type": "http.response.body", "body": block, "more_body": more})

    async def _stream(self, send: Send, ping: float) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
        try:
            body = await self._events(send, ping)
        except APIError as refusal:
            # The status is out already; OpenAI's clients raise on an event that holds an error.
            body = _event(refusal.body())
        await send({"type": "http.response.body", "body": body})

    async def _events(self, send: Send, ping: float) -> bytes:
        """Sends events as they come; returns the last ones."""
        generation = self._generation
        openings = [self._form.opening(choice.index) for choice in generation.choices]
        body = b"".join(self._chunk(opening) for opening in openings if opening)
        loop = asyncio.get_running_loop()
        sent = loop.time()
        while generation.open:
            if body:
                await send({"type": "http.response.body", "body": body, "more_body": True})
                sent = loop.time()
            # Tokens may come without text: what counts is when the client last got something.
            came = await generation.wait(max(sent + ping - loop.time(), 0.0))
            body = b""
            for block in _blocks(self._news()) if came else ():
                if body:
                    await send({"type": "http.response.body", "body": body, "more_body": True})
                    sent = loop.time()
                    await asyncio.sleep(0)
                body = block
            if generation.open and not body and loop.time() >= sent + ping:
                body = b": waiting\n\n"
        if self._prepared.include_usage:
            body += _event(self._head | {"choices": [], "usage": self._usage()})
        return body + b"data: [DONE]\n\n"

    def _news(self) -> Iterator[bytes]:
        """What has come since the last chunk, answer by answer."""
        for choice in self._generation.choices:
            if choice.tokens or choice.finished:
                for part in choice.parts(_TOKENS):
                    # Half a character, or what may be a stop text: the text comes later.
                    if part.text or part.finished or self._form.per_token:
                        yield self._chunk(self._form.chunk(part))

    def _chunk(self, choice: dict[str, Any]) -> bytes:
        value = self._head | {"choices": [choice]}
        return _event(value | {"usage": None} if self._prepared.include_usage else value)

    def _usage(self) -> dict[str, int]:
        return usage(self._prepared.prompts, self._generation.tokens)


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + encode(value) + b"\n\n"


def _blocks(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """The same bytes in blocks of at least `_BLOCK`, but for the last."""
    held, size = list[bytes](), 0
    for piece in pieces:
        held.append(piece)
        size += len(piece)
        if size >= _BLOCK:
            yield b"".join(held)
            held, size = [], 0
    if held:
        yield b"".join(held)
