"""Clients that come in crowds, leave, crawl or do not read, and servers that end."""

import asyncio
import contextlib
import dataclasses
import importlib
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks"))

import serve_load
from serve_client import TEXT, Connection, get, numbers, post
from support.engines import paused
from support.http_server import MODEL, engine_of, idle, run, serving
from support.patience import PATIENCE, until
from support.served_runs import write_run

from mor_jax.inference.server.limits import Limits

LONG = {"prompt": "a", "max_tokens": 500, "ignore_eos": True}

# Steps of the engine in which a long answer begins and does not end.
SOME = 50


@pytest.fixture(scope="module")
def url(server):
    return server.url


@pytest.fixture
def going(engine, monkeypatch):
    """Answers begin, and go on once this is set."""
    with paused(engine, monkeypatch, SOME) as going:
        yield going
    until(lambda: idle(engine))


def body(value):
    return json.dumps(value).encode()


def test_a_crowd_gets_the_answers_that_each_alone_would(url):
    # The queue holds 32: most are turned away at first and come again.
    row = run(serve_load.crowd(url, clients=60, seed=1, longest=8))
    assert row["holds"], row


def test_nothing_is_left_of_clients_that_come_and_go(url, engine):
    row = run(serve_load.soak(url, None, requests=80, at_once=16, seed=2))
    assert row["holds"] and row["left"] > 10, row
    until(lambda: idle(engine))


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot(server, engine, going, stream):
    cancelled = engine.statistics().cancelled

    async def ask():
        async with Connection(server.url) as connection:
            await connection.ask(TEXT, body(LONG | {"stream": stream, "n": 3}))
            if stream:
                await connection.head()
            while engine.statistics().running == 0:
                await asyncio.sleep(0.001)

    run(ask())
    until(lambda: not server.api._generations)
    going.set()
    until(lambda: idle(engine))
    assert engine.statistics().cancelled > cancelled


@pytest.mark.parametrize("meanwhile", [False, True], ids=["at once", "meanwhile"])
def test_a_client_that_sent_two_requests_and_leaves(server, engine, going, meanwhile):
    async def ask():
        async with Connection(server.url) as connection:
            await connection.ask(TEXT, body(LONG))
            while meanwhile and engine.statistics().running == 0:
                await asyncio.sleep(0.001)
            await connection.ask(TEXT, body(LONG))
            while not any(len(c._cycles) == 2 for c in server.server.server_state.connections):
                await asyncio.sleep(0.001)

    run(ask())
    until(lambda: not server.server.server_state.tasks)
    decode_steps = engine.statistics().decode_steps
    going.set()
    until(lambda: idle(engine))
    # Neither is answered to its end for nobody.
    assert engine.statistics().decode_steps - decode_steps < 100


def test_a_full_queue_says_when_to_come_back(url, engine, going):
    async def ask():
        async with Connection(url) as busy:
            await busy.ask(TEXT, body(LONG | {"n": 30}))
            while engine.statistics().waiting == 0:
                await asyncio.sleep(0.001)
            async with Connection(url) as late:
                await late.ask(TEXT, body(LONG | {"n": 30}))
                status = await late.head()
                answer = json.loads(await late.body())
            return status, late.headers, answer["error"]["code"]

    status, headers, code = run(ask())
    assert (status, code) == (429, "busy") and int(headers["retry-after"]) >= 1


def test_too_many_requests_at_work(engine, going):
    with serving(engine, Limits(max_requests=1)) as server:

        async def ask():
            async with Connection(server.url) as first:
                await first.ask(TEXT, body(LONG))
                while engine.statistics().running == 0:
                    await asyncio.sleep(0.001)
                return await post(server.url, TEXT, LONG), await get(server.url, "/health")

        (status, _), (health, _) = run(ask())
        assert (status, health) == (429, 200)


