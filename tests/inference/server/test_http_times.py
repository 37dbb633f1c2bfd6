"""What the server says about time holds on the wire: when to come back, how long it waits, its end.

Nothing here is measured. Answers are slow because the engine is held, however fast the machine is.
"""

import asyncio
import contextlib
import json
import time

import openai
import pytest
from serve_client import TEXT, Connection, post
from support.engines import paused
from support.http_server import engine_of, idle, run, serving
from support.patience import PATIENCE, until

from mor_jax.inference.engine.request import Finished, Request, SamplingParams
from mor_jax.inference.server import api_server as http_server
from mor_jax.inference.server.input_processor import ProcessedInput
from mor_jax.inference.server.limits import Limits
from mor_jax.inference.server.metrics import ServerMetrics
from mor_jax.inference.server.output_processor import Choice, CompletionFormatter
from mor_jax.inference.server.responses import HTTPResponse
from mor_jax.inference.server.serving import Generation

LONG = {"prompt": "a", "max_tokens": 500, "ignore_eos": True}
WAITING = 32


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    directory = tmp_path_factory.mktemp("http") / "small"
    with engine_of(directory, max_waiting=WAITING) as engine:
        yield engine


@pytest.fixture
def going(engine, monkeypatch):
    """The engine computes nothing until this is set."""
    with paused(engine, monkeypatch) as going:
        yield going
    until(lambda: idle(engine))


def body(value):
    return json.dumps(value).encode()


async def fill(connection):
    """A request that takes all places of the queue of an engine that is held."""
    await connection.ask(TEXT, body(LONG | {"n": WAITING, "stream": True}))
    assert await connection.head() == 200


async def refused(connection):
    """Asks; status, headers and code of the refusal, after which the connection has to end."""
    await connection.ask(TEXT, body(LONG))
    status = await connection.head()
    code = json.loads(await connection.body())["error"]["code"]
    assert await connection.reader.read() == b""
    return status, connection.headers["retry-after"], connection.headers["connection"], code


def refused_beside_another(server):
    """What a client gets while another one fills the server, as `refused` says it."""

    async def ask():
        async with Connection(server.url) as busy, Connection(server.url) as late:
            await fill(busy)
            return await refused(late)

    return run(ask())


# Much shorter and much longer than any wait that the server asks for.
@pytest.mark.parametrize("keep_alive", [0.05, PATIENCE])
def test_a_client_that_is_told_to_come_back_is_told_that_its_connection_ends(
    engine, going, keep_alive
):
    with serving(engine, Limits(keep_alive=keep_alive)) as server:
        # As after answers that took long: the longest wait that is ever asked for.
        server.api._mean_slot_seconds = 1e6
        assert refused_beside_another(server) == (429, "30", "close", "busy")


def test_what_a_text_waited_for_is_no_part_of_what_the_next_one_has_to():
    metrics = ServerMetrics(lambda: None, "small")
    generation = Generation(None, None, Limits(), metrics)
    generation.choices, generation._handles, generation.open = [Choice(0, 1)], [None], 1
    end = Finished(reason="length", prompt_tokens=1, tokens=4, seconds=100.0, queue_seconds=98.0)
    generation._finish(0, end)
    assert generation.slot_seconds == [2.0]


def test_with_too_many_requests_at_work_too(engine, going):
    with serving(engine, Limits(max_requests=1, keep_alive=PATIENCE)) as server:
        assert refused_beside_another(server) == (429, "1", "close", "busy")


def test_clients_that_come_back_as_told_are_answered(engine, going):
    seen = []

    def note(response):
        stream = response.extensions["network_stream"]
        seen.append((response.status_code, stream.get_extra_info("client_addr")))

    def ask(url):
        hooks = {"response": [note]}
        with (
            openai.DefaultHttpxClient(event_hooks=hooks, timeout=PATIENCE) as http,
            openai.OpenAI(
                base_url=f"{url}/v1", api_key="any", max_retries=1000, http_client=http
            ) as client,
        ):
            extra = {"ignore_eos": True}
            return client.completions.create(
                model="small", prompt="Once", max_tokens=8, seed=5, extra_body=extra
            )

    async def crowd(url):
        loop = asyncio.get_running_loop()
        async with Connection(url) as busy:
            await fill(busy)
            asking = loop.run_in_executor(None, ask, url)
            while not seen:
                await asyncio.sleep(0.01)
        # Whoever filled the queue has left.
        going.set()
        return await asking

    # Shorter than a second, the least that clients are asked to wait.
    with serving(engine, Limits(keep_alive=0.05)) as server:
        done = run(crowd(server.url))
    tokens, finished = engine.submit(
        Request(
            prompt=tuple(b"Once"), max_tokens=8, sampling=SamplingParams(seed=5), ignore_eos=True
        )
    ).result()
    assert done.choices[0].text == "".join(token.text for token in tokens) + finished.text
    statuses, addresses = zip(*seen, strict=True)
    assert set(statuses[:-1]) == {429} and statuses[-1] == 200
    assert len(set(addresses)) == len(addresses)


