"""Exit codes of all commands, for schedulers. docs/faults.md explains them.

Any other code (negative, 137, 139) means that the process was killed or crashed: the same command
resumes from the newest valid checkpoint.
"""

import errno

OK = 0
ERROR = 1
"""A failure at run time, such as a full disk; see the message."""
REFUSED = 2
"""Invalid settings, data or directory; see the message. Nothing was changed."""
STOPPED = 75
"""Stopped by a signal after saving: run the same command again to resume."""
HOST_LOST = 76
"""Another process of the run died or hung: run the same command again."""
DIVERGED = 77
"""Non-finite steps again after the one rollback: needs inspection, do not requeue."""


_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EIO}


def of(error: BaseException) -> int:
    """The exit code for `error`: its own attribute `code` if it has one.

    A `ValueError` caused by a full or failing disk gives `ERROR`, not `REFUSED`.
    """
    code = getattr(error, "code", None)
    if isinstance(code, int):
        return code
    cause = error.__cause__ or error.__context__
    if isinstance(cause, OSError) and cause.errno in _DISK:
        return ERROR
    return REFUSED if isinstance(error, ValueError) else ERROR
