"""Metrics: one step late, resumable files, valid JSON, TensorBoard and Weights & Biases."""

import json
import sys
import types

import jax
import jax.numpy as jnp
import pytest

from mor_jax.config import LogConfig
from mor_jax.observability import metrics
from mor_jax.observability.metrics import Metrics, Record

CFG = LogConfig(interval=1)


def lines(path):
    return [json.loads(line) for line in (path / metrics.FILE).read_text().splitlines()]


def steps(path):
    return [line["step"] for line in lines(path)]


def train(path, first, last, cfg=CFG, start=None):
    with Metrics(path, cfg, start_step=first - 1 if start is None else start) as writer:
        for step in range(first, last + 1):
            writer.push(step, {"loss": jnp.float32(10.0 / step)})


def test_records_come_one_step_late(tmp_path):
    with Metrics(tmp_path, CFG) as writer:
        assert writer.push(1, {"loss": jnp.float32(2.5)}, {"lr": 0.125}) is None
        assert steps(tmp_path) == []
        late = writer.push(2, {"loss": jnp.float32(1.5), "depth": jnp.array([0.25, 0.75])})
        assert late == Record(1, {"loss": 2.5, "lr": 0.125})
        assert writer.flush() == Record(2, {"loss": 1.5, "depth": [0.25, 0.75]})
        assert writer.flush() is None
    first, second = lines(tmp_path)
    assert (first["step"], first["loss"], first["lr"]) == (1, 2.5, 0.125)
    assert second["depth"] == [0.25, 0.75] and second["time"] >= first["time"] > 1.6e9


def test_closing_keeps_the_last_record_even_after_an_error(tmp_path):
    with pytest.raises(KeyboardInterrupt), Metrics(tmp_path, CFG) as writer:
        writer.push(1, {"loss": jnp.float32(2.5)})
        raise KeyboardInterrupt
    assert steps(tmp_path) == [1]


def test_the_device_is_not_waited_for(tmp_path, monkeypatch):
    fetched = []
    monkeypatch.setattr(
        metrics.jax, "device_get", lambda tree: fetched.append(sorted(tree)) or tree
    )
    with Metrics(tmp_path, CFG) as writer:
        writer.push(1, {"a": 1.0})
        assert fetched == []
        writer.push(2, {"b": 1.0})
        assert fetched == [["a"]]


def test_keeps_the_first_and_every_nth_step_but_returns_all(tmp_path):
    with Metrics(tmp_path, LogConfig(interval=4)) as writer:
        late = [writer.push(step, {"loss": jnp.float32(step)}) for step in range(1, 10)]
    assert steps(tmp_path) == [1, 4, 8]
    assert [record.step for record in late[1:]] == list(range(1, 9))


def test_resuming_drops_what_will_be_run_again(tmp_path):
    train(tmp_path, 1, 7)
    train(tmp_path, 5, 9, start=4)
    assert steps(tmp_path) == list(range(1, 10))
    train(tmp_path, 1, 2)
    assert steps(tmp_path) == [1, 2]


def test_a_line_cut_by_a_kill_is_dropped(tmp_path):
    train(tmp_path, 1, 3)
    file = tmp_path / metrics.FILE
    file.write_text(file.read_text()[:-10])
    assert [record["step"] for record in metrics.read(file)] == [1, 2]
    train(tmp_path, 3, 4, start=2)
    assert steps(tmp_path) == [1, 2, 3, 4]


def test_a_line_damaged_in_the_middle_is_named(tmp_path):
    file = tmp_path / metrics.FILE
    file.write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: is not JSON"):
        metrics.read(file)


def test_what_json_has_no_number_for_survives(tmp_path):
    values = {"a": float("nan"), "b": [float("inf"), float("-inf"), 1.5], "c": 1e300, "d": 7.0}
    with Metrics(tmp_path, CFG) as writer:
        writer.write(1, values)
    strict = json.loads(
        (tmp_path / metrics.FILE).read_text(), parse_constant=lambda name: pytest.fail(name)
    )
    assert strict["a"] == "NaN" and strict["b"] == ["Infinity", "-Infinity", 1.5]
    assert strict["c"] == 1e300 and strict["d"] == 7
    (back,) = metrics.read(tmp_path / metrics.FILE)
    assert back["a"] != back["a"] and back["b"] == values["b"]


def test_other_processes_write_nothing_but_still_learn_the_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with Metrics(tmp_path, CFG) as writer:
        writer.push(1, {"loss": jnp.float32(2.0)})
        assert writer.flush() == Record(1, {"loss": 2.0})
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_events_can_be_read_back(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    cfg = LogConfig(interval=1, tensorboard=True)
    train(tmp_path, 1, 4, cfg)
    with Metrics(tmp_path, cfg, start_step=2) as writer:
        writer.push(3, {"loss": jnp.float32(5.0), "depth": jnp.array([0.25, 0.75])})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    # Steps 3 and 4 of the first start are purged by the second, which ran only step 3 again.
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 10.0), (2, 5.0), (3, 5.0)]
    assert [e.value for e in events.Scalars("depth/2")] == [0.75]


class FakeRun:
    def __init__(self, **arguments):
        self.arguments, self.logged, self.finished = arguments, [], False

    def define_metric(self, name, step_metric):
        self.axis = (name, step_metric)

    def log(self, values):
        self.logged.append(values)

    def finish(self):
        self.finished = True


def test_wandb_continues_the_run_of_the_workdir(tmp_path, monkeypatch):
    runs = []

    def init(**arguments):
        runs.append(FakeRun(**arguments))
        return runs[-1]

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    cfg = LogConfig(interval=1, wandb_project="mor")
    for _ in range(2):
        with Metrics(tmp_path, cfg, config={"seed": 1}) as writer:
            writer.write(1, {"loss": 2.0, "depth": [0.25, 0.75]})
    first, second = runs
    assert first.arguments["id"] == second.arguments["id"] and len(first.arguments["id"]) == 12
    assert second.arguments["resume"] == "allow" and second.arguments["project"] == "mor"
    assert second.arguments["config"] == {"seed": 1} and second.axis == ("*", "step")
    assert second.logged == [{"step": 1, "loss": 2.0, "depth/1": 0.25, "depth/2": 0.75}]
    assert first.finished and second.finished


@pytest.mark.parametrize(
    ("cfg", "package"),
    [(LogConfig(tensorboard=True), "tensorboard"), (LogConfig(wandb_project="mor"), "wandb")],
)
def test_a_missing_tracker_says_what_to_install(tmp_path, monkeypatch, cfg, package):
    for name in ("tensorboard.compat.proto", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=rf"log\.{package}.*pip install {package}"):
        Metrics(tmp_path, cfg)
    assert not (tmp_path / metrics.FILE).exists()
