"""What requests may hold, each rule by a body that breaks it; limits; keys."""

import dataclasses
import inspect
import json

import pytest
from openai.resources.chat.completions import Completions as ChatCompletions
from openai.resources.completions import Completions
from openai.types.chat import ChatCompletionMessage

from mor_jax.inference.engine.request import SamplingParams
from mor_jax.inference.server import schemas
from mor_jax.inference.server.errors import APIError
from mor_jax.inference.server.fields import parse_object
from mor_jax.inference.server.limits import Limits
from mor_jax.inference.server.startup import read_keys

LIMITS = Limits(max_prompts=3, max_choices=8)
USER = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"text"',
        b"{'prompt': 'a'}",
        b'{"prompt": NaN}',
        b'{"temperature": -Infinity}',
        b'{"prompt": "\\ud800"}',
        b'{"\\udfff": 1}',
        b'{"messages": [{"content": "\\udc00"}]}',
        b'{"prompt": "\xff"}',
        b"\xff\xfe{\x00}\x00",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"seed": ' + b"9" * 5000 + b"}",
        b'{"max_tokens": 1, "prompt": "a", "max_tokens": 2}',
        b'{"messages": [{"role": "user", "role": "system"}]}',
        b'{"' + b"a" * 1000 + b'": 1, "' + b"a" * 1000 + b'": 2}',
    ],
    ids=lambda body: repr(body[:20]),
)
def test_bodies_that_are_no_json_object(body):
    with pytest.raises(APIError) as caught:
        parse_object(body)
    assert (caught.value.status, caught.value.code) == (400, "not_json")
    # What was sent is not sent back in length.
    assert len(caught.value.message) < 200


COMPLETIONS = {
    "prompt": [None, 1, [], [[]], [1.5], ["a", 1], [1, "a"], [[1], "a"], [True], {}, ["a"] * 4],
    "max_tokens": [0, -1, 1.5, "1", True, 2**31, 1e3],
    "temperature": [-1, "0", True, 1e999, [1]],
    "top_p": [0, 1.1],
    "top_k": [-2, 0.5],
    "min_p": [-0.1, 2],
    "repetition_penalty": [0],
    "presence_penalty": [3],
    "frequency_penalty": [-3],
    "seed": [0.5, "1", 2**64],
    "n": [0, 9, 1.0],
    "stop": [1, [1], [""], ["a"] * 17, "x" * 513, {}],
    "stop_token_ids": ["1", [1.5], [1] * 17],
    "logprobs": [-1, 21, True],
    "stream": [1, "true"],
    "timeout": [0, -1, "1"],
    "model": [1],
    "best_of": [2],
    "suffix": ["end"],
    "logit_bias": [{"1": 5}],
    "stream_options": [[], {"include_usage": True}],
    "tools": [[]],
    "temprature": [1],
}
CASES = [(name, value) for name, values in COMPLETIONS.items() for value in values]


@pytest.mark.parametrize(("name", "value"), CASES, ids=lambda value: str(value)[:20])
def test_completions_that_are_refused(name, value):
    with pytest.raises(APIError) as caught:
        schemas.completion({"prompt": "a", name: value}, LIMITS)
    assert caught.value.status == 400
    assert caught.value.param is not None and caught.value.param.startswith(name)
    json.dumps(caught.value.body())


