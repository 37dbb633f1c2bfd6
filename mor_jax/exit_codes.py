"""Exit codes of a training run: what a scheduler may read from them. docs/faults.md explains them.

Anything else (a negative code, 137, 139) means that the process was killed or crashed: the same
command goes on from the newest good checkpoint.
"""

OK = 0
ERROR = 1
"""Something is wrong with a setting, the data, the directory or a disk; the message says what."""
STOPPED = 75
"""Ended on a signal, everything worth saving saved: run the same command again."""
HOST_LOST = 76
"""Another process of the run died or hung: run the same command again."""
DIVERGED = 77
"""Steps were not finite again after the one rollback: a person has to look, do not requeue."""
