"""Trains a model: python launch/train.py --config=configs/mor.py:size=debug --workdir=runs/mor.

Exit codes are those of mor_jax/runtime/exit_codes.py; docs/faults.md explains them.
"""

import os
import sys
from typing import NoReturn

from mor_jax.runtime.preemption import Diverged, ImmediateExit, Signals, Stopped, StoppedEarly

_SIGNALS = Signals()
if __name__ == "__main__":
    # First of all: what follows takes seconds to import.
    _SIGNALS.__enter__()

from absl import app, flags, logging
from ml_collections import config_flags

from mor_jax.cli import config_flag, option_names
from mor_jax.runtime import exit_codes, platform

_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration, such as configs/mor.py.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run; an existing one goes on.")
_ALLOW = flags.DEFINE_list(
    "allow_changes", [], "Settings that may differ from the run's last start, such as optim.lr."
)
_BRANCH = flags.DEFINE_string(
    "branch", None, "RUN@STEP: where a new run starts that goes on from a step of another."
)
_DISTRIBUTED = flags.DEFINE_enum(
    "distributed",
    "off",
    ["off", "auto", "manual"],
    "Several processes: auto asks Slurm, Kubernetes, Open MPI or the TPU pod, manual needs the "
    "next three.",
)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0.")
_PROCESSES = flags.DEFINE_integer("processes", None, "Number of processes.")
_PROCESS = flags.DEFINE_integer("process", None, "Which of them this is, from 0.")
_WAIT = flags.DEFINE_integer("distributed_wait", 300, "Seconds for all processes to come.")
flags.mark_flags_as_required(["config", "workdir"])


def main(_: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    platform.skip_absent()
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
        # It has said so already.
        _leave("", lost.code)
    except (ValueError, WriteFailed) as error:
        told = option_names.as_typed(error, option_names.flags_given())
        print(f"error: {told}", file=sys.stderr, flush=True)
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
    # A compiler at work in another thread would outlive the interpreter: nothing waits for it.
    if message:
        print(message, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    try:
        app.run(main, flags_parser=config_flag.parsed)
    except ImmediateExit as left:
        _leave(f"stopped: {left}. The same command starts it again", exit_codes.STOPPED)
