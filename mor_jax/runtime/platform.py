"""Which devices JAX need not look for. Imports nothing heavy, so that it can come before JAX."""

import os
import sys
from pathlib import Path

# TPUs, NVIDIA GPUs (the last one under Windows), AMD GPUs.
_DEVICES = ("accel*", "vfio/[0-9]*", "nvidia*", "dxg", "kfd")


def skip_absent(devices: Path = Path("/dev")) -> None:
    """Keeps JAX to the CPU where there is no device file of an accelerator.

    Otherwise libtpu, which a plan for a pod needs installed, looks for its TPU and complains at
    length. What JAX_PLATFORMS says goes first. To be called before JAX looks for its devices.
    """
    if sys.platform != "linux" or os.environ.get("JAX_PLATFORMS"):
        return
    if not any(found for pattern in _DEVICES for found in devices.glob(pattern)):
        os.environ["JAX_PLATFORMS"] = "cpu"
        if "jax" in sys.modules:
            # It has read the environment already.
            sys.modules["jax"].config.update("jax_platforms", "cpu")
