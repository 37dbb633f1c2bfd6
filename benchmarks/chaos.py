"""Does a run that is killed again and again end as one that never was?

    python benchmarks/chaos.py
    python benchmarks/chaos.py --kill=term --kills=10

Trains a tiny model once undisturbed. Then trains it again, kills it with `kill -9` at random
moments (while it starts, between steps, inside saves), starts the same command each time, and
compares: every array of the last checkpoint bit for bit, every logged loss, and the number of the
batch that each step was given. Prints a table and one JSON line; exit code 1 if anything differs.

With --kill=term the run is asked to end instead, and has to do so with exit code 75.
"""

import argparse
import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import numpy as np
import timing

from mor_jax.checkpoint.checkpointer import Checkpointer
from mor_jax.config import TrainConfig
from mor_jax.distributed import mesh as sharding
from mor_jax.models.params import abstract_params, logical_axes
from mor_jax.observability import event_log, metrics
from mor_jax.observability.goodput import goodput
from mor_jax.runtime import exit_codes
from mor_jax.training.compiled_step import abstract_state
from mor_jax.training.train_state import fields

ROOT = Path(__file__).resolve().parent.parent

# Structure stays that of the configuration; the sizes let 20 starts take minutes.
TINY = {
    "batch_size": 4,
    "seq_len": 32,
    "loss_chunk_size": None,
    "optim.warmup_steps": 2,
    "optim.decay_steps": 2,
    "log.interval": 1,
    "checkpoint.interval": 10,
    "eval.interval": 60,
    "eval.batches": 1,
    "eval.batch_size": 4,
    "eval.completion_tokens": 0,
    "model.hidden_size": 32,
    "model.num_heads": 4,
    "model.num_kv_heads": 2,
    "model.head_dim": 8,
    "model.intermediate_size": 64,
    "model.max_seq_len": 64,
}
AIMS = ("start", "steps", "save")
POLL = 0.002
PATIENCE = 300.0
KINDS = {"kill": signal.SIGKILL, "term": signal.SIGTERM}


@dataclasses.dataclass(frozen=True)
class Kill:
    """One start and how it ended.

    doing: the last event that it logged. step: the last one logged. cut: a save was under way.
    """

    aim: str
    seconds: float
    code: int
    doing: str
    step: int
    cut: bool


@dataclasses.dataclass(frozen=True)
class Trial:
    """How the command is run. per_start: the most steps that a start is left to do."""

    config: str
    settings: dict[str, Any]
    steps: int
    per_start: int
    environment: dict[str, str]
    output: Path

    def start(self, workdir: Path) -> "subprocess.Popen[str]":
        """The training command on `workdir`, its output appended to a file."""
        command = [sys.executable, str(ROOT / "launch" / "train.py"), f"--config={self.config}"]
        settings = self.settings | {"steps": self.steps}
        command += [f"--config.{name}={value}" for name, value in settings.items()]
        with self.output.open("a") as output:
            return subprocess.Popen(
                [*command, f"--workdir={workdir}"],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self.environment,
                text=True,
            )

    def complete(self, workdir: Path) -> None:
        """Runs to the end. Raises `RuntimeError` with the output if it does not get there."""
        code = self.start(workdir).wait(PATIENCE)
        if code != exit_codes.OK:
            raise RuntimeError(f"the run ended with code {code}:\n{self.output.read_text()}")


def kill_once(trial: Trial, workdir: Path, aim: str, kind: int, chance: random.Random) -> Kill:
    """Starts the run and ends it at a random moment of the sort `aim`."""
    due = moment(trial, workdir, aim, chance)
    old = unfinished(workdir)
    began, run = time.monotonic(), trial.start(workdir)
    while run.poll() is None and not due():
        time.sleep(POLL)
        if time.monotonic() - began > PATIENCE:
            raise RuntimeError(f"no moment to kill came:\n{trial.output.read_text()}")
    time.sleep(chance.uniform(0, 0.05 if aim == "steps" else 0.01))
    run.send_signal(kind)
    code = run.wait(PATIENCE)
    logged = [event["event"] for event in event_log.read(workdir / event_log.FILE)]
    return Kill(
        aim=aim,
        seconds=time.monotonic() - began,
        code=code,
        doing=logged[-1] if logged else "nothing",
        step=last_step(workdir),
        cut=bool(unfinished(workdir) - old),
    )


def moment(trial: Trial, workdir: Path, aim: str, chance: random.Random) -> Callable[[], bool]:
    """Whether the moment has come: some seconds after the start, some steps on, or in a save."""
    began, first, old = time.monotonic(), last_step(workdir), unfinished(workdir)
    ahead, wait = first + chance.randint(1, trial.per_start), chance.uniform(0.5, 8)
    if aim == "start":
        return lambda: time.monotonic() - began > wait or last_step(workdir) > first + 1
    if aim == "steps":
        return lambda: last_step(workdir) >= ahead
    return lambda: last_step(workdir) > first and bool(unfinished(workdir) - old)


