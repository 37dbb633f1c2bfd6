"""One request as the host knows it: what it tells its sink, when it ends, how it starts again."""

import types

import pytest

from mor_jax.data.tokenizers.bytes import ByteTokenizer
from mor_jax.inference.detokenizer import TextStream
from mor_jax.inference.engine import sequence as module
from mor_jax.inference.engine.request import Finished, Request, Token
from mor_jax.inference.engine.sequence import Sequence

PROMPT = tuple(b"abc")


@pytest.fixture
def events():
    return []


def sequence(events, sink=None, arrival_time=0.0, **changes):
    request = Request(prompt=PROMPT, **({"max_tokens": 4} | changes))
    text = TextStream(ByteTokenizer(), request.stop, request.prompt)
    return Sequence(request, sink or events.append, seed=0, text=text, arrival_time=arrival_time)


def clock(monkeypatch, now):
    monkeypatch.setattr(module, "time", types.SimpleNamespace(monotonic=lambda: now))


def test_tokens_are_told_in_order_until_the_length_is_reached(events):
    made = sequence(events, max_tokens=3)
    assert made.tokens == list(PROMPT) and made.max_length == 6
    ends = [made.append_token(token, {"logprob": -1.5, "depth": 2}) for token in b"xyz"]
    assert ends == [None, None, "length"]
    assert events == [
        Token(index=i, id=ord(c), text=c, offset=i, logprob=-1.5, depth=2)
        for i, c in enumerate("xyz")
    ]
    assert made.output_tokens == list(b"xyz") and made.tokens == list(b"abcxyz")


def test_a_stop_token_ends_the_answer_and_is_no_part_of_it(events):
    made = sequence(events, stop_tokens=(ord("!"),))
    assert made.append_token(ord("x"), {}) is None
    assert made.append_token(ord("!"), {}) == "stop"
    assert made.output_tokens == [ord("x")] and [event.id for event in events] == [ord("x")]


def test_an_answer_that_only_holds_a_stop_token_has_no_first_token(events):
    made = sequence(events, stop_tokens=(ord("!"),))
    assert made.append_token(ord("!"), {}) == "stop"
    made.finish("stop")
    (finished,) = events
    assert finished.tokens == 0 and finished.first_token_seconds is None


def test_a_stop_text_ends_the_answer_and_is_held_back(events):
    made = sequence(events, stop=("yz",), max_tokens=9)
    assert [made.append_token(token, {}) for token in b"xyz"] == [None, None, "stop"]
    made.finish("stop")
    assert "".join(event.text for event in events) == "x"
    # Its tokens count all the same: the model has computed them.
    assert events[-1].tokens == 3


def test_text_that_was_held_back_comes_with_the_end(events):
    made = sequence(events, stop=("yz",), max_tokens=2)
    assert [made.append_token(token, {}) for token in b"xy"] == [None, "length"]
    made.finish("length")
    assert [event.text for event in events] == ["x", "", "y"]


def test_the_end_tells_counts_and_times_from_submission(events, monkeypatch):
    made = sequence(events, arrival_time=100.0)
    made.first_scheduled_time = 101.5
    clock(monkeypatch, 103.0)
    made.append_token(ord("x"), {})
    clock(monkeypatch, 104.0)
    made.append_token(ord("y"), {})
    clock(monkeypatch, 110.0)
    assert not made.finished
    made.finish("error", "broken")
    assert made.finished
    assert events[-1] == Finished(
        reason="error",
        prompt_tokens=3,
        tokens=2,
        message="broken",
        first_token_seconds=3.0,
        seconds=10.0,
        queue_seconds=1.5,
    )


def test_one_that_never_ran_spent_all_its_time_in_the_queue(events, monkeypatch):
    made = sequence(events, arrival_time=100.0)
    clock(monkeypatch, 107.0)
    made.finish("cancelled")
    assert events[0].queue_seconds == events[0].seconds == 7.0


@pytest.mark.parametrize(("deadline", "late"), [(None, False), (5.0, False), (4.5, True)])
def test_a_deadline_counts_from_submission(events, monkeypatch, deadline, late):
    made = sequence(events, arrival_time=100.0, deadline=deadline)
    clock(monkeypatch, 105.0)
    assert made.past_deadline is late


def test_a_fresh_start_stores_everything_again_and_keeps_the_answer(events):
    made = sequence(events)
    made.append_token(ord("x"), {})
    made.slot, made.blocks, made.counts, made.prefilled, made.decoding = (
        1,
        object(),
        object(),
        4,
        True,
    )
    made.min_capacity_tokens[2] = 9
    made.restart()
    assert (made.slot, made.blocks, made.counts, made.prefilled, made.decoding) == (
        None,
        None,
        None,
        0,
        False,
    )
    # What the device still answers to the earlier start is told apart by this number.
    assert made.epoch == 1
    assert made.tokens == list(b"abcx") and made.min_capacity_tokens == {2: 9}
    assert made.append_token(ord("y"), {}) is None and events[-1].index == 1


def test_going_back_keeps_the_slot(events):
    made = sequence(events)
    made.slot, made.blocks, made.prefilled, made.decoding = 1, object(), 3, True
    held = made.blocks
    made.rewind(2)
    assert (made.slot, made.blocks, made.prefilled, made.decoding, made.epoch) == (
        1,
        held,
        2,
        False,
        1,
    )


def test_a_sink_that_fails_cancels_its_own_request_alone(events, caplog):
    def fails(event):
        raise RuntimeError("no room")

    broken, other = sequence(events, fails), sequence(events)
    assert broken.append_token(ord("x"), {}) is None
    assert broken.cancelled and broken.output_tokens == [ord("x")]
    assert "no room" in caplog.text
    other.append_token(ord("x"), {})
    assert not other.cancelled and len(events) == 1
