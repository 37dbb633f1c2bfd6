"""The endpoints as clients of OpenAI's API see them."""

import asyncio
import contextlib
import json
import threading

import openai
import pytest
from serve_client import CHAT, TEXT, Connection, get, numbers, post
from support.engines import paused
from support.http_server import idle, run, serving
from support.patience import PATIENCE, until

from mor_jax.inference.engine.request import Request, SamplingParams
from mor_jax.inference.engine.sequence import Sequence

LONG = {"prompt": "a", "max_tokens": 500, "ignore_eos": True}
ASKED = {"prompt": "Once", "max_tokens": 8, "temperature": 1, "seed": 5, "ignore_eos": True}


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        yield client


def expected(engine, prompt: bytes, seed=5, **settings):
    """What the engine itself answers: text, tokens, end."""
    asked = {"max_tokens": 8, "ignore_eos": True} | settings
    request = Request(prompt=tuple(prompt), sampling=SamplingParams(seed=seed), **asked)
    tokens, finished = engine.submit(request).result()
    return "".join(token.text for token in tokens) + finished.text, tokens, finished


def test_completion_is_the_engines(client, engine):
    extra = {"ignore_eos": True}
    done = client.completions.create(
        model="small", prompt="Once", max_tokens=8, seed=5, user="me", extra_body=extra
    )
    text, tokens, _ = expected(engine, b"Once")
    assert (done.choices[0].text, done.choices[0].finish_reason) == (text, "length")
    assert done.usage.model_dump(exclude_none=True) == {
        "prompt_tokens": 4,
        "completion_tokens": len(tokens),
        "total_tokens": 4 + len(tokens),
    }
    assert (done.model, done.object) == ("small", "text_completion")


