"""A small HTTP client that also misbehaves: it leaves early, sends slowly, or does not read.

Libraries for clients read ahead and keep connections; here every byte is read when asked for.
"""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"


class Connection:
    """One connection to a server, `async with`. url: `http://127.0.0.1:8000`. room: bytes that the
    system may hold unread; None leaves it to the system."""

    def __init__(self, url: str, room: int | None = None) -> None:
        self._address = urlsplit(url)
        self._room = room
        self.status = 0
        self.headers: dict[str, str] = {}

    async def __aenter__(self) -> "Connection":
        host, port = self._address.hostname, self._address.port
        family = socket.AF_INET6 if host is not None and ":" in host else socket.AF_INET
        made = socket.socket(family)
        made.setblocking(False)
        limit = 2**16
        if self._room is not None:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._room)
            limit = 1
        await asyncio.get_running_loop().sock_connect(made, (host, port))
        self.reader, self.writer = await asyncio.open_connection(sock=made, limit=limit)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.transport.abort()

    async def ask(self, path: str, body: bytes | None, headers: dict[str, str] | None = None):
        """Sends a request: GET without a body."""
        lines = [f"{'GET' if body is None else 'POST'} {path} HTTP/1.1", "host: localhost"]
        given = {"content-type": "application/json", "content-length": str(len(body or b""))}
        lines += [f"{name}: {value}" for name, value in (given | (headers or {})).items()]
        self.writer.write("\r\n".join([*lines, "", ""]).encode() + (body or b""))
        await self.writer.drain()

    async def head(self) -> int:
        """Reads status and headers; returns the status."""
        lines = (await self.reader.readuntil(b"\r\n\r\n")).decode().splitlines()
        self.status = int(lines[0].split()[1])
        pairs = (line.split(":", 1) for line in lines[1:] if line)
        self.headers = {name.lower(): value.strip() for name, value in pairs}
        return self.status

    async def body(self) -> bytes:
        """The rest of a response, whole."""
        if "content-length" in self.headers:
            return await self.reader.readexactly(int(self.headers["content-length"]))
        return b"".join([piece async for piece in self._pieces()])

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """The objects of a stream. Raises `EOFError` unless it ends as it should."""
        rest = b""
        async for piece in self._pieces():
            *whole, rest = (rest + piece).split(b"\n\n")
            for event in whole:
                if event == b"data: [DONE]":
                    return
                if event.startswith(b"data: "):
                    yield json.loads(event[6:])
        raise EOFError("the stream broke off")

    async def _pieces(self) -> AsyncIterator[bytes]:
        while size := int(await self.reader.readuntil(b"\r\n"), 16):
            yield await self.reader.readexactly(size)
            await self.reader.readexactly(2)
        await self.reader.readexactly(2)


async def get(url: str, path: str, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
    """Status and body of a GET."""
    async with Connection(url) as connection:
        await connection.ask(path, None, headers)
        return await connection.head(), await connection.body()


async def post(url: str, path: str, value: Any) -> tuple[int, dict[str, Any]]:
    """Status and JSON of a POST."""
    async with Connection(url) as connection:
        await connection.ask(path, json.dumps(value).encode())
        return await connection.head(), json.loads(await connection.body())


async def numbers(url: str) -> dict[str, float]:
    """/metrics, by name with labels."""
    _, text = await get(url, "/metrics")
    lines = (line for line in text.decode().splitlines() if not line.startswith("#"))
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}
