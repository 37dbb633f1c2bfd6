"""What does a conversion cost? Time beside copying the same bytes, and memory.

    python benchmarks/conversion_speed.py --size=1.7b --rounds=3

Random weights of a shipped size are saved as training saves them. Then, in turns: a program that
reads those files and writes their bytes to the same disk, and launch/convert.py. Each is a process
of its own, starts with its input out of the system's cache, and ends when its output is on the
disk. Prints the median times over the rounds, their ratio to that of the copy, and the largest
memory of each beside its limit: 1.3 times the larger of one shard and the largest array, plus
1 GiB. --save writes benchmarks/results/conversion_speed.jsonl.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["JAX_PLATFORMS"] = "cpu"

SHARD = 2 * 10**9
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
    """Makes the run, then all conversions in turns."""
    run([sys.executable, __file__, "make", options.size, str(folder / "run")], folder / "none")
    rows: dict[str, list[tuple[float, float]]] = {}
    for _ in range(options.rounds):
        for name, (source, target, command) in commands(folder).items():
            rows.setdefault(name, []).append(run(command, source))
            if name.startswith("copy"):
                shutil.rmtree(target, ignore_errors=True)
    sizes = {name: bytes_of(target) for name, (_, target, _) in commands(folder).items()}
    largest = max(SHARD, stack_bytes(options.size))
    report(options, rows, sizes, 1.3 * largest + 2**30)


def commands(folder: Path) -> dict[str, tuple[Path, Path, list[str]]]:
    """name -> what it reads, what it writes, how it is called."""
    tool = [sys.executable, str(ROOT / "launch" / "convert.py")]
    start, hf = folder / "run", folder / "hf"
    copied = folder / "copied" / "bytes"
    copied.parent.mkdir(exist_ok=True)
    found = {"copy": (start, copied.parent, [sys.executable, "-c", COPY, str(start), str(copied)])}
    exports = {
        "export hf float32": ["--to=hf", f"--output={hf}"],
        "export hf bfloat16": ["--to=hf", f"--output={folder / 'bf16'}", "--dtype=bfloat16"],
        "export reference": ["--to=reference", f"--output={folder / 'reference'}"],
    }
    for name, flags in exports.items():
        target = Path(next(flag for flag in flags if "--output" in flag).partition("=")[2])
        command = [*tool, "export", f"--workdir={start}", "--overwrite", *flags]
        found[name] = (start, target, command)
    back = folder / "imported"
    flags = ["--from=hf", f"--source={hf}", f"--workdir={back}", "--overwrite"]
    found["import hf float32"] = (hf, back, [*tool, "import", *flags])
    return found


def run(command: list[str], source: Path) -> tuple[float, float]:
    """Seconds and largest memory in bytes of a process; its input is not in the system's cache."""
    evict(source)
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


def report(options, rows: dict, sizes: dict, limit: float) -> None:
    """The table, and with --save the records."""
    import timing

    copied = statistics.median(seconds for seconds, _ in rows["copy"])
    print(f"limit of memory: {limit / 1e9:.2f} GB")
    for name, runs in rows.items():
        seconds = statistics.median(seconds for seconds, _ in runs)
        memory = max(memory for _, memory in runs)
        record = {
            "size": options.size,
            "conversion": name,
            "seconds": round(seconds, 2),
            "each": [round(seconds, 2) for seconds, _ in runs],
            "over_copy": round(seconds / copied, 3),
            "memory_gb": round(memory / 1e9, 3),
            "limit_gb": round(limit / 1e9, 3),
            "output_gb": round(sizes[name] / 1e9, 3),
        }
        each = " ".join(f"{seconds:.1f}" for seconds, _ in runs)
        print(
            f"{name:20} {seconds:7.2f} s ({each})  {seconds / copied:5.2f} of the copy  "
            f"{memory / 1e9:5.2f} GB of memory"
        )
        if options.save:
            timing.report("conversion_speed", record, save=True)


def stack_bytes(size: str) -> int:
    """Bytes of the largest array of our tree."""
    from mor_jax.convert.names import array_shapes, entries

    cfg = model_of(size)
    shapes = array_shapes(cfg, entries(cfg)).values()
    return max(4 * _product(shape) for shape in shapes)


def _product(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def model_of(size: str):
    """The plain model of a shipped size."""
    from configs import vanilla
    from mor_jax.config import TrainConfig

    return TrainConfig.from_dict(vanilla.get_config(f"size={size}").to_dict()).model


def make(size: str, folder: Path) -> None:
    """A run of random weights, saved as training saves them, without moments."""
    import dataclasses

    import jax
    import numpy as np

    from configs import vanilla
    from mor_jax.checkpoint import Checkpoints
    from mor_jax.config import TrainConfig
    from mor_jax.convert.lazy import Lazy, Spec, nested
    from mor_jax.convert.names import array_shapes, entries
    from mor_jax.workdir import claim_workdir

    cfg = TrainConfig.from_dict(vanilla.get_config(f"size={size}").to_dict())
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, tokenizer="bytes"))
    shapes = array_shapes(cfg.model, entries(cfg.model))
    rng = np.random.default_rng(0)

    def draw(name: str):
        return jax.device_put(rng.standard_normal(shapes[name], np.float32) * np.float32(0.02))

    params = nested(Lazy("random", {name: Spec(shape) for name, shape in shapes.items()}, draw))
    claim_workdir(folder, cfg)
    with Checkpoints(folder, cfg.checkpoint) as checkpoints:
        checkpoints.save(1, {"params": params, "step": jax.numpy.int32(1)}, 0, cfg.to_dict())


if __name__ == "__main__":
    main()
