"""Does MoR work here? Every family at equal tokens and equal FLOPs, and the paper's ablations.

    python benchmarks/evidence.py --study=runs/evidence --jobs=2 --save

Trains on the source text of Python's standard library, as bytes: plain, recursive, expert-choice
with two and three recursions, with shared keys and values, token-choice; several seeds. Held-out
loss under causal routing and under the training rule, step time and memory measured side by side,
parameters. Then one setting changed at a time: sharing scheme, router, auxiliary loss, capacity
warm-up. About 40 minutes on two CPU cores; may be stopped and started again at any time. `--save`
writes results/evidence.md and results/evidence.jsonl.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import timing
from evidencing.planning import ROOT, make, model
from evidencing.report import report
from evidencing.variants import MAIN

from mor_jax.runtime import exit_codes
from mor_jax.scaling.runs.local import Event, LocalOptions, StudyStopped, run_local
from mor_jax.scaling.runs.points import RESULTS, read_points
from mor_jax.scaling.study.manifest import Manifest, read, write


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--study", default="runs/evidence", help="directory of the runs")
    parser.add_argument("--steps", type=int, default=2000, help="of the plain model")
    parser.add_argument("--seeds", type=int, default=3, help="of the main table")
    parser.add_argument("--ablation_seeds", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each variant")
    parser.add_argument("--save", action="store_true", help="write into benchmarks/results/")
    return parser.parse_args()


def train(study: str, manifest: Manifest, jobs: int) -> dict[str, str]:
    """Runs what is left to run; returns what failed."""
    how = LocalOptions(train=ROOT / "launch" / "train.py", jobs=jobs)

    def tell(event: Event) -> None:
        print(f"{event.kind} {event.run.name}: {event.text}", file=sys.stderr, flush=True)

    return run_local(study, manifest, how, tell)


def measure(steps: int, rounds: int) -> dict[str, dict]:
    """Step time in seconds and bytes of memory by variant, measured in turns in this process."""
    trainers = {v.name: timing.Trainer(model(v, steps).cfg) for v in MAIN}
    calls = {name: trainer.step for name, trainer in trainers.items()}
    seconds = timing.interleaved(calls, warmup=3, rounds=rounds)
    return {
        name: {"seconds": timing.median(seconds[name]), "temp_bytes": trainer.temp_bytes}
        for name, trainer in trainers.items()
    }


def main() -> int:
    """Plans, trains, measures, prints."""
    args = parse_args()
    write(args.study, make(args.steps, args.seeds, args.ablation_seeds))
    manifest = read(args.study)
    try:
        failed = train(args.study, manifest, args.jobs)
    except StudyStopped as stopped:
        print(stopped, file=sys.stderr)
        return exit_codes.STOPPED
    for name, said in failed.items():
        print(f"failed: {name}: {said}", file=sys.stderr)
    if failed:
        return exit_codes.ERROR
    timed = measure(args.steps, args.rounds)
    text = report(manifest, read_points(args.study), timed, timing.machine())
    print(text)
    if args.save:
        (timing.RESULTS / "evidence.md").write_text(text + "\n")
        lines = (Path(args.study) / RESULTS).read_text()
        timed_line = json.dumps({"benchmark": "evidence", **timing.machine(), "timed": timed})
        (timing.RESULTS / "evidence.jsonl").write_text(f"{timed_line}\n{lines}")
    return exit_codes.OK


if __name__ == "__main__":
    sys.exit(main())
