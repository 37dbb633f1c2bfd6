"""Keeps freed memory in the process: the CPU backend reallocates large buffers in every step.

By default glibc returns freed blocks larger than 32 MB to the system, so each step has to map and
clear every page of its activations again, which can take longer than the arithmetic on them.
"""

import ctypes
import sys

# Parameters of mallopt(3).
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -3, -4, -8
_LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Makes glibc keep freed blocks for reuse; returns False if there is no glibc.

    Works best before the first array exists. Does not change peak memory.
    """
    return _set((_TRIM_THRESHOLD, _LARGEST), (_MMAP_THRESHOLD, _LARGEST))


def share_freed_memory() -> bool:
    """As `keep_freed_memory`, for threads that pass large blocks to each other.

    All blocks come from a single arena, without separate mappings. Call it before any thread is
    started.
    """
    return _set((_TRIM_THRESHOLD, _LARGEST), (_MMAP_MAX, 0), (_ARENA_MAX, 1))


def _set(*settings: tuple[int, int]) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return False
    return all([libc.mallopt(name, value) == 1 for name, value in settings])
