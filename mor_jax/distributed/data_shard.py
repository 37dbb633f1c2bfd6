"""Which rows of a batch each process reads: those that its own devices hold.

Usually every process has rows of its own. Where mesh axis `tensor` runs over several processes,
these hold, and read, the same ones.
"""

import jax
import numpy as np
from jax.sharding import Mesh

from mor_jax.config.parsing import check


def reader(mesh: Mesh) -> tuple[int, int]:
    """Which reader this process is, and how many there are. Raises `ValueError` as `share_of`."""
    processes = np.array([device.process_index for device in mesh.devices.flat])
    return share_of(jax.process_index(), processes.reshape(-1, mesh.shape["tensor"]))


def share_of(process: int, holders: np.ndarray) -> tuple[int, int]:
    """Which reader `process` is, and how many there are; readers have equal shares of the rows.

    holders: the process of each device, one line for each row of a batch of as many rows as the
    mesh holds at least, [rows tensor]. Raises `ValueError` if two processes would hold some rows
    in common and others not, or unequal shares.
    """
    held: dict[int, list[int]] = {}
    for row, processes in enumerate(holders):
        for holder in set(processes.tolist()):
            held.setdefault(holder, []).append(row)
    readers = sorted({tuple(part) for part in held.values()})
    rule = "some rows of a batch would lie on parts of several processes"
    fix = "Use a number that divides the devices of a process, or is a multiple of them"
    equal = len({len(part) for part in readers}) == 1
    disjoint = sum(map(len, readers)) == len(holders)
    check(equal and disjoint, "mesh.tensor", holders.shape[1], rule, fix)
    return readers.index(tuple(held[process])), len(readers)