def test_a_request_that_the_queue_can_never_hold_is_not_told_to_come_back(engine):
    with serving(engine) as server:
        status, answer = run(post(server.url, TEXT, LONG | {"n": WAITING + 1}))
    assert (status, answer["error"]["param"]) == (400, "n")


def test_a_connection_is_kept_and_then_closed(engine):
    with serving(engine, Limits(keep_alive=0.05)) as server:

        async def ask():
            async with Connection(server.url) as connection:
                await connection.ask("/health", None)
                assert await connection.head() == 200 and "connection" not in connection.headers
                await connection.body()
                return await connection.reader.read()

        assert run(ask()) == b""


def test_a_server_that_ends_says_so_on_every_connection(tmp_path, monkeypatch):
    limits = Limits(drain=PATIENCE, keep_alive=PATIENCE)
    with (
        engine_of(tmp_path / "small") as engine,
        paused(engine, monkeypatch) as going,
        serving(engine, limits) as server,
    ):

        async def ask():
            async with (
                Connection(server.url) as one,
                Connection(server.url) as kept,
                Connection(server.url) as probe,
            ):
                await one.ask(TEXT, body({"prompt": "a", "max_tokens": 2, "ignore_eos": True}))
                await kept.ask("/health", None)
                assert await kept.head() == 200
                await kept.body()
                while not server.api._generations:
                    await asyncio.sleep(0.01)
                server.server.stop()
                while not server.api.draining:
                    await asyncio.sleep(0.01)
                assert await refused(kept) == (503, "5", "close", "stopped")
                await probe.ask("/health", None)
                assert (await probe.head(), probe.headers["connection"]) == (503, "close")
                await probe.body()
                assert await probe.reader.read() == b""
                # What was under way comes whole, and is the last thing on its connection.
                going.set()
                assert (await one.head(), one.headers["connection"]) == (200, "close")
                tokens = json.loads(await one.body())["usage"]["completion_tokens"]
                assert await one.reader.read() == b""
                return tokens

        assert run(ask()) == 2
        server.thread.join(PATIENCE)
        assert not server.thread.is_alive() and server.server.code == 0


def test_a_deadline_counts_from_when_the_request_was_read(engine, monkeypatch):
    with serving(engine) as server:
        prepare = server.api._input_processor.completion

        def slow(raw):
            # Longer than the deadline below, on any machine.
            time.sleep(0.2)
            return prepare(raw)

        monkeypatch.setattr(server.api._input_processor, "completion", slow)
        asked = {"prompt": "a", "max_tokens": 1, "ignore_eos": True}
        assert run(post(server.url, TEXT, asked | {"timeout": PATIENCE}))[0] == 200
        status, answer = run(post(server.url, TEXT, asked | {"timeout": 0.1}))
    assert (status, answer["error"]["code"]) == (504, "deadline")


def test_an_answer_that_is_left_unread_to_its_end_is_cut_off(engine, monkeypatch):
    # The system takes a part of the answer; less than 64 kB are left, and nothing follows.
    monkeypatch.setattr(http_server, "SEND_BUFFER", 4096)
    with serving(engine, Limits(write_timeout=0.1, keep_alive=0.1)) as server:

        async def ask():
            async with Connection(server.url, room=1024) as connection:
                asked = {"prompt": "a", "max_tokens": 60, "logprobs": 20, "ignore_eos": True}
                await connection.ask(TEXT, body(asked))
                while not server.server.server_state.connections:
                    await asyncio.sleep(0.01)
                while server.server.server_state.connections:
                    await asyncio.sleep(0.01)
                seen = b""
                with contextlib.suppress(ConnectionResetError):
                    while piece := await connection.reader.read(2**16):
                        seen += piece
                return seen

        # Else the system had room for all of it, and nothing was cut off.
        assert not run(ask()).endswith(b"}")


class _Mute:
    """A generation whose tokens have no text, as while a stop text may have begun."""

    open, choices, tokens = 1, (), 0

    async def wait(self, seconds=None):
        await asyncio.sleep(0.001)
        return True


def test_a_stream_whose_tokens_have_no_text_is_not_silent():
    generation, sent = _Mute(), []

    async def send(message):
        sent.append(message.get("body"))
        if b": waiting\n\n" in sent:
            generation.open = 0

    async def receive():
        await asyncio.Event().wait()

    formatter = CompletionFormatter(lambda token: b"", None, False)
    prepared = ProcessedInput(
        formatter=formatter,
        requests=(),
        echoes=(),
        prompt_tokens=(1,),
        stream=True,
        include_usage=False,
    )
    run(HTTPResponse(prepared, generation, "1", "small").send(receive, send, ping=0.05))
    assert sent[-1] == b"data: [DONE]\n\n"
