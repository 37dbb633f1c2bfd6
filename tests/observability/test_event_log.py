"""The event log and what is added up from it."""

import json
import time

import pytest

from mor_jax.observability import event_log
from mor_jax.observability.event_log import Events, read
from mor_jax.observability.goodput import KINDS, goodput


def test_steps_are_logged_in_spans_between_other_events(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(event_log.time, "monotonic", lambda: clock[0])

    def sleep(seconds):
        clock[0] += seconds

    with Events(tmp_path, began=90.0) as log:
        log.write("start", host="a")
        log.restart_clock()
        for step, waited in ((1, 0.5), (2, 0.25)):
            sleep(2.0)
            log.step(step, waited)
        with log.timed("eval", step=2):
            sleep(3.0)
        sleep(1.0)
        log.step(3, 0.0)
    kept = [
        {k: v for k, v in e.items() if k not in ("time", "start")}
        for e in read(tmp_path / "events.jsonl")
    ]
    assert kept == [
        {"event": "start", "clock": 10.0, "host": "a"},
        {"event": "steps", "clock": 14.0, "first": 1, "last": 2, "seconds": 3.25, "input": 0.75},
        {"event": "eval", "clock": 17.0, "step": 2, "seconds": 3.0},
        {"event": "steps", "clock": 18.0, "first": 3, "last": 3, "seconds": 1.0, "input": 0.0},
    ]


def test_a_long_wait_for_a_batch_is_a_stall_and_long_spans_are_cut(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(event_log.time, "monotonic", lambda: clock[0])
    with Events(tmp_path, began=0.0) as log:
        for step in (1, 2, 3):
            clock[0] += 6.0
            log.step(step, waited=4.0 if step == 2 else 0.1)
    found = read(tmp_path / "events.jsonl")
    assert [(e["event"], e.get("step", e.get("last"))) for e in found] == [
        ("stall", 2),
        ("steps", 2),
        ("steps", 3),
    ]
    assert found[0]["seconds"] == 4.0


def test_starts_are_counted_and_lines_cut_by_a_kill_are_left_out(tmp_path):
    for _ in range(2):
        with Events(tmp_path, time.monotonic()) as log:
            log.write("start")
        with (tmp_path / "events.jsonl").open("a") as file:
            file.write('{"event": "sta')
    found = read(tmp_path / "events.jsonl")
    assert [event["start"] for event in found] == [1, 2]


def test_a_jumping_wall_clock_changes_no_duration(tmp_path, monkeypatch):
    wall = iter([2e9, 1e9, 3e9, 0.0])
    monkeypatch.setattr(event_log.time, "time", lambda: next(wall))
    with Events(tmp_path, time.monotonic()) as log:
        log.write("start")
        with log.timed("eval", step=1):
            pass
        log.write("end", step=1)
    found = read(tmp_path / "events.jsonl")
    assert found[0]["time"] > found[1]["time"]
    # Nothing of the jumps, by a billion.
    assert 0 <= found[1]["seconds"] < 1e8
    assert 0 <= found[0]["clock"] <= found[2]["clock"] < 1e8


def line(start, clock, event, **values):
    return {"start": start, "clock": clock, "event": event, "time": "-"} | values


HISTORY = [
    line(1, 0, "start"),
    line(1, 10, "assemble", seconds=10.0),
    line(1, 12, "fresh", step=0, seconds=2.0),
    line(1, 20, "compile", step=1, seconds=8.0),
    line(1, 30, "steps", first=1, last=10, seconds=9.0, input=1.0),
    line(1, 31, "save", step=10, seconds=1.0),
    line(1, 41, "steps", first=11, last=20, seconds=10.0, input=0.0),
    # Killed after step 20; the next start goes on from step 10.
    line(2, 0, "start"),
    line(2, 5, "assemble", seconds=5.0),
    line(2, 6, "restore", step=10, seconds=1.0),
    line(2, 9, "compile", step=11, seconds=3.0),
    line(2, 19, "steps", first=11, last=20, seconds=10.0, input=0.0),
    line(2, 23, "eval", step=20, seconds=4.0),
    line(2, 25, "finish", seconds=1.0),
]


def test_every_second_is_counted_once():
    found = goodput(HISTORY)
    assert found.seconds == {
        "training steps": 19.0,
        "input": 1.0,
        "evaluation": 4.0,
        "checkpoints": 1.0,
        "compile": 8.0,
        "startup": 12.0,
        "restarts": 10.0 + 9.0,
        "finish": 1.0,
        "other": 1.0,
    }
    assert tuple(found.seconds) == KINDS
    assert (found.total, found.starts, found.again) == (66.0, 2, 10)
    assert found.line().startswith("goodput 28.8% of 1m06s in training steps; input 1.5%, ")
    assert found.line().endswith("(2 starts, 10 steps done again)")


def test_steps_undone_by_a_rollback_or_twice_are_counted_as_often():
    steps = [line(1, 10, "steps", first=1, last=10, seconds=10.0, input=0.0)]
    back = line(1, 10, "rollback", from_step=10, step=4)
    found = goodput([*steps, back])
    assert (found.again, found.seconds["restarts"], found.seconds["training steps"]) == (
        6,
        6.0,
        4.0,
    )
    twice = goodput([*steps, back, line(1, 10, "rollback", from_step=10, step=2)])
    assert (twice.again, twice.seconds["restarts"]) == (8, 8.0)


def test_an_empty_log_has_a_line_too():
    assert goodput([]).line().startswith("goodput 0.0% of 0s")


def test_each_line_is_json_with_the_wall_clock_for_people(tmp_path):
    with Events(tmp_path, time.monotonic()) as log:
        log.write("start", devices=8)
    (text,) = (tmp_path / "events.jsonl").read_text().splitlines()
    event = json.loads(text)
    assert event["devices"] == 8
    assert pytest.approx(0, abs=1) == event["clock"]
    assert event["time"].endswith("+00:00")
