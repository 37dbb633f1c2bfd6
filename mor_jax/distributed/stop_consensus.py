"""Lets all processes of a run stop in the same step when one of them receives a signal."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


class StopConsensus:
    """`number -> maximum over all processes`, one call late.

    Every process calls it once per step. The maximum over all devices is computed asynchronously
    with the step and read in the next call, so no process waits for it. A single process gets its
    own number back at once.
    """

    def __init__(self, mesh: Mesh, *, several: bool | None = None):
        """several: whether to compute over the devices; default: with several processes."""
        self._multiprocess = jax.process_count() > 1 if several is None else several
        self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._max = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._previous: Any = None

    def __call__(self, number: int) -> int:
        """The largest number of the previous call, of any process; 0 in the first call."""
        if not self._multiprocess:
            return number
        mine = np.full(len(self._sharding.addressable_devices), number, np.int32)
        shape = (self._sharding.mesh.size,)
        largest = self._max(jax.make_array_from_process_local_data(self._sharding, mine, shape))
        previous, self._previous = self._previous, largest
        return 0 if previous is None else int(previous)
