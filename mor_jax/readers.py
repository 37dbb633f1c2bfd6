"""Which rows of a batch each process reads: those that its own devices hold.

Usually every process has rows of its own. Where mesh axis `tensor` runs over several processes,
these hold, and read, the same ones.
"""

import jax
import numpy as np
from jax.sharding import Mesh

from mor_jax.config import check


def reader(mesh: Mesh, process: int | None = None) -> tuple[int, int]:
    """Which reader `process` (default: this one) is, and how many there are.

    Readers have equal shares of the rows. Raises `ValueError` if two processes would hold some
    rows in common and others not, or unequal shares.
    """
    process = jax.process_index() if process is None else process
    rows = np.vectorize(lambda device: device.process_index)(mesh.devices)
    rows = rows.reshape(-1, mesh.shape["tensor"])
    held: dict[int, list[int]] = {}
    for row, processes in enumerate(rows):
        for holder in set(processes.tolist()):
            held.setdefault(holder, []).append(row)
    readers = sorted({tuple(part) for part in held.values()})
    rule = "some rows of a batch would lie on parts of several processes"
    fix = "Use a number that divides the devices of a process, or is a multiple of them"
    disjoint = sum(map(len, readers)) == len(rows) and len({len(part) for part in readers}) == 1
    check(disjoint, "mesh.tensor", mesh.shape["tensor"], rule, fix)
    return readers.index(tuple(held[process])), len(readers)
