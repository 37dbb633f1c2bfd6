"""Counts of records that reading a source skipped or repaired, logged once with the first place."""

import dataclasses
import logging

_log = logging.getLogger(__name__)

EMPTY = "documents without text (empty or null), skipped: {documents}"
NUL = "NUL characters, removed: {count} (documents: {documents})"
SURROGATE = "unpaired surrogates, replaced by U+FFFD: {count} (documents: {documents})"


@dataclasses.dataclass
class _Count:
    first: str
    count: int = 0
    documents: int = 0


class SkippedRecords:
    """Counts of one pass over a source, by problem."""

    def __init__(self) -> None:
        self._counts: dict[str, _Count] = {}

    def add(self, problem: str, where: str, count: int = 1) -> None:
        """Counts one more document, at `where`, with `count` occurrences of `problem`."""
        at = self._counts.setdefault(problem, _Count(where))
        at.count += count
        at.documents += 1

    def log_warnings(self, setting: str, spec: str, logged: set[str]) -> None:
        """Logs a warning for each problem, unless `logged` already holds the line; extends it."""
        for problem, at in self._counts.items():
            counts = problem.format(count=f"{at.count:,}", documents=f"{at.documents:,}")
            line = f"{setting}={spec!r}: {counts}. The first is {at.first}"
            if line not in logged:
                logged.add(line)
                _log.warning("%s", line)
