"""Live progress of a study: a table that is redrawn, or one line per event."""

import time

from etils import epath
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from mor_jax.config.parsing import check
from mor_jax.runtime import exit_codes
from mor_jax.scaling.runs.collect import peek_progress, progress
from mor_jax.scaling.runs.local import Event
from mor_jax.scaling.runs.show import flops_left, remaining, status_table
from mor_jax.scaling.study.manifest import Manifest

_REDRAW = 2.0


class Watch:
    """Context manager that shows the table on a terminal, elsewhere one line per event.

    A thread draws the table. It records no results; the process that runs the study does.
    """

    def __init__(self, study: epath.PathLike, manifest: Manifest, console: Console):
        self._study, self._manifest, self._console = study, manifest, console
        self._began = time.monotonic()
        self._rest = self._first = flops_left(peek_progress(study, manifest))
        self._last = ""
        self._live: Live | None = None

    def __enter__(self) -> "Watch":
        if self._console.is_terminal:
            often = 1 / _REDRAW
            self._live = Live(
                console=self._console, get_renderable=self._draw, refresh_per_second=often
            )
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
        else:
            self._console.print(
                status_table(peek_progress(self._study, self._manifest), self._name)
            )

    def tell(self, event: Event) -> None:
        """Shows an event."""
        self._last = f"{time.strftime('%H:%M:%S')} {event.kind} {event.run.name}: {event.text}"
        if event.kind == "done":
            self._rest = flops_left(peek_progress(self._study, self._manifest))
            self._last += self._to_go()
        if self._live is None:
            print(self._last, flush=True)

    @property
    def _name(self) -> str:
        return self._manifest.study

    def _to_go(self) -> str:
        seconds = time.monotonic() - self._began
        return remaining(seconds, self._first - self._rest, self._rest)

    def _draw(self) -> Group:
        found = peek_progress(self._study, self._manifest)
        self._rest = flops_left(found)
        table = status_table(found, f"{self._name}{self._to_go()}")
        return Group(table, Text(self._last))


def show_status(
    study: epath.PathLike, manifest: Manifest, console: Console, every: float | None
) -> int:
    """Prints the table once, or every `every` seconds until all runs are done.

    Returns an exit code. Raises `ValueError` for `every` out of range, or as `progress`.
    """
    rule = "must be seconds in [0.1, 86400]"
    check(every is None or 0.1 <= every <= 86400, "watch", every, rule, "Try 30")
    while True:
        found = progress(study, manifest)
        console.print(status_table(found, manifest.study))
        for each in found:
            if each.problem:
                console.print(f"failed: {each.run.name}: {each.problem}")
        print(f"{flops_left(found):.3g} training FLOPs left", flush=True)
        if every is None or all(each.state == "done" for each in found):
            return exit_codes.OK
        time.sleep(every)
