"""One process of test_heartbeat.py: joins the others, then does what its case says.

    python tests/support/hosts_worker.py CASE PORT PROCESSES PROCESS DIRECTORY

Prints one JSON object a line; ends like launch/train.py does, by os._exit with a code.
"""

import itertools
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax
import numpy as np
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from mor_jax.distributed import heartbeat, initialize
from mor_jax.distributed.heartbeat import HostLost, PeerMonitor
from mor_jax.distributed.startup_check import agree_on_start, code_version, gather
from mor_jax.runtime import exit_codes

# Nobody who lives is taken for dead, however busy the machine is. Heartbeats all the same come
# twice a second, so that word of an end spreads at once.
TIMEOUT = 600
heartbeat._BEATS = 2 * TIMEOUT
# For those who are to notice that somebody is gone.
SHORT = 3
# This machine's file system shows new files at once.
heartbeat._VISIBILITY_TIMEOUT = 2


def say(**values: object) -> None:
    print(json.dumps(values), flush=True)


def refused(call, *args) -> str:
    try:
        call(*args)
    except ValueError as error:
        return str(error)
    return ""


def disagreements(process: int, directory: Path) -> None:
    """All that is refused, one after the other: each process must end where the others do."""
    config = {"lr": 0.1, "data": {"seed": 0}}
    code = code_version()
    say(equal=refused(agree_on_start, config))
    say(config=refused(agree_on_start, config | {"data": {"seed": process}}))
    say(code=refused(agree_on_start, config, code | {"mor_jax sources": f"edited {process}"}))
    say(commit=refused(agree_on_start, config, code | {"mor_jax commit": f"{process}"}))
    say(gathered=gather({"process": process, "padding": "x" * process}))
    own = epath.Path(directory / str(process))
    say(workdir=refused(PeerMonitor(own, TIMEOUT).__enter__))


def loop(case: str, process: int, directory: Path) -> None:
    """Small collectives without end; with `fail` and `stop` the last process ends early, with
    `finish` all do, the first one last. A file `short<i>` makes process i impatient."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("d",))
    cut = NamedSharding(mesh, PartitionSpec("d"))
    ones = jax.make_array_from_process_local_data(cut, np.ones(jax.local_device_count()))
    step = jax.jit(lambda x: x.sum() + x, out_shardings=cut)
    short = directory / f"short{process}"
    with PeerMonitor(epath.Path(directory), TIMEOUT) as watch:
        say(pid=os.getpid())
        for number in range(10) if case == "finish" else itertools.count():
            watch.phase(f"step {number}")
            if watch._timeout != SHORT and short.exists():
                watch._timeout = SHORT
                say(short=True)
            if number == 20 and process == 1 and case == "fail":
                raise KeyError("no such key")
            if number == 20 and process == 1 and case == "stop":
                watch.stopped("SIGTERM")
                os._exit(exit_codes.STOPPED)
            try:
                jax.block_until_ready(step(ones))
            except Exception as error:
                lost = watch.diagnose(error)
                raise (lost or error) from error
            time.sleep(0.1)
        if case == "finish" and process == 0:
            # The others finish meanwhile, which is no loss, however long they are silent then.
            others = [directory / heartbeat.DIRECTORY / f"{i}.json" for i in range(1, 3)]
            while not all('"finished"' in file.read_text() for file in others):
                time.sleep(0.1)
            watch._timeout, first = SHORT, watch._counter
            while watch._counter < first + 2 * heartbeat._BEATS * SHORT // TIMEOUT:
                time.sleep(0.1)


def main() -> None:
    case, port, processes, process, directory = sys.argv[1:]
    try:
        wait = 3 if case == "alone" else TIMEOUT
        initialize.initialize(f"127.0.0.1:{port}", int(processes), int(process), wait)
        if case == "refused":
            disagreements(int(process), Path(directory))
        else:
            agree_on_start({})
            loop(case, int(process), Path(directory))
    except HostLost as lost:
        os._exit(lost.code)
    except Exception as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        initialize.wait_for_others()
        os._exit(exit_codes.ERROR)
    initialize.shutdown()


if __name__ == "__main__":
    main()
