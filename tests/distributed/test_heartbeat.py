"""Processes that watch each other: every way in which one can end, and what the others then say.

Real processes over loopback, without a model: those with one are in test_multiprocess.py.
"""

import contextlib
import json
import queue
import re
import signal
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
from etils import epath
from support.patience import PATIENCE
from support.patience import until as in_time
from support.processes import Process, until

from mor_jax.distributed import heartbeat, initialize
from mor_jax.distributed.heartbeat import PeerMonitor
from mor_jax.runtime import exit_codes

HERE = socket.gethostname()


@contextlib.contextmanager
def workers(case: str, tmp_path: Path, *, counts: tuple[int, ...] = (2, 2), devices: str = "1"):
    """A process for each of `counts`, told that there are so many; `devices` may name one each."""
    port = initialize.free_port()
    started = [
        Process(
            [
                "tests/support/hosts_worker.py",
                case,
                str(port),
                str(count),
                str(i),
                str(tmp_path / "run"),
            ],
            tmp_path / f"output{i}",
            JAX_NUM_CPU_DEVICES=devices.split(",")[i % len(devices.split(","))],
        )
        for i, count in enumerate(counts)
    ]
    try:
        yield started
    finally:
        for process in started:
            process.end()


def said(process: Process) -> dict:
    """What a worker said, lines merged."""
    lines = [line for line in process.output.splitlines() if line.startswith("{")]
    return {key: value for line in lines for key, value in json.loads(line).items()}


def line_with(process: Process, start: str) -> str:
    found = [line for line in process.output.splitlines() if line.startswith(start)]
    assert len(found) == 1, f"{len(found)} lines start with {start!r}:\n{process.output}"
    return found[0]


# The coordinator lives in process 0: its death reaches JAX first, that of another only us.
@pytest.mark.parametrize(("victim", "kind"), [(0, signal.SIGKILL), (1, signal.SIGSTOP)])
def test_a_process_that_dies_or_hangs_is_named_by_the_other(victim, kind, tmp_path):
    with workers("loop", tmp_path) as started:
        other, beats = started[1 - victim], tmp_path / "run" / heartbeat.DIRECTORY

        def beat(i):
            try:
                return json.loads((beats / f"{i}.json").read_text())
            except (OSError, ValueError):  # Not there yet, or just being written.
                return {"phase": "", "counter": 0}

        until(lambda: beat(victim)["phase"].startswith("step "), started)
        (tmp_path / "run" / f"short{1 - victim}").touch()
        # It reads the others' heartbeats after its own.
        seen = beat(1 - victim)["counter"] + 2
        until(lambda: "short" in said(other) and beat(1 - victim)["counter"] > seen, started)
        started[victim].send(kind)
        assert other.code() == exit_codes.HOST_LOST
        message = line_with(other, "host lost:")
        # At most two of its heartbeats, half a second each, are added at a time.
        assert re.search("sent no heartbeat for [34] s", message), message
        assert f"process {victim} of 2 (host {HERE}, pid {started[victim].pid})" in message
        assert "last in phase 'step " in message
        assert f"Process {1 - victim} was in phase 'step " in message
        assert "hosts.heartbeat_timeout=3" in message and "Run the same command again" in message


def test_an_error_of_one_process_is_told_by_the_other(tmp_path):
    with workers("fail", tmp_path) as started:
        assert [p.code() for p in started] == [exit_codes.ERROR, exit_codes.ERROR]
        message = line_with(started[0], "host failed:")
        assert f"process 1 of 2 (host {HERE}, pid {started[1].pid})" in message
        assert "in phase 'step 20': KeyError: 'no such key'" in message


def test_a_process_that_stops_at_once_stops_the_other(tmp_path):
    with workers("stop", tmp_path) as started:
        assert [p.code() for p in started] == [exit_codes.STOPPED, exit_codes.STOPPED]
        assert "process 1 of 2" in line_with(started[0], "stopped:")


def test_one_that_finishes_early_is_no_loss(tmp_path):
    with workers("finish", tmp_path, counts=(3, 3, 3)) as started:
        assert [p.code() for p in started] == [0, 0, 0]
        assert not any("host" in p.output for p in started)
    states = [json.loads((tmp_path / "run" / "hosts" / f"{i}.json").read_text()) for i in range(3)]
    assert [record["state"] for record in states] == ["finished"] * 3


def test_what_processes_must_share_is_compared(tmp_path):
    with workers("refused", tmp_path) as started:
        assert [p.code() for p in started] == [0, 0], "\n".join(p.output for p in started)
        for told in map(said, started):
            assert told["equal"] == ""
            assert "differ in their config:" in told["config"]
            assert "  data.seed: process 0: 0; process 1: 1\n" in told["config"]
            assert "lr" not in told["config"].splitlines()[1]
            assert "mor_jax sources: process 0: 'edited 0'; process 1: 'edited 1'" in told["code"]
            assert told["commit"] == "", "equal sources count, whatever git says"
            assert told["gathered"] == [
                {"process": 0, "padding": ""},
                {"process": 1, "padding": "x"},
            ]
            assert "must be one directory for all processes" in told["workdir"]
            assert "does not see the files of processes [1]" in told["workdir"]


