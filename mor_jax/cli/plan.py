"""Plans a run on devices that this machine does not have: memory, traffic and step time.

    mor plan --config=mor:size=1.7b --topology=v5e:16x16
    mor plan --config=mor:size=7b --topology=v5p:8x8x8 --compare
    mor plan --config=mor:size=1.7b --topology=2xv5e:16x16 \\
        --config.mesh.slice=2 --json

The compiler of the device compiles the real train step; no accelerator is needed or used. TPU
topologies need requirements-tpu.txt. docs/pod-plan.md explains the tables.
"""

import contextlib
import json
import os
import resource
import sys
import time
from pathlib import Path

from mor_jax.runtime.preemption import Signals

_SIGNALS = Signals("nothing was written")
if __name__ == "__main__":
    # First, because the imports below take seconds.
    _SIGNALS.__enter__()

# Nothing runs on a device; an accelerator of this machine stays free.
os.environ["JAX_PLATFORMS"] = "cpu"

from absl import app, flags, logging
from ml_collections import config_flags

from mor_jax.cli import config_flag, option_names
from mor_jax.runtime import exit_codes

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Name of a shipped configuration or a file, with choices: mor:size=1.7b."
)
_TOPOLOGY = flags.DEFINE_string(
    "topology", None, "Devices: v5e:16x16, 2xv5e:16x16 (two slices), h100:8x4.", required=True
)
_TOKENS = flags.DEFINE_float(
    "tokens", None, "Tokens of the whole run; default: those of its steps."
)
_COMPARE = flags.DEFINE_bool("compare", False, "Compare vanilla, recursive and MoR.")
_JSON = flags.DEFINE_bool("json", False, "Print one line of JSON for each plan instead of tables.")
_TRY = flags.DEFINE_float(
    "try_seconds", 300, "Seconds to search for settings that fit, if these do not.", lower_bound=0
)
flags.mark_flags_as_required(["config"])


def main(_: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    start = time.perf_counter()
    try:
        plans = _plans()
    except ValueError as error:
        message = option_names.as_typed(error, option_names.flags_given())
        print(f"error: {message}", file=sys.stderr)
        sys.exit(exit_codes.REFUSED)
    seconds = time.perf_counter() - start
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if _JSON.value:
        for plan in plans:
            print(json.dumps(plan.to_dict() | {"command_seconds": seconds, "host_peak": memory}))
        return
    _print(plans)
    print(f"this command: {seconds:.0f} s, {memory / 1e9:.2f} GB of host memory at the peak")


def _plans() -> list:
    from mor_jax.config import TrainConfig
    from mor_jax.planning.alternatives import try_alternatives
    from mor_jax.planning.aot import parse_topology
    from mor_jax.planning.build import make_plan
    from mor_jax.planning.report import TooLarge
    from mor_jax.planning.variants import sibling_variants

    topology = parse_topology(_TOPOLOGY.value)
    configs = [_CONFIG.value]
    if _COMPARE.value:
        flag = flags.FLAGS["config"]
        file, _, choices = config_flags.get_config_filename(flag).partition(":")
        overrides = config_flags.get_override_values(flag)
        configs = sibling_variants(choices, Path(file).resolve().parent, overrides)
    plans = []
    for values in configs:
        cfg = TrainConfig.from_dict(values.to_dict())
        _tell(f"compiling {cfg.model.sharing}/{cfg.model.router.kind} for {topology.name}")
        plan = make_plan(cfg, topology, _TOKENS.value)
        if isinstance(plan, TooLarge) and _TRY.value > 0:
            plan = try_alternatives(cfg, topology, plan, _TRY.value, _tell_attempt)
        plans.append(plan)
    return plans


def _print(plans: list) -> None:
    from rich.console import Console

    from mor_jax.planning.tables import print_comparison, print_plan

    console = Console()
    if len(plans) > 1:
        print_comparison(plans, console)
    else:
        print_plan(plans[0], console)


def _tell(text: str) -> None:
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def _tell_attempt(change: dict, short: int | None) -> None:
    settings = " ".join(f"{name}={value}" for name, value in change.items())
    _tell(f"tried {settings}: {'fits' if short is None else f'{short / 1e9:.2f} GB too much'}")


if __name__ == "__main__":
    with _SIGNALS:
        app.run(main, flags_parser=config_flag.parsed)
