"""One process of test_multiprocess.py: joins the others, then trains run after run.

    python tests/support/fit_worker.py RUNS.json PORT PROCESSES PROCESS

RUNS.json: a list of [workdir, configuration as a dictionary]. Writes the rows that it read of each
run's corpus, in order, to WORKDIR.rows.PROCESS.json.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mor_jax.config import TrainConfig
from mor_jax.data.streams.packing import PackedSequences
from mor_jax.distributed import initialize
from mor_jax.training.trainer import fit


def record_rows() -> list[tuple[int, int]]:
    """From now on: (rows in the split, number of the row) of every row that is read."""
    read: list[tuple[int, int]] = []
    real = PackedSequences.__getitem__

    def get(self: PackedSequences, index: int):
        read.append((len(self), int(index)))
        return real(self, index)

    PackedSequences.__getitem__ = get
    return read


def as_config(values: dict) -> TrainConfig:
    """JSON has no tuples, settings have no lists."""

    def restore(value):
        if isinstance(value, dict):
            return {key: restore(member) for key, member in value.items()}
        return tuple(map(restore, value)) if isinstance(value, list) else value

    return TrainConfig.from_dict(restore(values))


def main() -> None:
    runs, port, processes, process = sys.argv[1:]
    initialize.initialize(f"127.0.0.1:{port}", int(processes), int(process))
    read = record_rows()
    for workdir, values in json.loads(Path(runs).read_text()):
        read.clear()
        fit(as_config(values), workdir)
        Path(f"{workdir}.rows.{process}.json").write_text(json.dumps(read))
    initialize.shutdown()


if __name__ == "__main__":
    main()
