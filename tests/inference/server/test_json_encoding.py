"""Answers of many megabytes, which must not keep the event loop from others."""

import asyncio
import json

import pytest
from support.http_server import run

from mor_jax.inference.engine.request import Finished, Token
from mor_jax.inference.server.input_processor import ProcessedInput
from mor_jax.inference.server.json_encoding import encode, iter_encode
from mor_jax.inference.server.output_processor import ChatFormatter, Choice, CompletionFormatter
from mor_jax.inference.server.responses import HTTPResponse

TOP = tuple((number, -1.0 - number) for number in range(20))
FORMS = {"text": CompletionFormatter, "chat": ChatFormatter}


def value():
    yield from ({"a": [i, None, "\u20ac"]} for i in range(100))


def test_parts_are_the_whole():
    whole = {"a": 1, "b": [], "c": {}, "d": [{"e": value()}, {"e": iter(())}], "f": "\u20ac"}
    found = list(iter_encode(whole))
    again = whole | {"d": [{"e": value()}, {"e": iter(())}]}
    assert b"".join(found) == encode(again)
    assert json.loads(encode(again | {"d": [{"e": value()}, {"e": []}]})) == json.loads(
        json.dumps(whole | {"d": [{"e": list(value())}, {"e": []}]})
    )
    assert max(map(len, found)) < 1000
    with pytest.raises(TypeError, match="cannot be encoded as JSON"):
        encode({"a": object()})


class Done:
    """A generation that has all tokens of several answers at its first look."""

    def __init__(self, answers, tokens):
        self.choices = [Choice(i, 1) for i in range(answers)]
        self._tokens = [
            Token(index=i, id=97, text="a", offset=i, logprob=-1.0, top=TOP) for i in range(tokens)
        ]
        self.open, self.tokens, self.reason = answers, answers * tokens, ""

    async def wait(self, seconds=None):
        for choice in self.choices:
            choice.tokens = list(self._tokens)
            choice.finished = Finished(reason="length", prompt_tokens=1, tokens=len(self._tokens))
        self.open = 0
        return True

    def disconnect(self):
        self.reason = "left"


def written(kind, stream, answers, tokens):
    """All that is sent, and the turns that others got in the event loop before each piece."""
    formatter = FORMS[kind](lambda token: bytes([token % 128]), 20, True)
    prepared = ProcessedInput(
        formatter=formatter,
        requests=(),
        echoes=(),
        prompt_tokens=(1,),
        stream=stream,
        include_usage=True,
    )
    generation, sent, turns = Done(answers, tokens), [], 0

    async def send(message):
        sent.append((message, turns))

    async def receive():
        await asyncio.Event().wait()

    async def others():
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def answer():
        beside = asyncio.create_task(others())
        await HTTPResponse(prepared, generation, "1", "small").send(receive, send, ping=60)
        beside.cancel()

    run(answer())
    return sent


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("stream", [False, True])
def test_others_get_their_turn_while_an_answer_is_written(kind, stream):
    answers, tokens = 8, 200
    (start, _), *bodies = written(kind, stream, answers, tokens)
    pieces = [message["body"] for message, _ in bodies]
    # A few milliseconds of work, however much there is.
    assert max(map(len, pieces)) < 100_000 < sum(map(len, pieces))
    assert bodies[-1][1] >= sum(map(len, pieces)) // 100_000
    raw = b"".join(pieces)
    if not stream:
        assert dict(start["headers"])[b"content-length"] == b"%d" % len(raw)
        choices = json.loads(raw)["choices"]
        assert [len(choice["depths"]) for choice in choices] == [tokens] * answers
        return
    events = [json.loads(line[6:]) for line in raw.decode().split("\n\n")[:-2]]
    choices = [event["choices"][0] for event in events if event["choices"]]
    assert sum(len(choice.get("depths", ())) for choice in choices) == answers * tokens
    assert [c["index"] for c in choices if c["finish_reason"]] == list(range(answers))
