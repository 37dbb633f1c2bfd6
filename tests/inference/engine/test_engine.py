"""The engine's answers: right, whatever runs beside them, and nothing is left behind."""

import dataclasses
import threading
import time

import jax
import pytest
from support.engines import check_answer, paused, requests, served
from support.tiny import TINY

from mor_jax.inference.config import plan_cache
from mor_jax.inference.engine.engine import Engine, EngineConfig
from mor_jax.inference.engine.request import Busy, Finished, Request, SamplingParams, Stopped

# One shape for most tests: what one of them compiled the others find in the cache.
SMALL = EngineConfig(slots=4, page=4, piece=8)


def run(engine, asked):
    """All answers, asked for at once."""
    handles = [engine.submit(request) for request in asked]
    return [handle.result() for handle in handles]


# Without ends of their own these run the same code as their middle variants and expert_cycle.
COVERED = ("cycle", "sequence", "token_cycle")


@pytest.mark.parametrize("name", [name for name in TINY if name not in COVERED])
def test_answers_are_those_of_the_full_causal_forward_pass(name):
    """For every router, sharing scheme and key/value mode; slots and prompts of every length."""
    model, asked = served(name), requests(7)
    with Engine(model, SMALL) as engine:
        answers = run(engine, asked)
        after = engine.statistics()
    for request, (tokens, finished) in zip(asked, answers, strict=True):
        assert finished.reason == "length"
        assert [token.index for token in tokens] == list(range(request.max_tokens))
        check_answer(model, request, tokens, 1e-5)
    assert after.finished == 7 and after.pages_used == 0 and after.running == 0
    assert after.tokens == sum(request.max_tokens for request in asked)
    # More than once where a reservation turned out too small.
    assert after.prompt_tokens >= sum(len(request.prompt) - 1 for request in asked)


@pytest.fixture(scope="module", params=["plain", "expert"])
def family(request):
    """A model with and one without routers, and answers that were given one at a time."""
    model, asked = served(request.param), requests(8, seed=3)
    with Engine(model, SMALL) as engine:
        alone = [engine.submit(one).result()[0] for one in asked]
    return model, asked, [[token.id for token in tokens] for tokens in alone]


def test_an_answer_does_not_depend_on_what_runs_beside_it(family):
    """Slots, pages and pieces of the prompt change the speed, nothing else."""
    model, asked, alone = family
    with Engine(model, EngineConfig(slots=5, page=64, piece=3)) as engine:
        together = run(engine, asked)
    assert [[token.id for token in tokens] for tokens, _ in together] == alone


