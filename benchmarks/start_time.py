"""How long from the command to the line of the first step? Imports, data and compiling included.

    python benchmarks/start_time.py

Starts the debug run as a user would, in a new directory each time, and stops it at its first step.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import timing

ROOT = Path(__file__).resolve().parent.parent


def seconds_to_first_step(config: str) -> float:
    """Seconds until the run prints its first step. Raises `RuntimeError` if it ends before."""
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, str(ROOT / "launch" / "train.py"), f"--config={config}"]
        command.append(f"--workdir={directory}/run")
        start = time.perf_counter()
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdout=pipe, stderr=subprocess.STDOUT, text=True) as run:
            printed = []
            for line in run.stdout or ():
                printed.append(line)
                if line.startswith("step 1/"):
                    seconds = time.perf_counter() - start
                    run.kill()
                    return seconds
    raise RuntimeError("the run ended before its first step:\n" + "".join(printed))


def main() -> None:
    """Measures and reports."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default=str(ROOT / "configs" / "mor.py") + ":size=debug")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="append to benchmarks/results/")
    args = parser.parse_args()
    seconds = [seconds_to_first_step(args.config) for _ in range(args.rounds)]
    print("seconds to the first step:", " ".join(f"{s:.1f}" for s in seconds))
    record = {"config": Path(args.config).name, "seconds": seconds}
    timing.report("start_time", record | {"median": statistics.median(seconds)}, args.save)


if __name__ == "__main__":
    main()