def last_step(workdir: Path) -> int:
    """The last step in the metrics of a run, 0 without any."""
    file = workdir / metrics.FILE
    if not file.exists():
        return 0
    with file.open("rb") as opened:
        opened.seek(max(file.stat().st_size - 5000, 0))
        steps = re.findall(rb'"step": (\d+)', opened.read())
    return int(steps[-1]) if steps else 0


def unfinished(workdir: Path) -> set[Path]:
    """Checkpoints that are being written, or were when the run was killed."""
    return set((workdir / "checkpoints").glob("*/incomplete"))


def differences(trial: Trial, whole: Path, killed: Path) -> list[str]:
    """What differs between two finished runs, in words; empty if nothing does."""
    found = []
    one, other = final_arrays(whole), final_arrays(killed)
    for name in sorted(one.keys() | other.keys()):
        if name not in one or name not in other or one[name] != other[name]:
            found.append(f"array {name}")
    logged, again = records(whole), records(killed)
    if len(logged) != len(again):
        found.append(f"{len(logged)} records there, {len(again)} here")
    found += [f"record {a} there, {b} here" for a, b in zip(logged, again, strict=False) if a != b]
    rows = [int(record["position"]) for record in again if "position" in record]
    size = TrainConfig.from_dict(json.loads((killed / "config.json").read_text())).batch_size
    batches = [row // size for row in rows if row % size == 0]
    if batches != list(range(trial.steps)):
        found.append(f"batches given to the steps: {batches}")
    return found


def final_arrays(workdir: Path) -> dict[str, bytes]:
    """The bytes of every array of the newest checkpoint, by path."""
    cfg = TrainConfig.from_dict(json.loads((workdir / "config.json").read_text()))
    mesh = sharding.make_mesh(cfg.mesh, jax.devices()[:1])
    placement = sharding.param_shardings(mesh, logical_axes(cfg.model), abstract_params(cfg.model))
    with Checkpointer(workdir, cfg.checkpoint) as checkpoints:
        state = checkpoints.restore(fields(abstract_state(cfg, mesh, placement))).state
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}


def records(workdir: Path) -> list[dict[str, Any]]:
    """What was logged, without times."""
    times = ("time", "tokens_per_second")
    kept = metrics.read(workdir / metrics.FILE)
    return [{k: v for k, v in record.items() if k not in times} for record in kept]


def run_trial(trial: Trial, root: Path, kills: int, kind: int, seed: int) -> dict[str, Any]:
    """Trains twice, killing the second run `kills` times; prints as it goes."""
    chance = random.Random(seed)
    whole, killed = root / "whole", root / "killed"
    trial.complete(whole)
    print(f"{'':>3}  {'aim':<6}{'after':>8}  {'code':>4}  {'last event':<11}{'step':>5}  save cut")
    done = []
    for number in range(1, kills + 1):
        kill = kill_once(trial, killed, AIMS[number % len(AIMS)], kind, chance)
        done.append(kill)
        cut = "yes" if kill.cut else ""
        print(
            f"{number:>3}  {kill.aim:<6}{kill.seconds:>6.1f} s  {kill.code:>4}  {kill.doing:<11}"
            f"{kill.step:>5}  {cut}",
            flush=True,
        )
    trial.complete(killed)
    found = differences(trial, whole, killed)
    spent = goodput(event_log.read(killed / event_log.FILE))
    print(spent.line())
    print("\n".join(found[:20]) or verdict(trial, done, spent.again))
    return {
        "steps": trial.steps,
        "kills": len(done),
        "codes": sorted({kill.code for kill in done}),
        "cut_saves": sum(kill.cut for kill in done),
        "steps_again": spent.again,
        "starts": spent.starts,
        "differences": len(found),
    }


def verdict(trial: Trial, done: list[Kill], again: int) -> str:
    """What it means that nothing differs."""
    return (
        f"ended {len(done)} times before its time, {sum(kill.cut for kill in done)} of them inside "
        f"a save; {again} steps done again. Every array of step {trial.steps} and every logged "
        f"value is bit for bit that of the run left alone; each of the batches 0 to "
        f"{trial.steps - 1} counts once"
    )


def main() -> None:
    """Runs the trial and reports it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default=str(ROOT / "configs" / "mor.py") + ":size=debug")
    parser.add_argument("--kill", choices=KINDS, default="kill", help="SIGKILL or SIGTERM")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, help="by default 15 for each kill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", action="store_true", help="append to benchmarks/results/")
    args = parser.parse_args()
    steps = args.steps or 15 * max(args.kills, 1)
    # Without the variable the run keeps its programs in its own directory, which is under test too.
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        trial = Trial(args.config, TINY, steps, 24, environment, root / "output.txt")
        record = run_trial(trial, root, args.kills, KINDS[args.kill], args.seed)
    timing.report("chaos", {"kill": args.kill, "seed": args.seed, **record}, args.save)
    sys.exit(bool(record["differences"]))


if __name__ == "__main__":
    main()
