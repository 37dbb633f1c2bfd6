"""Selects JAX's CPU platform on machines without an accelerator. Does not import JAX."""

import os
import sys
from pathlib import Path

# TPUs, NVIDIA GPUs (the last one under Windows Subsystem for Linux), AMD GPUs.
_DEVICES = ("accel*", "vfio/[0-9]*", "nvidia*", "dxg", "kfd")


def use_cpu_without_accelerator(devices: Path = Path("/dev")) -> None:
    """Restricts JAX to the CPU if no device file of an accelerator exists.

    Otherwise libtpu, which pod planning requires, searches for a TPU and prints long warnings.
    JAX_PLATFORMS takes precedence. Call it before JAX initialises its devices.
    """
    if sys.platform != "linux" or os.environ.get("JAX_PLATFORMS"):
        return
    if not any(found for pattern in _DEVICES for found in devices.glob(pattern)):
        os.environ["JAX_PLATFORMS"] = "cpu"
        if "jax" in sys.modules:
            # An imported JAX has already read the environment.
            sys.modules["jax"].config.update("jax_platforms", "cpu")
