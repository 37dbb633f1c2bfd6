"""Old clients, and clients that close their side once they have asked."""

import asyncio
import contextlib
import json
import socket

import pytest
from serve_client import TEXT, Connection
from support.engines import paused
from support.http_server import idle, run
from support.patience import until

ASKED = {"prompt": "Once", "max_tokens": 8, "seed": 5, "ignore_eos": True}
LONG = ASKED | {"max_tokens": 500}


def request(value, version="1.1", method="POST", path=TEXT):
    """The bytes of a request, which leave the connection open where the version does."""
    body = b"" if value is None else json.dumps(value).encode()
    head = f"{method} {path} HTTP/{version}\r\nhost: a\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


async def answered(server, sent, closes=False):
    """All that comes back until the server closes."""
    async with Connection(server.url) as connection:
        connection.writer.write(sent)
        if closes:
            connection.writer.write_eof()
        return await connection.reader.read()


def texts(stream):
    events = [line[6:] for line in stream.split(b"\n") if line.startswith(b"data: {")]
    return "".join(json.loads(event)["choices"][0]["text"] for event in events)


def test_old_clients_get_no_chunks(server):
    whole = run(answered(server, request(ASKED, "1.0")))
    head, _, body = whole.partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head and b"connection: close" in head
    assert b"content-length: %d\r\n" % len(body) in head
    text = json.loads(body)["choices"][0]["text"]
    whole = run(answered(server, request(ASKED | {"stream": True}, "1.0")))
    head, _, body = whole.partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head and b"connection: close" in head
    assert body.startswith(b"data: {") and body.endswith(b"data: [DONE]\n\n")
    assert texts(body) == text
    for method, path, value in (("HEAD", "/health", None), ("GET", TEXT, None), ("POST", "/", {})):
        assert run(answered(server, request(value, "1.0", method, path))).startswith(b"HTTP/1.1 ")


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_closes_its_side_gets_its_answer(
    server, engine, monkeypatch, version, stream
):
    """While it waits in the queue too, and the connection ends after it."""
    asked = request(ASKED | {"stream": stream}, version)
    usual = run(answered(server, request(ASKED | {"stream": True}, "1.0")))
    with paused(engine, monkeypatch) as going:

        async def ask():
            async with Connection(server.url) as connection:
                connection.writer.write(asked)
                connection.writer.write_eof()
                while not any(c._probe_timer for c in list(server.server.server_state.connections)):
                    await asyncio.sleep(0.001)
                going.set()
                return await connection.reader.read()

        head, _, body = run(ask()).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n") and head.count(b"HTTP/1.1") == 1
    if stream:
        assert texts(body) == texts(usual)
        assert (b"\r\n0\r\n\r\n" in body) == (version == "1.1")
    else:
        assert json.loads(body)["choices"][0]["text"] == texts(usual)


def test_all_that_such_a_client_has_asked_is_answered(server):
    asked = request(ASKED) + request(None, "1.1", "GET", "/health") + request({"prompt": 1})
    found = run(answered(server, asked, closes=True))
    statuses = [part[:3] for part in found.split(b"HTTP/1.1 ")[1:]]
    assert statuses == [b"200", b"200", b"400"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("waits", [False, True])
def test_one_that_has_left_is_told_apart(server, engine, monkeypatch, stream, waits):
    cancelled = engine.statistics().cancelled
    with paused(engine, monkeypatch, 0 if waits else 40) as going:

        async def ask():
            async with Connection(server.url) as connection:
                connection.writer.write(request(LONG | {"stream": stream}))
                while not (engine.statistics().waiting if waits else engine.statistics().running):
                    await asyncio.sleep(0.001)
                connection.writer.write_eof()

        run(ask())
        until(lambda: not server.api._generations)
        going.set()
    until(lambda: engine.statistics().cancelled == cancelled + 1)
    until(lambda: idle(engine))


def test_half_a_request_is_not_waited_for(server):
    assert run(answered(server, request(ASKED)[:-1], closes=True)) == b""


def test_a_client_that_reads_nothing_more(server, engine, monkeypatch):
    """It has shut both sides, and keeps the connection."""
    with paused(engine, monkeypatch) as going:

        async def ask():
            async with Connection(server.url) as connection:
                connection.writer.write(request(LONG))
                while not engine.statistics().waiting:
                    await asyncio.sleep(0.001)
                with contextlib.suppress(OSError):
                    connection.writer.get_extra_info("socket").shutdown(socket.SHUT_RDWR)
                while server.api._generations:
                    await asyncio.sleep(0.001)

        run(ask())
        going.set()
    until(lambda: idle(engine))
