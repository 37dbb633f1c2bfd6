"""Parts of the arrays of a checkpoint, read without restoring any of them whole.

`checkpoint` writes arrays as zarr in one key-value store (OCDBT) and cuts large stacks between
their layers, so one layer costs one layer. Made for conversions: nothing here needs the devices,
the processes or the sharding that the checkpoint was written with.
"""

import threading
from typing import Any

import numpy as np
from etils import epath

from mor_jax.config.parsing import fail


class PartialRestore:
    """Reads from the `arrays` directory of one checkpoint; several threads may."""

    def __init__(self, arrays: epath.Path):
        self._arrays = arrays
        self._opened: dict[str, Any] = {}
        self._lock = threading.Lock()

    def read(self, name: str, index: tuple[int, ...] = ()) -> np.ndarray:
        """The part at `index` of the leading axes of parameter `name` (dotted path).

        Raises `ValueError` if it cannot be read.
        """
        try:
            with self._lock:
                if name not in self._opened:
                    self._opened[name] = self._open(name)
            return self._opened[name][index].read(order="C").result()
        except ValueError as error:
            # The storage library puts every failure into this one type, with a page of detail.
            reason = str(error).splitlines()[0][:200]
            rule = f"parameter {name} cannot be read ({reason})"
            fail("checkpoint", str(self._arrays), rule, "Take another --step, or start again")

    def _open(self, name: str) -> Any:
        # Loading it takes a while: only conversions pay.
        import tensorstore

        # What was read is not read again: a cache would only grow.
        context = tensorstore.Context({"cache_pool": {"total_bytes_limit": 0}})
        where = str(self._arrays / "state")
        base = where if "://" in where else f"file://{where}"
        kvstore = {"driver": "ocdbt", "base": f"{base}/", "path": f"params.{name}/"}
        spec = {"driver": "zarr3", "kvstore": kvstore}
        return tensorstore.open(spec, context=context, read=True, open=True).result()
