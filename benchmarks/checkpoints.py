"""What does a checkpoint cost, in which layout, and does host memory stay flat over many?

    python benchmarks/checkpoints.py

Saves states of several sizes in both layouts (all arrays merged into few files, or each in files of
its own) and restores them: how long training waits for a save, how long until it is complete, how
long a restore takes, and files and bytes on disk. Then many saves in a row, with the resident
memory of the process between them. Prints a table and one JSON line.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import timing
from absl import logging

from mor_jax.checkpoint.checkpointer import Checkpointer
from mor_jax.config import CheckpointConfig
from mor_jax.runtime.host_memory import keep_freed_memory

LAYOUTS = {"merged": True, "apart": False}
ARRAYS = 24


def state_of(parameters: int) -> dict:
    """A state of so many float32 parameters in 24 arrays, with two moments each."""
    shape = (max(parameters // ARRAYS // 256, 1), 256)

    def tree(scale: float) -> dict:
        keys = jax.random.split(jax.random.key(0), ARRAYS)
        drawn = [scale * jax.random.normal(key, shape) for key in keys]
        return {f"layer{i}": {"weight": drawn[i]} for i in range(ARRAYS)}

    return {
        "params": tree(0.02),
        "opt_state": {"count": jnp.int32(1), "mu": tree(1e-3), "nu": tree(1e-6)},
        "step": jnp.int32(1),
    }


def measure(parameters: int, layout: str, rounds: int) -> dict:
    """Medians over `rounds` saves and restores, without the first, which loads libraries."""
    state = state_of(parameters)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    waits, saves, restores = [], [], []
    with tempfile.TemporaryDirectory() as directory:
        with Checkpointer(
            directory, CheckpointConfig(max_to_keep=1), merged=LAYOUTS[layout]
        ) as store:
            for step in range(1, rounds + 2):
                start = time.perf_counter()
                store.save(step, state, step, {})
                waits.append(time.perf_counter() - start)
                store.wait()
                saves.append(time.perf_counter() - start)
                start = time.perf_counter()
                jax.block_until_ready(store.restore(shapes).state)
                restores.append(time.perf_counter() - start)
        files = [path for path in Path(directory).rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in files)
    return {
        "parameters": parameters,
        "layout": layout,
        "waited": statistics.median(waits[1:]),
        "complete": statistics.median(saves[1:]),
        "restore": statistics.median(restores[1:]),
        "files": len(files),
        "bytes": size,
    }


def resident() -> int:
    """Bytes of this process in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def memory_over(saves: int, parameters: int) -> list[int]:
    """Resident bytes after the first and each further tenth of `saves` saves in a row."""
    state, found = state_of(parameters), []
    with (
        tempfile.TemporaryDirectory() as directory,
        Checkpointer(directory, CheckpointConfig(max_to_keep=2)) as store,
    ):
        for step in range(1, saves + 1):
            store.save(step, state, step, {})
            store.wait()
            if step == 1 or step % max(saves // 10, 1) == 0:
                found.append(resident())
    return found


def main() -> None:
    """Measures, prints, saves."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--parameters", type=int, nargs="*", default=[10**5, 10**6, 10**7, 5 * 10**7]
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--saves", type=int, default=50, help="in a row, for the memory")
    parser.add_argument("--save", action="store_true", help="append to benchmarks/results/")
    args = parser.parse_args()
    keep_freed_memory()
    # The layout apart makes the storage library wonder, at every save.
    logging.set_verbosity(logging.ERROR)
    # First, since memory that was freed is kept: what came before would hide what it needs.
    memory = memory_over(args.saves, 10**7)
    print(f"resident MiB over {args.saves} saves:", *(f"{m / 2**20:.0f}" for m in memory))
    print(
        f"{'parameters':>10}  {'layout':<7}{'waited':>9}{'complete':>10}{'restore':>9}  files  MiB"
    )
    rows = []
    for parameters in args.parameters:
        for layout in LAYOUTS:
            row = measure(parameters, layout, args.rounds)
            rows.append(row)
            times = "".join(f"{row[k] * 1e3:>6.0f} ms" for k in ("waited", "complete", "restore"))
            size = row["bytes"] / 2**20
            print(f"{parameters:>10,}  {layout:<7}{times}{row['files']:>7}  {size:.1f}", flush=True)
    timing.report(
        "checkpoints", {"layouts": rows, "saves": args.saves, "resident": memory}, args.save
    )


if __name__ == "__main__":
    main()
