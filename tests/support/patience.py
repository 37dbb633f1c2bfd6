"""How long tests wait for what has to come.

No test measures how fast a machine is: limits only turn a wait that would never end into a failure.
They are far beyond what a slow machine with other work needs, and cost nothing where all is well.
"""

import time
from collections.abc import Callable
from typing import Any

PATIENCE = 1200.0
"""Seconds that anything may take before a test gives it up for stuck."""


def until(
    ready: Callable[[], Any], every: float = 0.01, seen: Callable[[], str] = lambda: ""
) -> Any:
    """Waits for `ready()` to be true and returns it; else fails with what is `seen()` then."""
    end = time.monotonic() + PATIENCE
    while not (value := ready()):
        assert time.monotonic() < end, f"did not happen within {PATIENCE:g} s\n{seen()}"
        time.sleep(every)
    return value
