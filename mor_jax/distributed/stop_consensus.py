"""How all processes of a run learn in the same step that one of them was asked to end."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


class StopConsensus:
    """`number -> the largest number of any process`, one call late.

    Every process calls it equally often, once a step. The numbers meet in a maximum over all
    devices that runs beside the step and is read in the next call, so that nobody waits for it. A
    single process needs no agreement: it gets its own number back at once.
    """

    def __init__(self, mesh: Mesh, *, several: bool | None = None):
        """several: whether to go over the devices; by default where there are more processes."""
        self._several = jax.process_count() > 1 if several is None else several
        self._cut = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._max = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._asked: Any = None

    def __call__(self, number: int) -> int:
        """The largest number given in the call before, by any process; 0 in the first call."""
        if not self._several:
            return number
        mine = np.full(len(self._cut.addressable_devices), number, np.int32)
        shape = (self._cut.mesh.size,)
        largest = self._max(jax.make_array_from_process_local_data(self._cut, mine, shape))
        asked, self._asked = self._asked, largest
        return 0 if asked is None else int(asked)
