"""Initialises and shuts down `jax.distributed` for the processes of a run.

Common mistakes (a port in use, an unreachable coordinator, inconsistent counts) raise a
`ValueError` with the cause and a fix.
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
"""Seconds without a heartbeat after which JAX aborts every process. `PeerMonitor` is faster."""

WAIT = 300
"""Seconds that the processes of a run wait for each other at the start."""

_MAX_WAIT = 7 * 86400
_MAX_PROCESSES = 2**20
_SHUTDOWN = 120
_LINGER = 3

_requested: int | None = None


def initialize(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    wait: int = WAIT,
    *,
    manual: bool = True,
) -> None:
    """Connects this process to the others of its run. Call it before anything that uses a device.

    coordinator: HOST:PORT of process 0, reachable by all. processes: their number. process: the
    index of this one, from 0. manual: these three are given; False: they are detected from Slurm,
    Open MPI, Kubernetes or a TPU pod. wait: seconds to wait for the other processes.

    Raises:
        ValueError: the three are inconsistent, the port is in use, the coordinator is unreachable,
            or the other processes did not connect or have other counts.
    """
    # Otherwise JAX installs its own SIGTERM handler; ours decides when to stop.
    jax.config.update("jax_enable_preemption_service", False)
    rule = f"must be seconds in 1 .. {_MAX_WAIT}"
    check(0 < wait <= _MAX_WAIT, "--distributed_wait", wait, rule, f"Try {WAIT}")
    if not manual:
        _join("auto", wait)
        return
    global _requested
    address, port, number = _checked(coordinator, processes, process)
    _requested = processes
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
        # One process owns all devices that it sees, even in a scheduler's job.
        cluster_detection_method="deactivate",
        # A run on one machine listens on the loopback interface only.
        coordinator_bind_address=coordinator if _is_loopback(address) else None,
    )


def shutdown() -> None:
    """Disconnects from the run, after all processes call it. Does nothing if not initialised."""
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()


def wait_for_others() -> None:
    """Delays the exit of process 0 after an error, so that the others can print their messages.

    Process 0 hosts JAX's coordinator: when it exits, JAX aborts the others. Does nothing if not
    initialised.
    """
    if jax.distributed.is_initialized() and jax.process_index() == 0:
        time.sleep(_LINGER)


def requested_processes() -> int | None:
    """The `processes` argument of `initialize`; None if it was detected."""
    return _requested


def free_port(address: str = "127.0.0.1") -> int:
    """An unused TCP port of this machine."""
    with socket.create_server((address, 0)) as server:
        return server.getsockname()[1]


def _join(mode: str, wait: int, **arguments: object) -> None:
    def give_up() -> None:
        reason = f"not all connected within {wait} s"
        print(f"error: {_join_error(mode, arguments, reason)}", file=sys.stderr)
        sys.stderr.flush()
        os._exit(exit_codes.ERROR)

    # JAX raises some connection errors and aborts the process for others.
    aborts = AbortHandler(give_up)
    aborts.catch()
    try:
        jax.distributed.initialize(
            **arguments,  # pyright: ignore[reportArgumentType]
            initialization_timeout=wait,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=_SHUTDOWN,
        )
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
        raise ValueError(_join_error(mode, arguments, reason)) from error
    finally:
        aborts.release()


def _join_error(mode: str, arguments: dict[str, object], reason: str) -> str:
    if mode == "auto":
        return (
            f"--distributed=auto: the processes of the run could not connect ({reason}). It "
            "works in a Slurm step, under Open MPI, in a Kubernetes Job or JobSet and on TPU VMs. "
            "Elsewhere use --distributed=manual with --coordinator, --processes and --process"
        )
    address, count, index = list(arguments.values())[:3]
    return (
        f"--coordinator={address}: process {index} of {count} could not join the others "
        f"({reason}). Start exactly {count} processes, each with --processes={count}, a different "
        "--process from 0 on, and the same --coordinator; look for the first error in the output "
        "of the others"
    )


def _checked(
    coordinator: str | None, processes: int | None, process: int | None
) -> tuple[str, int, int]:
    """Host, port and process index. Raises `ValueError` if the three are inconsistent."""
    for flag, value in (
        ("--coordinator", coordinator),
        ("--processes", processes),
        ("--process", process),
    ):
        rule = "is required by --distributed=manual"
        fix = "Give --coordinator=HOST:PORT, --processes=N and --process=I, or --distributed=auto"
        check(value is not None, flag, value, rule, fix)
    assert coordinator is not None and processes is not None and process is not None
    check(processes > 0, "--processes", processes, "must be positive", "Try 1")
    check(
        processes <= _MAX_PROCESSES,
        "--processes",
        processes,
        f"must be at most {_MAX_PROCESSES}",
        "Try 2",
    )
    rule = f"must be in 0 .. {processes - 1} with --processes={processes}"
    check(0 <= process < processes, "--process", process, rule, "Count processes from 0")
    address, colon, port = coordinator.rpartition(":")
    ok = bool(address and colon) and port.isdigit() and 0 < int(port) < 65536
    rule = "must be HOST:PORT, a name or address of process 0's machine and a port from 1 to 65535"
    check(ok, "--coordinator", coordinator, rule, "Try 10.0.0.1:8476")
    return address.strip("[]"), int(port), process


def _check_port(address: str, port: int) -> None:
    # gRPC would share a port that is in use, and each program would get half of the messages, so
    # the port is checked first.
    try:
        with contextlib.closing(socket.create_server(("", port))):
            return
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        reason = "in use by another program" if error.errno == errno.EADDRINUSE else "not permitted"
    rule = f"port {port} of {socket.gethostname()} is {reason}"
    fix = f"Stop the other run, if there is one, or use port {free_port()} in every process"
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
    fix = "Start process 0 there with the same address; check its output and firewalls"
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
