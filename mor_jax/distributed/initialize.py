"""Joins the processes of a run into one JAX program, and takes them apart again.

`jax.distributed` only. What a person can get wrong (a port in use, a coordinator that does not
answer, counts that disagree) is a `ValueError` that names it and says what to do.
"""

import contextlib
import errno
import os
import socket
import sys
import time

import jax

from mor_jax.config.parsing import check, fail
from mor_jax.distributed.abort_handler import AbortHandler
from mor_jax.runtime import exit_codes

HEARTBEAT = 50
"""Seconds of silence after which JAX itself ends every process: `Hosts` is quicker and says who."""

WAIT = 300
"""Seconds for which the processes of a run wait for each other at the start."""

_LONGEST = 7 * 86400
_MOST = 2**20
_SHUTDOWN = 120
_LINGER = 3

_asked: int | None = None


def initialize(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    wait: int = WAIT,
    *,
    manual: bool = True,
) -> None:
    """Joins this process to the others of its run. Call it before anything that uses a device.

    coordinator: HOST:PORT of process 0, which all reach. processes: how many there are. process:
    which one this is, from 0. manual: the three are given; False: they are found out from Slurm,
    Open MPI, Kubernetes or a TPU pod. wait: seconds for the others to come.

    Raises:
        ValueError: the three do not fit together, the port is in use, the coordinator cannot be
            reached, the others did not come or disagree about the counts.
    """
    # JAX would install a handler of SIGTERM of its own, and ours decides when to stop.
    jax.config.update("jax_enable_preemption_service", False)
    rule = f"must be seconds in 1 .. {_LONGEST}"
    check(0 < wait <= _LONGEST, "--distributed_wait", wait, rule, f"Try {WAIT}")
    if not manual:
        _join("auto", wait)
        return
    global _asked
    address, port, number = _checked(coordinator, processes, process)
    _asked = processes
    if number == 0:
        _check_port(address, port)
    else:
        _await_coordinator(address, port, wait)
    _join(
        "manual",
        wait,
        coordinator_address=coordinator,
        num_processes=processes,
        process_id=process,
        # One process owns all devices that it sees, also inside a scheduler's job.
        cluster_detection_method="deactivate",
        # A run on one machine listens on its loopback alone.
        coordinator_bind_address=coordinator if _is_loopback(address) else None,
    )


def shutdown() -> None:
    """Leaves the run; waits for the others to do the same. Nothing if it was not joined."""
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()


def wait_for_others() -> None:
    """Lets the others speak before a process with an error ends; nothing if it was not joined.

    Process 0 hosts JAX's coordinator: its end aborts the others, in the middle of saying the same.
    """
    if jax.distributed.is_initialized() and jax.process_index() == 0:
        time.sleep(_LINGER)


def requested_processes() -> int | None:
    """The number of processes that this one was told of; None if it was found out."""
    return _asked


def free_port(address: str = "127.0.0.1") -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.create_server((address, 0)) as server:
        return server.getsockname()[1]


def _join(mode: str, wait: int, **where: object) -> None:
    def give_up() -> None:
        print(f"error: {_told(mode, where, f'not all came within {wait} s')}", file=sys.stderr)
        sys.stderr.flush()
        os._exit(exit_codes.ERROR)

    # JAX raises some errors of joining and aborts the process for others.
    aborts = AbortHandler(give_up)
    aborts.catch()
    try:
        jax.distributed.initialize(
            **where,  # pyright: ignore[reportArgumentType]
            initialization_timeout=wait,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=_SHUTDOWN,
        )
    except Exception as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
        raise ValueError(_told(mode, where, why)) from error
    finally:
        aborts.release()


def _told(mode: str, where: dict[str, object], why: str) -> str:
    if mode == "auto":
        return (
            f"--distributed=auto: the processes of the run did not find each other ({why}). It "
            "works in a Slurm step, under Open MPI, in a Kubernetes Job or JobSet and on TPU VMs. "
            "Elsewhere use --distributed=manual with --coordinator, --processes and --process"
        )
    address, count, number = list(where.values())[:3]
    return (
        f"--coordinator={address}: process {number} of {count} could not join the others ({why}). "
        f"Start exactly {count} processes, each with --processes={count}, a number of its own from "
        "0 on in --process, and the same --coordinator; look for the first error in the output of "
        "the others"
    )


def _checked(
    coordinator: str | None, processes: int | None, process: int | None
) -> tuple[str, int, int]:
    """Host, port and process number. Raises `ValueError` unless the three fit together."""
    for flag, value in (
        ("--coordinator", coordinator),
        ("--processes", processes),
        ("--process", process),
    ):
        rule = "--distributed=manual needs it"
        fix = "Give --coordinator=HOST:PORT, --processes=N and --process=I, or --distributed=auto"
        check(value is not None, flag, value, rule, fix)
    assert coordinator is not None and processes is not None and process is not None
    check(processes > 0, "--processes", processes, "must be positive", "Try 1")
    check(processes <= _MOST, "--processes", processes, f"must be at most {_MOST}", "Try 2")
    rule = f"must be in 0 .. {processes - 1}, as --processes={processes}"
    check(0 <= process < processes, "--process", process, rule, "Count processes from 0")
    address, colon, port = coordinator.rpartition(":")
    ok = bool(address and colon) and port.isdigit() and 0 < int(port) < 65536
    rule = "must be HOST:PORT, a name or address of process 0's machine and a port from 1 to 65535"
    check(ok, "--coordinator", coordinator, rule, "Try 10.0.0.1:8476")
    return address.strip("[]"), int(port), process


def _check_port(address: str, port: int) -> None:
    # The library that listens shares a port with whoever has it, and both would get half of the
    # others' messages; so a port in use has to be found before.
    try:
        with contextlib.closing(socket.create_server(("", port))):
            return
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        why = "in use by another program" if error.errno == errno.EADDRINUSE else "not permitted"
    rule = f"port {port} of {socket.gethostname()} is {why}"
    fix = f"Another run may be alive there; end it, or try port {free_port()} in every process"
    fail("--coordinator", f"{address}:{port}", rule, fix)


def _await_coordinator(address: str, port: int, wait: int) -> None:
    began, problem = time.monotonic(), ""
    while time.monotonic() - began < wait:
        try:
            with contextlib.closing(socket.create_connection((address, port), timeout=5)):
                return
        except OSError as error:
            problem = f"{type(error).__name__}: {error.strerror or error}"
        time.sleep(0.2)
    rule = f"{socket.gethostname()} cannot reach it, tried for {wait} s ({problem})"
    fix = "Start process 0 there, with the same address; look at its output, and at firewalls"
    fail("--coordinator", f"{address}:{port}", rule, fix)


def _is_loopback(address: str) -> bool:
    return address == "localhost" or address == "::1" or address.startswith("127.")


__all__ = [
    "HEARTBEAT",
    "WAIT",
    "free_port",
    "initialize",
    "requested_processes",
    "shutdown",
    "wait_for_others",
]