def test_a_cache_that_is_too_small_makes_answers_late_not_wrong(family):
    """Sequences that go deeper than they reserved take more, or give way and are computed again."""
    model, asked, alone = family
    if model.cfg.router.kind == "none":
        # Without routers a reservation is exact: nothing can overflow.
        cfg = dataclasses.replace(SMALL, cache_bytes=plan_cache(model, SMALL).cache_bytes // 2)
    else:
        # As if hardly a token were expected beyond the first recursion.
        model = dataclasses.replace(model, shares=(1.0, 0.05, 0.05))
        cfg = dataclasses.replace(SMALL, slack=0.0)
        few = plan_cache(model, cfg).deepest_bytes(48) * 5 // 4
        cfg = dataclasses.replace(cfg, cache_bytes=few, max_length=48)
    with Engine(model, cfg) as engine:
        answers = run(engine, asked)
        after = engine.statistics()
    assert [[token.id for token in tokens] for tokens, _ in answers] == alone
    routed = model.cfg.router.kind != "none"
    assert (after.overflows > 0) == (after.preemptions > 0) == routed
    assert after.pages_used == 0


def test_whatever_fits_the_context_of_a_small_cache_is_answered_however_deep_it_goes():
    """Where hardly a token was expected to go on, and all do."""
    model = dataclasses.replace(
        served("expert"), shares=(1.0, 0.02, 0.02), thresholds=(0, -9e9, -9e9)
    )
    cfg = EngineConfig(slots=2, page=4, piece=8, slack=0.0)
    held = plan_cache(model, cfg).deepest_bytes(48) + 1
    long, other = (
        Request(prompt=(5,) * n, max_tokens=48 - n, ignore_eos=True, logprobs=0) for n in (20, 47)
    )
    with Engine(model, dataclasses.replace(cfg, cache_bytes=held)) as engine:
        assert engine.max_length == 48
        answers = run(engine, [long, other, long])
        with pytest.raises(ValueError, match="at most 48 together"):
            engine.submit(dataclasses.replace(long, max_tokens=29))
    for request, (tokens, finished) in zip((long, other, long), answers, strict=True):
        assert (finished.reason, len(tokens)) == ("length", request.max_tokens)
        check_answer(model, request, tokens, 1e-5)


class TestOneEngine:
    """Everything that needs no engine of its own."""

    @pytest.fixture(scope="class")
    def engine(self):
        with Engine(served("expert"), dataclasses.replace(SMALL, max_waiting=6)) as made:
            yield made
        assert made.statistics().pages_used == 0

    def test_cancelled_answers_end_at_once_and_free_their_slots(self, engine, monkeypatch):
        # So many steps give some tokens, not sixty.
        with paused(engine, monkeypatch, 40) as going:
            handles = [
                engine.submit(Request(prompt=(1, 2, 3), max_tokens=60, ignore_eos=True))
                for _ in range(4)
            ]
            for event in handles[0]:
                if event.index == 2 if not isinstance(event, Finished) else True:
                    break
            for handle in handles:
                handle.cancel()
            going.set()
            ends = [handle.result()[1] for handle in handles]
        assert {end.reason for end in ends} == {"cancelled"}
        assert all(end.tokens < 60 for end in ends)
        assert engine.statistics().pages_used == 0

    def test_a_deadline_cuts_an_answer_off(self, engine):
        request = Request(prompt=(1, 2), max_tokens=60, ignore_eos=True, deadline=1e-4)
        _, finished = engine.submit(request).result()
        assert finished.reason == "deadline"

    def test_the_end_of_text_and_stop_tokens_end_an_answer_and_do_not_appear(self, engine):
        greedy = SamplingParams(temperature=0.0)
        free = Request(prompt=(7, 8, 9), max_tokens=20, sampling=greedy, ignore_eos=True)
        tokens, _ = engine.submit(free).result()
        third = tokens[2].id
        first = [token.id for token in tokens].index(third)
        cut = dataclasses.replace(free, stop_tokens=(third,))
        stopped, finished = engine.submit(cut).result()
        assert finished.reason == "stop"
        assert [token.id for token in stopped] == [token.id for token in tokens[:first]]

    def test_a_seed_reproduces_and_without_one_answers_differ(self, engine):
        def answer(seed):
            request = Request(
                prompt=(1, 2, 3), max_tokens=20, sampling=SamplingParams(seed=seed), ignore_eos=True
            )
            return [token.id for token in engine.submit(request).result()[0]]

        assert answer(5) == answer(5) != answer(6)
        assert answer(None) != answer(None)

    def test_a_result_can_be_asked_for_again_but_not_after_iterating_to_the_end(self, engine):
        request = Request(prompt=(1, 2, 3), max_tokens=3, ignore_eos=True)
        handle = engine.submit(request)
        assert handle.result() == handle.result()
        assert list(handle) == []
        other = engine.submit(request)
        assert len(list(other)) == 4
        with pytest.raises(ValueError, match="iterated over"):
            other.result()

    def test_the_time_in_the_queue_is_told(self, engine, monkeypatch):
        with paused(engine, monkeypatch) as going:
            handle = engine.submit(Request(prompt=(1, 2), max_tokens=2, ignore_eos=True))
            begun = time.monotonic()
            held = time.monotonic() - begun
            going.set()
            _, finished = handle.result()
        assert held <= finished.queue_seconds <= finished.first_token_seconds <= finished.seconds

    def test_a_full_queue_refuses_and_a_sink_that_fails_hurts_nobody_else(
        self, engine, monkeypatch
    ):
        request = Request(prompt=(1, 2, 3), max_tokens=50, ignore_eos=True)

        def fails(event):
            raise RuntimeError("sink")

        handles = []
        with paused(engine, monkeypatch, 10):
            engine.submit(request, fails)
            with pytest.raises(Busy, match="6 requests are waiting"):
                for _ in range(30):
                    handles.append(engine.submit(request))
        assert {handle.result()[1].reason for handle in handles} == {"length"}
        assert engine.failure is None

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ({"prompt": ()}, "at least one token"),
            ({"prompt": (1, 256)}, r"prompt\[1\]=256: must be a whole number in 0 .. 255"),
            ({"prompt": (1, 2.0)}, r"prompt\[1\]=2.0: must be a whole number"),
            ({"max_tokens": 62}, "at most 64 together"),
            ({"max_tokens": 0}, "max_tokens=0"),
            ({"sampling": SamplingParams(top_p=0.0)}, "top_p=0.0"),
        ],
    )
    def test_what_cannot_be_answered_is_refused_when_it_is_submitted(self, engine, change, says):
        request = dataclasses.replace(Request(prompt=(1, 2, 3), max_tokens=5), **change)
        with pytest.raises(ValueError, match=says):
            engine.submit(request)

    def test_random_requests_from_many_threads_with_cancellations_leave_nothing_behind(
        self, engine
    ):
        ends = []

        def client(seed):
            for i, request in enumerate(requests(4, seed, longest=24)):
                while True:
                    try:
                        handle = engine.submit(request)
                        break
                    except Busy:
                        time.sleep(0.01)
                cancels = (seed + i) % 3 == 0
                if cancels:
                    handle.cancel()
                tokens, finished = handle.result()
                ends.append((cancels, finished.reason, len(tokens) == request.max_tokens))

        threads = [threading.Thread(target=client, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        # Every third one was cancelled, though it may have ended before that was heard.
        assert sorted(end for end in ends if not end[0]) == [(False, "length", True)] * 16
        cancelled = [end[1:] for end in ends if end[0]]
        assert len(cancelled) == 8
        assert {end if end[0] == "length" else end[0] for end in cancelled} <= {
            "cancelled",
            ("length", True),
        }
        after = engine.statistics()
        assert after.pages_used == after.running == after.waiting == 0


def test_logits_that_are_not_numbers_end_the_answer_with_an_error():
    model = served("plain")
    broken = dict(model.params, norm={"scale": model.params["norm"]["scale"] * jax.numpy.nan})
    with Engine(dataclasses.replace(model, params=broken), SMALL) as engine:
        _, finished = engine.submit(Request(prompt=(1, 2), max_tokens=5)).result()
        assert finished.reason == "error" and "logits are not finite" in finished.message
        assert engine.failure is None


def test_an_engine_that_stops_finishes_what_runs_and_takes_no_more():
    engine = Engine(served("plain"), SMALL)
    engine.start()
    request = Request(prompt=(1, 2), max_tokens=30, ignore_eos=True)
    handles = [engine.submit(request) for _ in range(5)]
    engine.stop()
    assert {handle.result()[1].reason for handle in handles} == {"length"}
    with pytest.raises(Stopped):
        engine.submit(request)


def test_an_engine_that_fails_tells_everybody(monkeypatch):
    engine = Engine(served("plain"), SMALL)
    waiting = engine._runner.scheduler.waiting
    monkeypatch.setattr(engine._runner, "step", lambda: 1 // (len(waiting) - 1))
    engine.start()
    handle = engine.submit(Request(prompt=(1, 2), max_tokens=5))
    assert handle.result()[1].reason == "error"
    engine.stop()
    assert "ZeroDivisionError" in engine.failure
    with pytest.raises(Stopped, match="ZeroDivisionError"):
        engine.submit(Request(prompt=(1, 2), max_tokens=5))


@pytest.mark.parametrize(
    ("cfg", "says"),
    [
        (EngineConfig(slots=0), "slots=0"),
        (EngineConfig(cache_bytes=100), "must hold a sequence's first pages"),
        (EngineConfig(cache_bytes=2**60), "bytes of memory are free"),
        (EngineConfig(max_length=65), "max_length=65: the model's context is"),
        (EngineConfig(max_length=1), "max_length=1: must be at least 2"),
        (EngineConfig(slack=-0.1), "slack=-0.1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(cfg, says):
    with pytest.raises(ValueError, match=says):
        Engine(served("plain"), cfg)