def test_different_numbers_of_devices_are_refused(tmp_path):
    with workers("loop", tmp_path, devices="2,1") as started:
        assert [p.code() for p in started] == [exit_codes.ERROR, exit_codes.ERROR]
        for process in started:
            assert "different numbers of devices" in process.output
            assert "process 0: 2" in process.output and "process 1: 1" in process.output
    assert not (tmp_path / "run").exists()


def test_processes_told_different_counts_are_refused(tmp_path):
    with workers("loop", tmp_path, counts=(2, 3)) as started:
        assert [p.code() for p in started] == [exit_codes.ERROR, exit_codes.ERROR]
        for process in started:
            assert "--processes: process 0: 2; process 1: 3" in process.output


def test_processes_that_do_not_come_are_missed(tmp_path):
    with workers("alone", tmp_path, counts=(2,)) as started:
        assert started[0].code() == exit_codes.ERROR
        message = line_with(started[0], "error: --coordinator=")
        assert "process 0 of 2 could not join the others" in message
        assert "Start exactly 2 processes" in message


def test_port_in_use_is_named():
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        pytest.raises(ValueError, match=r"port (\d+) of .* is in use .* use port \d+") as caught,
    ):
        port = server.getsockname()[1]
        initialize.initialize(f"127.0.0.1:{port}", 2, 0)
    assert str(port) in str(caught.value)


def test_coordinator_that_does_not_answer_is_named():
    address = f"127.0.0.1:{initialize.free_port()}"
    with pytest.raises(ValueError, match=r"cannot reach it, tried for 1 s .*refused.*process 0"):
        initialize.initialize(address, 2, 1, wait=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("host:1", 2, None), "--process=None: is required by --distributed=manual"),
        ((None, None, None), "--coordinator=None: is required by --distributed=manual"),
        (("host:1", None, 0), "--processes=None: is required by --distributed=manual"),
        (("host:1", 0, 0), "--processes=0: must be positive"),
        (("host:1", 2, 2), r"--process=2: must be in 0 .. 1 with --processes=2"),
        (("host", 2, 0), "--coordinator='host': must be HOST:PORT"),
        (("host:70000", 2, 0), "--coordinator='host:70000': must be HOST:PORT"),
        ((":80", 2, 0), "--coordinator=':80': must be HOST:PORT"),
        (("host:1", 10**11, 5), "--processes=100000000000: must be at most 1048576"),
        (("host:1", 2, 0, 0), r"--distributed_wait=0: must be seconds in 1 \.\. 604800"),
        (("host:1", 2, 0, -5), r"--distributed_wait=-5: must be seconds"),
        (("host:1", 2, 0, 10**11), r"--distributed_wait=100000000000: must be seconds"),
    ],
)
def test_flags_that_do_not_fit_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        initialize.initialize(*arguments)


def test_word_of_the_end_reaches_those_who_do_not_watch(tmp_path, monkeypatch):
    """Twenty processes, of which this one, the first, watches eight; the others beat on."""
    peers = [{"host": f"node{i}", "pid": i, "id": f"id{i}"} for i in range(20)]
    monkeypatch.setattr(heartbeat.jax, "process_count", lambda: 20)
    monkeypatch.setattr(heartbeat, "gather", lambda mine: peers if isinstance(mine, dict) else [""])
    monkeypatch.setattr(
        heartbeat, "AbortHandler", lambda before: SimpleNamespace(catch=list, release=list)
    )
    codes = queue.Queue()
    # Heartbeats twenty times a second; those of the others stand still, and are not missed.
    monkeypatch.setattr(heartbeat, "_BEATS", 20 * PATIENCE)
    monkeypatch.setattr(heartbeat, "_EXIT_GRACE", 0)
    monkeypatch.setattr(heartbeat, "_exit", codes.put)
    folder = tmp_path / heartbeat.DIRECTORY
    folder.mkdir()
    for i, peer in enumerate(peers):
        (folder / f"{i}.json").write_text(json.dumps(peer | {"state": "running"}))
    end = {"run": "another run", "text": "of an earlier run", "code": 1}
    (folder / "end.json").write_text(json.dumps(end))
    with PeerMonitor(epath.Path(tmp_path), int(PATIENCE)) as watch:
        in_time(lambda: watch._counter > 5)
        assert codes.empty()
        end = {"run": "id0", "text": "host lost: process 15", "code": exit_codes.HOST_LOST}
        (folder / "end.json").write_text(json.dumps(end))
        assert codes.get(timeout=PATIENCE) == exit_codes.HOST_LOST
        assert str(watch.diagnose(RuntimeError("of its own"))) == "host lost: process 15"


@pytest.mark.parametrize(("beats", "known"), [(0, True), (1, False)], ids=["stands", "beats"])
def test_evidence_is_awaited_in_heartbeats(tmp_path, monkeypatch, beats, known):
    """As silence is counted: a watch that gets no turn finds nobody lost."""
    watch, waits = PeerMonitor(epath.Path(tmp_path), int(PATIENCE)), []

    def wait(_):
        waits.append(watch._counter)
        watch._counter += beats
        return len(waits) == 50

    monkeypatch.setattr(watch._lost_event, "wait", wait)
    watch._await_evidence()
    assert (len(waits) == 50) == known
    assert known or len(waits) == heartbeat._BEATS + 3


def test_a_single_process_costs_nothing(tmp_path):
    with PeerMonitor(epath.Path(tmp_path), 30) as watch:
        watch.phase("step 1")
        assert watch.diagnose(RuntimeError("of its own")) is None
    assert not list(tmp_path.iterdir())
