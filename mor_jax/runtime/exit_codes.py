"""Exit codes of all commands: what a scheduler may read from them. docs/faults.md explains them.

Anything else (a negative code, 137, 139) means that the process was killed or crashed: the same
command goes on from the newest good checkpoint.
"""

import errno

OK = 0
ERROR = 1
"""Something went wrong under way, such as a disk that is full; the message says what."""
REFUSED = 2
"""A setting, the data or the directory does not fit; the message says what, nothing was changed."""
STOPPED = 75
"""Ended on a signal, everything worth saving saved: run the same command again."""
HOST_LOST = 76
"""Another process of the run died or hung: run the same command again."""
DIVERGED = 77
"""Steps were not finite again after the one rollback: a person has to look, do not requeue."""


_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EIO}


def of(error: BaseException) -> int:
    """The code to end with after `error`, that which it carries itself if it does.

    A `ValueError` that tells of a full or failing disk is no refusal.
    """
    code = getattr(error, "code", None)
    if isinstance(code, int):
        return code
    behind = error.__cause__ or error.__context__
    if isinstance(behind, OSError) and behind.errno in _DISK:
        return ERROR
    return REFUSED if isinstance(error, ValueError) else ERROR
