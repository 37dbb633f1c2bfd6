"""Trains a model, or resumes a run.

    mor train --config=mor:size=debug --workdir=runs/mor
    mor train --config=mor:size=360m,recursions=2 --config.optim.lr=1e-3 --workdir=runs/mor-360m

docs/commands.md lists the exit codes.
"""

import os
import sys
from typing import NoReturn

from mor_jax.runtime.preemption import Diverged, ImmediateExit, Signals, Stopped, StoppedEarly

_SIGNALS = Signals()
if __name__ == "__main__":
    # First, because the imports below take seconds.
    _SIGNALS.__enter__()

from absl import app, flags, logging
from ml_collections import config_flags

from mor_jax.cli import config_flag, option_names
from mor_jax.runtime import exit_codes, platform

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Name of a shipped configuration or a file, with choices: mor:size=360m."
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Run directory; an existing run is resumed.", required=True
)
_ALLOW = flags.DEFINE_list(
    "allow_changes",
    [],
    "Settings that may differ from the last start of the run, such as optim.lr.",
)
_BRANCH = flags.DEFINE_string(
    "branch", None, "RUN@STEP: start a new run from a step of another one."
)
_DISTRIBUTED = flags.DEFINE_enum(
    "distributed",
    "off",
    ["off", "auto", "manual"],
    "Several processes: auto detects Slurm, Kubernetes, Open MPI or a TPU pod; manual needs "
    "--coordinator, --processes and --process.",
)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0.")
_PROCESSES = flags.DEFINE_integer("processes", None, "Number of processes.")
_PROCESS = flags.DEFINE_integer("process", None, "Index of this process, from 0.")
_WAIT = flags.DEFINE_integer("distributed_wait", 300, "Seconds to wait for all processes.")
flags.mark_flags_as_required(["config"])


def main(_: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    platform.use_cpu_without_accelerator()
    from mor_jax.checkpoint.checkpointer import WriteFailed
    from mor_jax.config import TrainConfig
    from mor_jax.distributed import initialize
    from mor_jax.distributed.heartbeat import HostLost
    from mor_jax.training.fork import Fork
    from mor_jax.training.trainer import fit

    try:
        cfg = TrainConfig.from_dict(_CONFIG.value.to_dict())
        _join()
        branch = None if _BRANCH.value is None else Fork.parse(_BRANCH.value)
        fit(cfg, _WORKDIR.value, _ALLOW.value, _SIGNALS, branch)
        initialize.shutdown()
    except Stopped as stopped:
        print(f"stopped: {stopped}", file=sys.stderr)
        if not isinstance(stopped, StoppedEarly):
            initialize.shutdown()
        _leave("", stopped.code)
    except Diverged as diverged:
        print(f"error: {diverged}", file=sys.stderr)
        initialize.shutdown()
        _leave("", diverged.code)
    except HostLost as lost:
        # The peer monitor has printed the message.
        _leave("", lost.code)
    except (ValueError, WriteFailed) as error:
        message = option_names.as_typed(error, option_names.flags_given())
        print(f"error: {message}", file=sys.stderr, flush=True)
        initialize.wait_for_others()
        _leave("", exit_codes.of(error))


def _join() -> None:
    from mor_jax.distributed import initialize

    manual = (_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
    if _DISTRIBUTED.value == "manual":
        initialize.initialize(*manual, wait=_WAIT.value)
    elif any(value is not None for value in manual):
        given = _DISTRIBUTED.value
        fix = "Add --distributed=manual, or leave the three out"
        raise ValueError(
            f"--distributed={given}: does not take --coordinator, --processes, --process. {fix}"
        )
    elif _DISTRIBUTED.value == "auto":
        initialize.initialize(wait=_WAIT.value, manual=False)


def _leave(message: str, code: int) -> NoReturn:
    # Does not wait for a compilation that still runs in another thread.
    if message:
        print(message, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    try:
        app.run(main, flags_parser=config_flag.parsed)
    except ImmediateExit as left:
        _leave(f"stopped: {left}. Run the same command again", exit_codes.STOPPED)