def test_a_client_that_does_not_read_is_cut_off(engine):
    with serving(engine, Limits(write_timeout=0.3, max_unsent=8)) as server:
        decode_steps = engine.statistics().decode_steps

        async def ask():
            # Twenty alternatives a token make megabytes, more than the system holds.
            loud = LONG | {"logprobs": 20, "n": 8, "stream": True}
            async with Connection(server.url, room=1024) as stalled:
                await stalled.ask(TEXT, body(loud))
                while engine.statistics().decode_steps == decode_steps:
                    await asyncio.sleep(0.001)
                # Others are served meanwhile.
                status, _ = await post(server.url, TEXT, {"prompt": "b", "max_tokens": 4})
                while not idle(engine) or server.server.server_state.tasks:
                    await asyncio.sleep(0.01)
                seen = b""
                with contextlib.suppress(ConnectionResetError):
                    while piece := await stalled.reader.read(2**16):
                        seen += piece
                return status, b"[DONE]" in seen

        assert run(ask()) == (200, False)


@pytest.mark.parametrize(
    "sent",
    [b"", b"POST /v1/completions HT", b"POST /v1/completions HTTP/1.1\r\nx: 1\r\n"],
    ids=["nothing", "half a line", "no end of headers"],
)
def test_a_request_that_does_not_come_is_not_waited_for(engine, sent):
    with serving(engine, Limits(read_timeout=0.2)) as server:

        async def ask():
            async with Connection(server.url) as connection:
                connection.writer.write(sent)
                return await connection.reader.read()

        with contextlib.suppress(ConnectionResetError):
            assert run(ask()) == b""


def test_a_body_that_does_not_come_is_not_waited_for(engine):
    limits = Limits(read_timeout=PATIENCE)
    with serving(engine, limits) as server:
        # For bodies alone: however late this client is, its headers must not be.
        server.api.app._limits = dataclasses.replace(limits, read_timeout=0.2)

        async def ask():
            async with Connection(server.url) as connection:
                await connection.ask(TEXT, b"{", {"content-length": "100"})
                return await connection.head()

        assert run(ask()) == 408


def test_headers_without_end_are_refused(url):
    async def ask():
        async with Connection(url) as connection:
            connection.writer.write(b"GET /health HTTP/1.1\r\n" + b"x: " + b"y" * 200_000)
            return await connection.head()

    assert run(ask()) == 400


def test_two_requests_on_one_connection_and_garbage_on_another(url):
    async def ask():
        async with Connection(url) as connection:
            for _ in range(2):
                await connection.ask(TEXT, body({"prompt": "a", "max_tokens": 2}))
                assert await connection.head() == 200
                await connection.body()
        async with Connection(url) as connection:
            connection.writer.write(b"\x16\x03\x01 hello \r\n\r\n")
            assert await connection.head() == 400
        return (await get(url, "/health"))[0]

    assert run(ask()) == 200


def test_a_server_that_ends_finishes_what_it_began(tmp_path, monkeypatch):
    with (
        engine_of(tmp_path / "small") as engine,
        paused(engine, monkeypatch, SOME) as going,
        serving(engine, Limits(drain=PATIENCE, read_timeout=PATIENCE)) as server,
    ):

        async def ask():
            async with Connection(server.url) as one, Connection(server.url) as late:
                await one.ask(TEXT, body(LONG | {"stream": True}))
                assert await one.head() == 200
                events = one.events()
                await anext(events)
                server.server.stop()
                while not server.api.draining:
                    await asyncio.sleep(0.001)
                await late.ask(TEXT, body(LONG))
                refused = await late.head()
                health, _ = await get(server.url, "/health")
                going.set()
                rest = [event async for event in events]
            return refused, health, rest[-1]["choices"][0]["finish_reason"]

        assert run(ask()) == (503, 503, "length")
        server.thread.join(PATIENCE)
        assert not server.thread.is_alive() and server.server.code == 0


def test_a_second_signal_gives_up(tmp_path, monkeypatch):
    with (
        engine_of(tmp_path / "small") as engine,
        paused(engine, monkeypatch, SOME) as going,
        serving(engine, Limits(drain=PATIENCE)) as server,
    ):

        async def ask():
            async with Connection(server.url) as one:
                await one.ask(TEXT, body(LONG | {"stream": True, "n": 16}))
                await one.head()
                events = one.events()
                await anext(events)
                server.server.stop()
                server.server.stop()
                with pytest.raises(EOFError):
                    async for event in events:
                        last = event
            going.set()
            return last["error"]["code"]

        assert run(ask()) == "stopped"
        server.thread.join(PATIENCE)
        assert not server.thread.is_alive()


