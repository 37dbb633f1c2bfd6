"""Reads slices of a checkpoint's arrays without restoring whole arrays; used by conversions.

`Checkpointer` writes arrays as zarr in one key-value store (OCDBT) with one chunk per layer of a
large stack, so reading one layer reads only its bytes. Independent of the devices, processes and
sharding that wrote the checkpoint.
"""

import threading
from typing import Any

import numpy as np
from etils import epath

from mor_jax.config.parsing import fail


class PartialRestore:
    """Reads from the `arrays` directory of one checkpoint; thread-safe."""

    def __init__(self, arrays: epath.Path):
        self._arrays = arrays
        self._opened: dict[str, Any] = {}
        self._lock = threading.Lock()

    def read(self, name: str, index: tuple[int, ...] = ()) -> np.ndarray:
        """The slice at `index` of the leading axes of parameter `name` (dotted path).

        Raises `ValueError` if it cannot be read.
        """
        try:
            with self._lock:
                if name not in self._opened:
                    self._opened[name] = self._open(name)
            return self._opened[name][index].read(order="C").result()
        except ValueError as error:
            # The storage library raises this type for every failure, with a page of detail.
            reason = str(error).splitlines()[0][:200]
            rule = f"parameter {name} cannot be read ({reason})"
            fail("checkpoint", str(self._arrays), rule, "Choose another --step, or try again")

    def _open(self, name: str) -> Any:
        # Slow to import, and only conversions need it.
        import tensorstore

        # Nothing is read twice, so a cache would only take memory.
        context = tensorstore.Context({"cache_pool": {"total_bytes_limit": 0}})
        path = str(self._arrays / "state")
        base = path if "://" in path else f"file://{path}"
        kvstore = {"driver": "ocdbt", "base": f"{base}/", "path": f"params.{name}/"}
        spec = {"driver": "zarr3", "kvstore": kvstore}
        return tensorstore.open(spec, context=context, read=True, open=True).result()
