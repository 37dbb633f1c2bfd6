"""What does an NVIDIA GPU need for each program of the project, and with which attention kernels?

    python benchmarks/gpu_compile.py --save
    python benchmarks/gpu_compile.py --quick
    python benchmarks/gpu_compile.py --multiples --save

No GPU is needed: XLA compiles for one from its description. The command makes an environment of its
own for that, .venv-gpu, once (4 GB are downloaded). Training takes 32 rows of 2048 tokens a device
in 8 micro-batches, bf16, remat full, and is compiled for one H100 and for eight (fsdp=8); both
evaluations take the 32 rows at once; the engine decodes 64 sequences, or stores 256 tokens of a
prompt. With --multiples programs of one MoR are compiled with its capacities rounded to different
multiples, four rows a device, the evaluation also for a TPU v5e (requirements-tpu.txt).

Prints tables. With --save each program's record is appended to results/gpu_compile.jsonl as it
comes and results/gpu_compile.md is made anew; a run that was stopped goes on where it was. Programs
that were compiled by the same versions are not compiled again, unless with --again. What compilers
say goes to .venv-gpu/compile.log.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import queue
import subprocess
import sys
import threading
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
# Nothing runs here; an accelerator of this machine stays free.
os.environ["JAX_PLATFORMS"] = "cpu"

import timing
from gpu_compiling import matrix, report
from gpu_compiling.matrix import Case

from mor_jax import __version__
from mor_jax.planning.gpu_targets import TARGETS

ROOT = Path(__file__).resolve().parent.parent
HOME = ROOT / ".venv-gpu"
LOG = HOME / "compile.log"
QUESTION = "gpu_compile"
PACKAGES = ("requirements.lock", "requirements.txt", "requirements-gpu.txt")
_DONE = "complete"


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--quick", action="store_true", help="each kind of program once, of 135m")
    which.add_argument("--multiples", action="store_true", help="compare multiples of capacities")
    parser.add_argument("--only", help="programs whose name holds this, such as 'token, 3: train'")
    parser.add_argument("--save", action="store_true", help="write to benchmarks/results/")
    parser.add_argument("--again", action="store_true", help="also what is there already")
    parser.add_argument("--workers", type=int, default=2, help="compilations at one time")
    return parser.parse_args()


def make_environment() -> None:
    """Makes the environment with XLA's compiler for GPUs, if its packages are not there yet."""
    python = HOME / "bin" / "python"
    lock, *needed = (ROOT / name for name in PACKAGES)
    wanted = hashlib.sha256(b"".join(path.read_bytes() for path in (lock, *needed))).hexdigest()
    stamp = HOME / _DONE
    if stamp.exists() and stamp.read_text() == wanted:
        return
    print(f"making {HOME}: several GB are downloaded", file=sys.stderr, flush=True)
    if not python.exists():
        venv.create(HOME, with_pip=True)
    files = [word for path in needed for word in ("-r", str(path))]
    install = [str(python), "-m", "pip", "install", "--quiet", "-c", str(lock), *files]
    if code := subprocess.run(install, stdout=sys.stderr).returncode:
        sys.exit(f"error: {HOME}: pip ended with code {code}; what it said is above. Try again")
    stamp.write_text(wanted)


class Worker:
    """A process that compiles one case after the other; started anew if one takes it down."""

    def __init__(self) -> None:
        self._processes: dict[str, subprocess.Popen] = {}

    def __call__(self, case: Case) -> dict[str, Any]:
        """What became of the case; an error is an answer."""
        python = str(HOME / "bin" / "python") if case.target in TARGETS else sys.executable
        process = self._processes.get(python)
        if process is None or process.poll() is not None:
            process = self._processes[python] = _started(python)
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(dataclasses.asdict(case)) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        if line:
            return json.loads(line)
        return {"error": f"the compiling process ended with code {process.wait()}"}

    def close(self) -> None:
        """Ends the processes."""
        for process in self._processes.values():
            assert process.stdin is not None
            process.stdin.close()
            process.wait()


def _started(python: str) -> subprocess.Popen:
    worker = ROOT / "benchmarks" / "gpu_compiling" / "worker.py"
    # Compilers warn a lot, most of it about a GPU that is not there.
    with LOG.open("a") as log:
        return subprocess.Popen(
            [python, str(worker)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )


def compile_all(cases: list[Case], workers: int, keep: Callable[[Case, dict], None]) -> None:
    """Hands the cases out to `workers` processes and every answer to `keep`, one at a time."""
    waiting: queue.SimpleQueue[Case] = queue.SimpleQueue()
    for case in cases:
        waiting.put(case)
    lock = threading.Lock()

    def work() -> None:
        worker = Worker()
        try:
            while True:
                case = waiting.get_nowait()
                answer = worker(case)
                with lock:
                    keep(case, answer)
        except queue.Empty:
            pass
        finally:
            worker.close()

    threads = [threading.Thread(target=work) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def known() -> dict[Case, dict]:
    """The newest record of every case that these versions compiled before."""
    path, found = timing.RESULTS / f"{QUESTION}.jsonl", {}
    names = [field.name for field in dataclasses.fields(Case)]
    for line in path.read_text().splitlines() if path.exists() else ():
        record = json.loads(line)
        versions = record["version"], record["jax"]
        if versions == (__version__, timing.machine()["jax"]) and "error" not in record:
            found[Case(**{name: record[name] for name in names})] = record
    return found


def document(records: dict[Case, dict]) -> str:
    """All tables whose programs are there."""
    main, compared = (
        [case for case in cases() if case in records] for cases in (matrix.full, matrix.multiples)
    )
    text = "# Programs for NVIDIA GPUs, compiled without one\n\n"
    text += "`python benchmarks/gpu_compile.py --save`\n\n"
    text += report.table([records[case] for case in main])
    if compared:
        text += "\n## Multiples of capacities\n\n"
        text += "`python benchmarks/gpu_compile.py --multiples --save`\n\n"
        text += report.multiples([records[case] for case in compared])
    return text


def chosen(cases: list[Case], only: str | None, workers: int) -> list[Case]:
    """The cases that were asked for. Ends the program with a line if there are none."""
    if workers < 1:
        sys.exit(f"error: --workers={workers}: must be at least 1. Try 2")
    found = [case for case in cases if only is None or (only and only in str(case))]
    if not found:
        near = f"'{cases[0]}' or '{cases[-1]}'"
        sys.exit(f"error: --only={only}: must be part of a program's name, such as {near}")
    return found


def main() -> None:
    """Compiles, prints, saves."""
    args = parse_args()
    which = matrix.quick if args.quick else matrix.multiples if args.multiples else matrix.full
    cases = chosen(which(), args.only, args.workers)
    records = known() if args.save and not args.again else {}
    missing = [case for case in cases if case not in records]
    if missing:
        make_environment()

    def keep(case: Case, answer: dict) -> None:
        record = {**dataclasses.asdict(case), "version": __version__, **answer}
        told = answer.get("error") or f"{answer['compile_seconds']:.0f} s"
        print(f"{case}: {told}", file=sys.stderr, flush=True)
        timing.report(QUESTION, record, args.save and "error" not in answer)
        records[case] = record

    compile_all(missing, args.workers, keep)
    show = report.multiples if args.multiples else report.table
    print(show([records[case] for case in cases]))
    if args.save:
        (timing.RESULTS / f"{QUESTION}.md").write_text(document(known()))
    failed = [str(case) for case in cases if "error" in records[case]]
    if failed:
        sys.exit(f"not compiled: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
