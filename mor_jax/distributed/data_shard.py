"""The data-parallel rank of each process: it reads the sequences that its devices hold.

Usually every process reads different sequences. If the mesh axis `tensor` spans several processes,
these hold, and read, the same ones.
"""

import jax
import numpy as np
from jax.sharding import Mesh

from mor_jax.config.parsing import check


def data_parallel_rank(mesh: Mesh) -> tuple[int, int]:
    """Rank of this process and number of ranks. Raises `ValueError` as `rank_of` does."""
    processes = np.array([device.process_index for device in mesh.devices.flat])
    return rank_of(jax.process_index(), processes.reshape(-1, mesh.shape["tensor"]))


def rank_of(process: int, holders: np.ndarray) -> tuple[int, int]:
    """Data-parallel rank of `process` and number of ranks; all ranks read equally many sequences.

    holders: the process of each device, [sequences tensor], for the smallest batch of the mesh.
    Raises `ValueError` if two processes would share some of their sequences but not all, or hold
    different numbers of them.
    """
    by_process: dict[int, list[int]] = {}
    for sequence, processes in enumerate(holders):
        for holder in set(processes.tolist()):
            by_process.setdefault(holder, []).append(sequence)
    ranks = sorted({tuple(sequences) for sequences in by_process.values()})
    rule = "some sequences of a batch would be split over several processes"
    fix = "Use a divisor of the number of devices per process, or a multiple of it"
    equal = len({len(sequences) for sequences in ranks}) == 1
    disjoint = sum(map(len, ranks)) == len(holders)
    check(equal and disjoint, "mesh.tensor", holders.shape[1], rule, fix)
    return ranks.index(tuple(by_process[process])), len(ranks)
