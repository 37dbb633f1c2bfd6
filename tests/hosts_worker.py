"""One process of tests/test_hosts.py: joins the others, then does what its case says.

    python tests/hosts_worker.py CASE PORT PROCESSES PROCESS DIRECTORY

Prints one JSON object a line; ends like launch/train.py does, by os._exit with a code.
"""

import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import numpy as np
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from mor_jax import distributed, exit_codes, hosts
from mor_jax.hosts import HostLost, Hosts
from mor_jax.together import agree_on_start, code_version, gather

TIMEOUT = 3
# This machine's file system shows new files at once.
hosts._SIGHT = 2


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
    say(workdir=refused(Hosts(own, TIMEOUT).__enter__))


def loop(case: str, process: int, directory: Path) -> None:
    """100 small collectives; with `die`, `hang`, `fail`, `stop` the last process ends early."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("d",))
    cut = NamedSharding(mesh, PartitionSpec("d"))
    ones = jax.make_array_from_process_local_data(cut, np.ones(jax.local_device_count()))
    step = jax.jit(lambda x: x.sum() + x, out_shardings=cut)
    with Hosts(epath.Path(directory), TIMEOUT) as watch:
        say(pid=os.getpid())
        for number in range(100 if case != "finish" else 10):
            watch.phase(f"step {number}")
            if number == 20 and process == 1 and case == "fail":
                raise KeyError("no such key")
            if number == 20 and process == 1 and case == "stop":
                watch.stopped("SIGTERM")
                os._exit(exit_codes.STOPPED)
            try:
                jax.block_until_ready(step(ones))
            except Exception as error:
                lost = watch.verdict(error)
                raise (lost or error) from error
            time.sleep(0.1)
        if case == "finish" and process == 0:
            # The others have finished meanwhile, which is no loss.
            time.sleep(1.5 * TIMEOUT)


def main() -> None:
    case, port, processes, process, directory = sys.argv[1:]
    try:
        wait = 3 if case == "alone" else 30
        distributed.initialize(f"127.0.0.1:{port}", int(processes), int(process), wait)
        if case == "refused":
            disagreements(int(process), Path(directory))
        else:
            agree_on_start({})
            loop(case, int(process), Path(directory))
    except HostLost as lost:
        os._exit(lost.code)
    except Exception as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        distributed.linger()
        os._exit(exit_codes.ERROR)
    distributed.shutdown()


if __name__ == "__main__":
    main()
