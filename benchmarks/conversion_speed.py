"""What does a conversion cost? Time beside copying the same bytes, and memory.

    python benchmarks/conversion_speed.py --size=1.7b --rounds=3

Random weights of a shipped size are saved as training saves them. Then, round after round, each
conversion of launch/convert.py in its turn, and before it a program that reads those files and
writes their bytes to the same disk. All are processes of their own, start with nothing of the
folder in the system's cache, and end when their output is on the disk. Prints the median times over
the rounds, the median ratio to the copy right before, and the largest memory of each beside its
limit: 1.3 times the larger of one shard and the largest array, plus 1 GiB. --save writes
benchmarks/results/conversion_speed.jsonl.
"""

import argparse
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["JAX_PLATFORMS"] = "cpu"

SHARD = 2 * 10**9
HF = "export hf float32"
COPY = """
import os, sys
from pathlib import Path
with open(sys.argv[2], "wb") as out:
    for path in sorted(Path(sys.argv[1]).rglob("*")):
        if path.is_file():
            with open(path, "rb") as file:
                while block := file.read(1 << 24):
                    out.write(block)
    out.flush()
    os.fsync(out.fileno())
"""


def main() -> None:
    """Prints one line a conversion."""
    if sys.argv[1:2] == ["make"]:
        make(sys.argv[2], Path(sys.argv[3]))
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", default="1.7b", help="of configs/vanilla.py")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="on the disk to measure; default: the system's temporary")
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        measure(options, Path(folder))


def measure(options: argparse.Namespace, folder: Path) -> None:
    """Makes the run, then all conversions in turns, each after a copy."""
    start = folder / "run"
    subprocess.run([sys.executable, __file__, "make", options.size, str(start)], check=True)
    rows: dict[str, list[Row]] = {}
    copy(folder)
    for _ in range(options.rounds):
        for name, (target, command) in commands(folder).items():
            copied = copy(folder)
            shutil.rmtree(target, ignore_errors=True)
            seconds, memory = run(command, folder)
            rows.setdefault(name, []).append(Row(copied, seconds, memory, bytes_of(target)))
            if name != HF:
                # The import reads that one; no other is needed, and they would fill the cache.
                shutil.rmtree(target)
    largest = max(SHARD, stack_bytes(options.size))
    report(options, rows, 1.3 * largest + 2**30)


class Row(NamedTuple):
    """Seconds of the copy and of the conversion after it, bytes of memory and of output."""

    copied: float
    seconds: float
    memory: int
    size: int


def copy(folder: Path) -> float:
    """Seconds to read the run's files and write their bytes."""
    target = folder / "copied"
    seconds, _ = run([sys.executable, "-c", COPY, str(folder / "run"), str(target)], folder)
    target.unlink()
    return seconds


def commands(folder: Path) -> dict[str, tuple[Path, list[str]]]:
    """name -> what it writes, how it is called."""
    tool = [sys.executable, str(ROOT / "launch" / "convert.py")]
    exports = {
        HF: ("hf", "--to=hf"),
        "export hf bfloat16": ("bf16", "--to=hf", "--dtype=bfloat16"),
        "export reference": ("reference", "--to=reference"),
    }
    found = {}
    for name, (target, *flags) in exports.items():
        places = [f"--workdir={folder / 'run'}", f"--output={folder / target}"]
        found[name] = (folder / target, [*tool, "export", *places, *flags])
    back = folder / "imported"
    flags = ["--from=hf", f"--source={folder / 'hf'}", f"--workdir={back}"]
    found["import hf float32"] = (back, [*tool, "import", *flags])
    return found


def run(command: list[str], folder: Path) -> tuple[float, int]:
    """Seconds and largest memory in bytes of a process; the folder is not in the system's cache."""
    evict(folder)
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"failed: {' '.join(command)}")
    return seconds, usage.ru_maxrss * 1024


def evict(folder: Path) -> None:
    """Asks the system to forget the contents of all files."""
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def bytes_of(folder: Path) -> int:
    """Size of all files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def report(options: argparse.Namespace, rows: dict[str, list[Row]], limit: float) -> None:
    """The table, and with --save the records."""
    import timing

    copies = [row.copied for found in rows.values() for row in found]
    print(f"copies: {statistics.median(copies):.2f} s ({min(copies):.2f} to {max(copies):.2f})")
    print(f"limit of memory: {limit / 1e9:.2f} GB")
    for name, found in rows.items():
        seconds = statistics.median(row.seconds for row in found)
        ratio = statistics.median(row.seconds / row.copied for row in found)
        memory = max(row.memory for row in found)
        each = " ".join(f"{row.seconds:.1f}/{row.copied:.1f}" for row in found)
        print(
            f"{name:20} {seconds:6.2f} s, {ratio:4.2f} of the copy ({each}), "
            f"{memory / 1e9:4.2f} GB of memory"
        )
        record = {
            "size": options.size,
            "conversion": name,
            "seconds": round(seconds, 2),
            "over_copy": round(ratio, 3),
            "each": [[round(row.seconds, 2), round(row.copied, 2)] for row in found],
            "memory_gb": round(memory / 1e9, 3),
            "limit_gb": round(limit / 1e9, 3),
            "output_gb": round(found[0].size / 1e9, 3),
        }
        if options.save:
            timing.report("conversion_speed", record, save=True)


def stack_bytes(size: str) -> int:
    """Bytes of the largest array of our tree."""
    from mor_jax.convert.names import array_shapes, entries

    cfg = config_of(size).model
    shapes = array_shapes(cfg, entries(cfg)).values()
    return max(4 * math.prod(shape) for shape in shapes)


def config_of(size: str):
    """The run of a shipped size, plain."""
    from configs import vanilla
    from mor_jax.config import TrainConfig

    return TrainConfig.from_dict(vanilla.get_config(f"size={size}").to_dict())


def make(size: str, folder: Path) -> None:
    """A run of random weights, saved as training saves them, without moments."""
    import dataclasses

    import jax
    import numpy as np

    from mor_jax.checkpoint.checkpointer import Checkpointer
    from mor_jax.checkpoint.lazy_arrays import ArraySpec, LazyArrays, nested
    from mor_jax.checkpoint.run_dir import claim_workdir
    from mor_jax.convert.names import array_shapes, entries

    cfg = config_of(size)
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, tokenizer="bytes"))
    shapes = array_shapes(cfg.model, entries(cfg.model))
    rng = np.random.default_rng(0)

    def draw(name: str):
        return jax.device_put(rng.standard_normal(shapes[name], np.float32) * np.float32(0.02))

    params = nested(
        LazyArrays("random", {name: ArraySpec(shape) for name, shape in shapes.items()}, draw)
    )
    claim_workdir(folder, cfg)
    with Checkpointer(folder, cfg.checkpoint) as checkpoints:
        checkpoints.save(1, {"params": params, "step": jax.numpy.int32(1)}, 0, cfg.to_dict())


if __name__ == "__main__":
    main()