CHATS = {
    "messages": [
        None,
        [],
        "hi",
        ["hi"],
        [{"role": "user"}],
        [{"role": "robot", "content": "a"}],
        [{"role": "tool", "content": "a"}],
        [{"role": "user", "content": None}],
        [USER | {"content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [USER | {"tool_calls": [{}]}],
        [USER | {"colour": 1}],
    ],
    "top_logprobs": [2, 21],
    "tools": [[{"type": "function"}]],
    "functions": [[{}]],
    "response_format": [{"type": "json_object"}],
    "max_completion_tokens": [0],
    "prompt": ["a"],
    "store": [True],
}
CASES = [(name, value) for name, values in CHATS.items() for value in values]


@pytest.mark.parametrize(("name", "value"), CASES, ids=lambda value: str(value)[:20])
def test_chats_that_are_refused(name, value):
    with pytest.raises(APIError) as caught:
        schemas.chat({"messages": [USER], name: value}, LIMITS)
    assert caught.value.status == 400
    assert caught.value.param is not None and caught.value.param.startswith(name)


def test_what_asks_for_nothing_is_accepted():
    nothing = {"tools": [], "response_format": {"type": "text"}, "logit_bias": None, "n": None}
    harmless = {"user": "me", "metadata": {"a": "b"}, "store": False, "tool_choice": "none"}
    asked = schemas.chat({"messages": [USER], "top_k": -1} | nothing | harmless, LIMITS)
    assert asked.options.sampling == SamplingParams()
    assert (asked.options.n, asked.options.max_tokens, asked.options.logprobs) == (1, None, None)


@pytest.mark.parametrize("kind", ["completions", "chat"])
def test_every_parameter_of_openais_client_is_known(kind):
    """Taken, ignored, or refused as not supported; and null counts as left out."""
    told = {"completions": Completions, "chat": ChatCompletions}[kind]
    own = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}
    names = set(inspect.signature(told.create).parameters) - own
    assert len(names) > 15
    base = {"prompt": "a"} if kind == "completions" else {"messages": [USER]}
    read = schemas.completion if kind == "completions" else schemas.chat
    for name in sorted(names):
        if name not in base:
            assert read(base | {name: None}, LIMITS) == read(base, LIMITS), name
        try:
            read(base | {name: object()}, LIMITS)
        except (APIError, TypeError) as error:
            assert "unknown setting" not in str(error), name
    assert read(base | {"whatever": None}, LIMITS) == read(base, LIMITS)


NOTHING = {
    "store": False,
    "suffix": "",
    "best_of": 1,
    "prompt_cache_retention": "24h",
    "prompt_cache_options": {},
    "echo": False,
}


def test_what_asks_for_nothing_does_so_everywhere():
    for read, base in ((schemas.completion, {"prompt": "a"}), (schemas.chat, {"messages": [USER]})):
        assert read(base | NOTHING, LIMITS) == read(base, LIMITS)
        old = read(base | {"max_tokens": 9}, LIMITS).options
        both = read(base | {"max_tokens": 9, "max_completion_tokens": 3}, LIMITS).options
        assert (old.max_tokens, old.max_tokens_field) == (9, "max_tokens")
        assert (both.max_tokens, both.max_tokens_field) == (3, "max_completion_tokens")


def test_answers_come_back_as_clients_keep_them():
    answer = ChatCompletionMessage(role="assistant", content="hi", annotations=[], reasoning=None)
    dumps = (answer.model_dump(), answer.model_dump(exclude_none=True), answer.to_dict())
    for dumped in (*dumps, dumps[0] | {"reasoning_content": "", "provider_fields": {}}):
        asked = schemas.chat({"messages": [USER, dumped, USER]}, LIMITS)
        assert asked.messages[1] == {"role": "assistant", "content": "hi"}
    with pytest.raises(APIError, match="reasoning_content='so'"):
        schemas.chat({"messages": [USER | {"reasoning_content": "so"}]}, LIMITS)


def test_all_that_can_be_asked_for():
    sampling = {"temperature": 0.5, "top_k": 4, "top_p": 0.9, "min_p": 0.1}
    sampling |= {"repetition_penalty": 1.1, "presence_penalty": 0.1, "frequency_penalty": 0.2}
    more = {"stop": ["a", "b"], "stop_token_ids": [3], "ignore_eos": True, "timeout": 2}
    body = {"prompt": [[1, 2], [3]], "n": 2, "seed": -1, "max_tokens": 7} | sampling | more
    asked = schemas.completion(body, LIMITS)
    assert asked.prompts == ((1, 2), (3,))
    # Seeds of 64 bits are folded to the engine's 32.
    assert asked.options.sampling == SamplingParams(seed=2**32 - 1, **sampling)
    assert (asked.options.stop, asked.options.stop_tokens) == (("a", "b"), (3,))
    assert (asked.options.timeout, asked.options.ignore_eos) == (2.0, True)
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    told = [{"role": "developer", "content": "c", "name": "d"}, USER | {"content": parts}]
    assert schemas.chat({"messages": told, "logprobs": True}, LIMITS).messages == (
        {"role": "system", "content": "c", "name": "d"},
        {"role": "user", "content": "ab"},
    )


@pytest.mark.parametrize("field", dataclasses.fields(Limits), ids=lambda field: field.name)
def test_limits_that_nothing_could_keep(field):
    for value in (-1, 0, float("nan"), float("inf"), 1e300, 10**30):
        if (field.name, value) != ("drain", 0):
            with pytest.raises(ValueError, match=f"^limits.{field.name}="):
                Limits(**{field.name: value}).validate()
    Limits(**{field.name: 1}).validate()


def test_keys_come_from_a_file_or_the_environment(tmp_path, monkeypatch):
    file = tmp_path / "keys"
    file.write_text("# ours\n one \n\ntwo\n")
    assert read_keys(None) == ()
    monkeypatch.setenv("MOR_API_KEY", "three")
    assert (read_keys(None), read_keys(str(file))) == ((b"three",), (b"one", b"two"))
    # Meant to be closed: never open instead, and no message repeats a key.
    monkeypatch.setenv("MOR_API_KEY", "")
    file.write_text("se cret")
    for path in (None, str(file), str(tmp_path / "absent")):
        with pytest.raises(ValueError, match=r"KEY|api_key_file") as caught:
            read_keys(path)
        assert "cret" not in str(caught.value)