def test_stream_adds_up_to_the_completion(client, engine):
    stream = client.completions.create(
        model="small",
        prompt="Once",
        max_tokens=8,
        seed=5,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    *chunks, last = list(stream)
    text, tokens, _ = expected(engine, b"Once")
    assert "".join(chunk.choices[0].text for chunk in chunks) == text
    ends = [chunk.choices[0].finish_reason for chunk in chunks]
    assert ends[-1] == "length" and not any(ends[:-1])
    assert (last.choices, last.usage.completion_tokens) == ([], len(tokens))


def test_prompts_times_n_in_order_each_with_its_own_seed(server, engine):
    asked = ASKED | {"prompt": [[97, 98], [99, 100]], "n": 2, "echo": True, "depths": True}
    status, done = run(post(server.url, TEXT, asked))
    assert status == 200
    for i, (prompt, seed) in enumerate(((b"ab", 5), (b"ab", 6), (b"cd", 5), (b"cd", 6))):
        text, tokens, _ = expected(engine, prompt, seed)
        choice = done["choices"][i]
        assert (choice["index"], choice["text"]) == (i, prompt.decode() + text)
        assert choice["depths"] == [token.depth for token in tokens]
    assert done["usage"]["prompt_tokens"] == 4


def test_logprobs_of_completions(server, engine):
    _, tokens, _ = expected(engine, b"Once", logprobs=2)
    _, done = run(post(server.url, TEXT, ASKED | {"logprobs": 2}))
    logprobs = done["choices"][0]["logprobs"]
    assert logprobs["token_logprobs"] == pytest.approx([t.logprob for t in tokens])
    assert [len(top) for top in logprobs["top_logprobs"]] == [2] * len(tokens)
    assert logprobs["text_offset"][0] == 0 and logprobs["text_offset"] == sorted(
        logprobs["text_offset"]
    )
    raw = [bytes([t.id]) for t in tokens]
    names = [b.decode() if b < b"\x80" else f"bytes:\\x{b[0]:02x}" for b in raw]
    assert logprobs["tokens"] == names


def test_chat_goes_through_the_template(client, engine):
    messages = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    asked = {"model": "small", "messages": messages, "max_completion_tokens": 8, "seed": 5}
    extra = {"ignore_eos": True}
    done = client.chat.completions.create(**asked, logprobs=True, top_logprobs=1, extra_body=extra)
    text, tokens, _ = expected(engine, b"<user>hi<assistant>", logprobs=1)
    choice = done.choices[0]
    assert (choice.message.content, choice.message.role) == (text, "assistant")
    assert [entry.bytes for entry in choice.logprobs.content] == [[t.id] for t in tokens]
    assert [len(entry.top_logprobs) for entry in choice.logprobs.content] == [1] * len(tokens)
    chunks = list(client.chat.completions.create(**asked, stream=True, extra_body=extra))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == text
    assert chunks[-1].choices[0].finish_reason == "length"


def test_stop_texts_end_answers(server, engine):
    text, _, _ = expected(engine, b"Once", max_tokens=32)
    stop = text[5:7]
    _, done = run(post(server.url, TEXT, ASKED | {"max_tokens": 32, "stop": [stop]}))
    choice = done["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (text[: text.index(stop)], "stop")


def test_deadlines_cut_answers_off(server, engine):
    asked = ASKED | {"max_tokens": 500, "timeout": 0.1}
    status, done = run(post(server.url, TEXT, asked))
    if status == 200:
        choice = done["choices"][0]
        assert (choice["finish_reason"], choice["stop_reason"]) == ("length", "deadline")
    else:
        # A machine that was too slow for the first token.
        assert (status, done["error"]["code"]) == (504, "deadline")
    until(lambda: idle(engine))


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_there_when_time_is_up_is_given(engine, monkeypatch, stream):
    """Four texts run, two wait: those get an empty answer, and it says why."""
    asked = LONG | {"n": 6, "stream": stream}
    step, there = engine._runner.step, threading.Event()
    monkeypatch.setattr(engine._runner, "step", lambda: there.wait(PATIENCE) and step())
    running = engine._runner.scheduler.running
    # So many steps give the first four some tokens.
    with paused(engine, monkeypatch, 40) as going, serving(engine) as server:

        async def ask():
            async with Connection(server.url) as connection:
                await connection.ask(TEXT, json.dumps(asked).encode())
                while not any(one.open == 6 for one in list(server.api._generations)):
                    await asyncio.sleep(0.001)
                there.set()
                while not (
                    len(running) == 4 and all(s.output_tokens for s in list(running.values()))
                ):
                    await asyncio.sleep(0.001)
                monkeypatch.setattr(Sequence, "past_deadline", True)
                going.set()
                assert await connection.head() == 200
                if stream:
                    return [event["choices"][0] async for event in connection.events()]
                return json.loads(await connection.body())["choices"]

        parts = run(ask())
    ends = {part["index"]: part for part in parts if part["finish_reason"]}
    assert sorted(ends) == list(range(6))
    for index, end in ends.items():
        assert (end["finish_reason"], end["stop_reason"]) == ("length", "deadline")
        text = "".join(part["text"] for part in parts if part["index"] == index)
        assert bool(text) == (index < 4)
    until(lambda: idle(engine))


@pytest.mark.parametrize("stream", [False, True])
def test_nothing_at_all_in_time_is_an_error(engine, monkeypatch, stream):
    with paused(engine, monkeypatch) as going, serving(engine) as server:

        async def ask():
            async with Connection(server.url) as connection:
                await connection.ask(TEXT, json.dumps(LONG | {"n": 2, "stream": stream}).encode())
                while not any(one.open == 2 for one in list(server.api._generations)):
                    await asyncio.sleep(0.001)
                monkeypatch.setattr(Sequence, "past_deadline", True)
                going.set()
                status = await connection.head()
                if not stream:
                    return status, json.loads(await connection.body())
                with contextlib.suppress(EOFError):
                    async for event in connection.events():
                        last = event
                return status, last

        status, last = run(ask())
    assert (status, last["error"]["code"]) == (200 if stream else 504, "deadline")


def test_models_health_and_metrics(server, client):
    assert [model.id for model in client.models.list()] == ["small"]
    assert client.models.retrieve("small").created > 0
    assert run(get(server.url, "/health")) == (200, b'{"status":"ok"}')
    before = run(numbers(server.url))
    run(post(server.url, TEXT, ASKED))
    after = run(numbers(server.url))

    def gained(name):
        return after[name] - before.get(name, 0)

    assert gained('mor_http_requests_total{endpoint="/v1/completions",status="200"}') == 1
    assert gained('mor_choices_total{reason="length"}') == 1
    assert gained("mor_generated_tokens_total") == 8
    assert gained("mor_time_to_first_token_seconds_count") == 1
    assert gained("mor_time_between_tokens_seconds_count") == 7
    assert gained('mor_token_depth_bucket{le="+Inf"}') >= 8
    assert after["mor_engine_slots"] == 4 and after["mor_cache_bytes"] > 0
    assert 0 < after["mor_engine_useful_share"] <= 1


REFUSED = {
    "no prompt": (TEXT, {}, 400, "prompt"),
    "no messages": (CHAT, {"messages": []}, 400, "messages"),
    "another model": (TEXT, ASKED | {"model": "gpt-5"}, 404, "model"),
    "unknown token": (TEXT, ASKED | {"prompt": [1, 256]}, 400, "prompt[1]"),
    "unknown token of the second": (TEXT, ASKED | {"prompt": [[1], [256]]}, 400, "prompt[1][0]"),
    "negative token": (TEXT, ASKED | {"prompt": [[-1]]}, 400, "prompt[0][0]"),
    "tools": (CHAT, {"messages": [{"role": "user", "content": "a"}], "tools": [{}]}, 400, "tools"),
    "unknown stop": (TEXT, ASKED | {"stop_token_ids": [3, 300]}, 400, "stop_token_ids[1]"),
    "no such path": ("/v1/embeddings", {}, 404, None),
}


TOO_LONG = {
    "a text": (TEXT, {"prompt": "a" * 600}, "prompt"),
    "one of two": (TEXT, {"prompt": ["a", "a" * 512]}, "prompt[1]"),
    "tokens": (TEXT, {"prompt": [1] * 512}, "prompt"),
    "max_tokens": (TEXT, ASKED | {"max_tokens": 509}, "max_tokens"),
    "a chat": (CHAT, {"messages": [{"role": "user", "content": "a" * 500}]}, "messages"),
    "the newer name": (
        CHAT,
        {"messages": [{"role": "user", "content": "a"}], "max_completion_tokens": 500},
        "max_completion_tokens",
    ),
}


@pytest.mark.parametrize("name", TOO_LONG)
def test_what_the_context_does_not_hold_is_told_in_the_words_that_clients_look_for(server, name):
    path, body, param = TOO_LONG[name]
    status, answer = run(post(server.url, path, body))
    error = answer["error"]
    assert (status, error["code"], error["param"]) == (400, "context_length_exceeded", param)
    assert "This model's maximum context length is 512 tokens" in error["message"]


def test_all_of_the_context_can_be_used(server):
    asked = {"prompt": [97] * 511, "max_tokens": 1, "ignore_eos": True}
    status, done = run(post(server.url, TEXT, asked))
    assert (status, done["usage"]["completion_tokens"]) == (200, 1)
    chat = {"messages": [{"role": "user", "content": "a"}], "ignore_eos": True}
    assert run(post(server.url, CHAT, chat))[1]["usage"]["total_tokens"] == 512


def test_texts_know_where_their_tokens_begin(server):
    """Whatever is held back for a possible stop text, and where bytes are no characters."""
    asked = ASKED | {"max_tokens": 24, "logprobs": 0}
    _, done = run(post(server.url, TEXT, asked))
    text, told = done["choices"][0]["text"], done["choices"][0]["logprobs"]
    assert [text[at] for at in told["text_offset"]] == [
        "\ufffd" if name.startswith("bytes:") else name for name in told["tokens"]
    ]
    # Begins at every second place of the text, and never ends.
    stops = [text[at : at + 3] + "!?" for at in range(0, 16, 2)]
    assert run(post(server.url, TEXT, asked | {"stop": stops}))[1]["choices"] == done["choices"]

    async def stream():
        async with Connection(server.url) as connection:
            body = json.dumps(asked | {"stop": stops, "stream": True}).encode()
            await connection.ask(TEXT, body)
            await connection.head()
            return [event["choices"][0] async for event in connection.events()]

    parts = run(stream())
    offsets = [at for part in parts for at in part["logprobs"]["text_offset"]]
    assert offsets == told["text_offset"]
    assert "".join(part["text"] for part in parts) == text


@pytest.mark.parametrize("prompt", [[100, 0xE6, 0x9D], [100, 0xFF], [0xE6], "d\ufffd"])
def test_an_echo_and_its_answer_are_the_text_of_all_tokens(server, engine, prompt):
    """A character that the prompt only begins is there once."""
    _, done = run(post(server.url, TEXT, ASKED | {"prompt": prompt, "echo": True}))
    ids = tuple(prompt.encode() if isinstance(prompt, str) else prompt)
    _, tokens, _ = expected(engine, ids)
    whole = bytes([*ids, *(token.id for token in tokens)]).replace(b"\0", b"")
    assert done["choices"][0]["text"] == whole.decode("utf-8", "replace")


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_member(server, name):
    path, body, status, param = REFUSED[name]
    got, answer = run(post(server.url, path, body))
    assert (got, answer["error"]["param"]) == (status, param)
    assert answer["error"]["message"] and answer["error"]["type"]
    until(lambda: idle(server.engine))


def test_clients_raise_their_own_errors(client):
    with pytest.raises(openai.BadRequestError, match="temperature=-1") as caught:
        client.completions.create(model="small", prompt="a", temperature=-1)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


@pytest.mark.parametrize(
    ("headers", "body", "status"),
    [
        ({"content-type": "text/plain"}, b"{}", 415),
        ({"content-encoding": "gzip"}, b"{}", 415),
        ({"content-length": str(10**12)}, b"{}", 413),
        ({"transfer-encoding": "chunked", "content-length": "0"}, b"3\r\nabc\r\n0\r\n\r\n", 400),
    ],
)
def test_bodies_that_are_not_read(server, headers, body, status):
    async def ask():
        async with Connection(server.url) as connection:
            await connection.ask(TEXT, body, headers)
            return await connection.head()

    assert run(ask()) == status


@pytest.mark.parametrize(
    ("path", "body", "allow"),
    [(TEXT, None, "POST"), (CHAT, None, "POST"), ("/health", b"{}", "GET, HEAD")],
)
def test_another_method_is_told_those_that_there_are(server, path, body, allow):
    async def ask():
        async with Connection(server.url) as connection:
            await connection.ask(path, body)
            return await connection.head(), connection.headers["allow"]

    assert run(ask()) == (405, allow)


def test_only_keys_open_the_server(engine):
    with serving(engine, keys=(b"secret", b"other")) as server:
        for key, status in (("secret", 200), ("other", 200), ("secre", 401), ("", 401)):
            got, body = run(get(server.url, "/v1/models", {"authorization": f"Bearer {key}"}))
            assert got == status
        assert json.loads(body)["error"]["type"] == "authentication_error"
        assert run(post(server.url, TEXT, ASKED))[0] == 401
        assert run(get(server.url, "/health"))[0] == 200
