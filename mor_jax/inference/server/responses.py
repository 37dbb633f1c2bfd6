"""Sends responses: one JSON object, or server-sent events while tokens arrive."""

import asyncio
import time
from collections.abc import Iterator
from typing import Any

from starlette.types import Message, Receive, Send

from mor_jax.inference.server.errors import APIError
from mor_jax.inference.server.input_processor import ProcessedInput
from mor_jax.inference.server.json_encoding import encode, iter_encode
from mor_jax.inference.server.output_processor import usage
from mor_jax.inference.server.serving import Generation, wait_for_disconnect

# Bytes after which other tasks may run, and most tokens in one event: a few milliseconds each.
_BLOCK = 16 * 2**10
_TOKENS = 32

_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    # Otherwise nginx buffers the events.
    (b"x-accel-buffering", b"no"),
]


async def send_bytes(send: Send, status: int, headers: dict[str, str], body: bytes) -> None:
    """Sends a complete response."""
    await send(_start(status, headers, len(body)))
    await send({"type": "http.response.body", "body": body})


def _start(status: int, headers: dict[str, str], length: int) -> Message:
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    raw.append((b"content-length", str(length).encode()))
    return {"type": "http.response.start", "status": status, "headers": raw}


async def send_json(send: Send, status: int, value: Any) -> None:
    """Sends a complete JSON response."""
    await send_bytes(send, status, {"content-type": "application/json"}, encode(value))


async def send_error(send: Send, error: APIError) -> None:
    """Sends an error response."""
    await send_bytes(send, error.status, error.headers(), error.encoded())


class HTTPResponse:
    """Writes the response to one request. request_id: part of its id. model: name in it."""

    def __init__(
        self, prepared: ProcessedInput, generation: Generation, request_id: str, model: str
    ) -> None:
        self._prepared, self._generation = prepared, generation
        self._formatter = prepared.formatter
        self._head = {
            "id": self._formatter.prefix + request_id,
            "object": self._formatter.chunk_kind if prepared.stream else self._formatter.kind,
            "created": int(time.time()),
            "model": model,
        }

    async def send(self, receive: Receive, send: Send, ping: float) -> None:
        """Writes until the end or until the client disconnects.

        Raises `APIError`, but only before the first byte is sent.
        """
        watcher = asyncio.create_task(wait_for_disconnect(receive))
        watcher.add_done_callback(self._on_disconnect)
        try:
            await (self._stream(send, ping) if self._prepared.stream else self._whole(send))
        finally:
            watcher.remove_done_callback(self._on_disconnect)
            if watcher.done():
                # The client disconnected during the last write.
                self._generation.disconnect()
            watcher.cancel()

    def _on_disconnect(self, _: asyncio.Task[None]) -> None:
        self._generation.disconnect()

    async def _whole(self, send: Send) -> None:
        generation = self._generation
        while generation.open:
            await generation.wait()
        if generation.reason == "left":
            return
        choices = [self._formatter.full(choice) for choice in generation.choices]
        value = self._head | {"choices": choices, "usage": self._usage()}
        blocks, size = list[bytes](), 0
        for block in _blocks(iter_encode(value)):
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
        except APIError as error:
            # The status is already sent; OpenAI's clients raise on an event that holds an error.
            body = _event(error.body())
        await send({"type": "http.response.body", "body": body})

    async def _events(self, send: Send, ping: float) -> bytes:
        """Sends events as they arrive; returns the last ones unsent."""
        generation = self._generation
        first_chunks = [self._formatter.first_chunk(choice.index) for choice in generation.choices]
        body = b"".join(self._chunk(chunk) for chunk in first_chunks if chunk)
        loop = asyncio.get_running_loop()
        sent = loop.time()
        while generation.open:
            if body:
                await send({"type": "http.response.body", "body": body, "more_body": True})
                sent = loop.time()
            # Tokens may arrive without text; the ping counts from the last write to the client.
            arrived = await generation.wait(max(sent + ping - loop.time(), 0.0))
            body = b""
            for block in _blocks(self._new_chunks()) if arrived else ():
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

    def _new_chunks(self) -> Iterator[bytes]:
        """New chunks since the last call, choice by choice."""
        for choice in self._generation.choices:
            if choice.tokens or choice.finished:
                for part in choice.parts(_TOKENS):
                    # No text for part of a character or a possible stop string: it comes later.
                    if part.text or part.finished or self._formatter.per_token:
                        yield self._chunk(self._formatter.chunk(part))

    def _chunk(self, choice: dict[str, Any]) -> bytes:
        value = self._head | {"choices": [choice]}
        return _event(value | {"usage": None} if self._prepared.include_usage else value)

    def _usage(self) -> dict[str, int]:
        return usage(self._prepared.prompt_tokens, self._generation.tokens)


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + encode(value) + b"\n\n"


def _blocks(parts: Iterator[bytes]) -> Iterator[bytes]:
    """Joins parts into blocks of at least `_BLOCK` bytes, except for the last."""
    buffered, size = list[bytes](), 0
    for part in parts:
        buffered.append(part)
        size += len(part)
        if size >= _BLOCK:
            yield b"".join(buffered)
            buffered, size = [], 0
    if buffered:
        yield b"".join(buffered)
