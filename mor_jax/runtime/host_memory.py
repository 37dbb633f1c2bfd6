"""Keeping freed memory: the CPU backend allocates large buffers anew in every step.

By default glibc returns blocks beyond 32 MB to the system when they are freed, and each step then
pays for mapping and clearing every page of its activations again, which can take longer than the
arithmetic on them.
"""

import ctypes
import sys

# Options of mallopt(3): when to give memory back, what to map by itself and how often, and how many
# pools threads have.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -3, -4, -8
_LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Tells glibc to keep freed blocks for reuse; False where there is no glibc.

    Works best before the first array exists. Peak memory stays what it was.
    """
    return _set((_TRIM_THRESHOLD, _LARGEST), (_MMAP_THRESHOLD, _LARGEST))


def share_freed_memory() -> bool:
    """The same for threads that hand large blocks to each other; False where there is no glibc.

    Every block comes from one pool, which nothing is mapped beside. Call it before any thread is
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