def test_an_engine_that_fails_ends_the_server_with_an_error(tmp_path, monkeypatch):
    with (
        engine_of(tmp_path / "small") as engine,
        paused(engine, monkeypatch, SOME) as going,
        serving(engine) as server,
    ):

        async def ask():
            async with Connection(server.url) as one:
                await one.ask(TEXT, body(LONG | {"stream": True}))
                await one.head()
                events = one.events()
                await anext(events)
                # A device that breaks down in the middle of an answer.
                engine._runner.step = lambda: 1 / 0
                going.set()
                with pytest.raises(EOFError):
                    async for event in events:
                        last = event
            return last["error"]

        error = run(ask())
        assert (error["code"], error["type"]) == ("engine_error", "server_error")
        assert "division by zero" in error["message"]
        server.thread.join(PATIENCE)
        assert not server.thread.is_alive() and server.server.code == 1


def test_the_command_serves_and_ends(tmp_path):
    write_run(tmp_path / "small", MODEL)
    keys = tmp_path / "keys"
    keys.write_text("# of the team\nsecret\n")
    arguments = [f"--workdir={tmp_path / 'small'}", "--slots=2", f"--api_key_file={keys}"]
    arguments.append(f"--drain={PATIENCE}")
    with serve_load.started(arguments) as (url, pid):

        async def ask():
            async with Connection(url) as connection:
                await connection.ask(TEXT, body(LONG), {"authorization": "Bearer secret"})
                # Asked to end meanwhile: the answer still comes. `started` sees to the exit code.
                while (await numbers(url))["mor_generated_tokens_total"] == 0:
                    await asyncio.sleep(0.01)
                subprocess.run(["kill", f"-{int(signal.SIGTERM)}", str(pid)], check=True)
                status = await connection.head()
                return status, json.loads(await connection.body())["usage"]

        status, usage = run(ask())
    assert (status, usage["completion_tokens"]) == (200, 500)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workdir=nowhere"], "nowhere"),
        (["--workdir=.", "--api_key_file=/dev/null"], "api_key_file"),
        (["--workdir=.", "--port=65536"], "--port=65536"),
        (["--workdir=.", "--timeout=-1"], "--timeout=-1.0: must be greater than 0"),
        (["--workdir=.", "--keep_alive=0"], "--keep_alive=0.0: must be greater than 0"),
        (["--workdir=.", "--drain=1e300"], "--drain=1e+300: must be a number, at most"),
        (["--workdir=.", "--cache=lots"], "--cache='lots'"),
    ],
)
def test_the_command_says_what_is_wrong(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert importlib.import_module("mor_jax.cli.serve").main(["--port=0", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error, error


def numeric(parser):
    """Options of a command that take numbers, and whether these are whole."""
    return {a.dest: a.type is int for a in parser._actions if a.type in (int, float)}


@pytest.mark.parametrize("command", ["serve", "generate"])
def test_extremes_of_every_number_are_one_line_that_names_the_option(tmp_path, capsys, command):
    write_run(tmp_path / "small", MODEL)
    program = importlib.import_module(f"mor_jax.cli.{command}")
    options = numeric(program._parser())
    assert len(options) > 10
    given = [
        f"--workdir={tmp_path / 'small'}",
        *({"serve": ["--port=0"]}.get(command) or ["--prompt=a"]),
    ]
    # As many as anybody likes.
    endless = ("top_k", "max_waiting")
    for name, whole in options.items():
        for value in ("-3", str(10**30) if whole else "nan"):
            if name not in endless or value == "-3":
                assert program.main([*given, f"--{name}={value}"]) == 2, (name, value)
                error = capsys.readouterr().err
                assert error.startswith(f"error: --{name}={value}"), error
                assert error.count("\n") == 1 and ". " in error
