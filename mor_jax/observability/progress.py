"""Progress of a run: one live line in a terminal, plain lines where output goes to a file.

`Meter` turns step numbers and a clock into tokens per second, utilisation and time left;
`Progress` shows them. Neither touches a device.
"""

import collections
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.live import Live
from rich.text import Text

from mor_jax.observability.number_format import duration, quantity

# Steps over which the rate is averaged: long enough to be steady, short enough to follow changes.
_WINDOW = 50
_BAR = 24


class Meter:
    """Speed of a run, from the times at which its steps were reported.

    The first report starts the clock, so compilation counts neither in the rate nor in the time
    left. Time inside `pause` is excluded as well.
    """

    def __init__(
        self,
        tokens_per_step: int,
        *,
        flops_per_token: float | int | None = None,
        peak_flops: float | int | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        """flops_per_token: forward and backward. peak_flops: per second, of all devices."""
        self._tokens = tokens_per_step
        self._flops, self._peak, self._clock = flops_per_token, peak_flops, clock
        self._paused = 0.0
        self._marks: collections.deque[tuple[int, float]] = collections.deque(maxlen=_WINDOW)

    def tick(self, step: int) -> None:
        """Reports that `step` is done."""
        self._marks.append((step, self._clock() - self._paused))

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Excludes the time spent inside from the rate."""
        start = self._clock()
        try:
            yield
        finally:
            self._paused += self._clock() - start

    @property
    def steps_per_second(self) -> float | None:
        """Rate over the last steps; None before the second report."""
        if len(self._marks) < 2:
            return None
        (first, begin), (last, end) = self._marks[0], self._marks[-1]
        return (last - first) / max(end - begin, 1e-9)

    @property
    def tokens_per_second(self) -> float | None:
        """Of all devices together; None before the second report."""
        rate = self.steps_per_second
        return None if rate is None else rate * self._tokens

    @property
    def mfu(self) -> float | None:
        """Share of the peak that the model's FLOPs reach, 0 .. 1; None if the peak is unknown."""
        rate = self.tokens_per_second
        if rate is None or self._flops is None or self._peak is None:
            return None
        return rate * self._flops / self._peak

    def seconds_left(self, steps: int) -> float | None:
        """Seconds that `steps` more steps take at the current rate."""
        rate = self.steps_per_second
        return steps / rate if rate else None


class Progress:
    """Shows a run. Use it as a context manager: its exit, also by Ctrl-C, restores the terminal.

    In a terminal one line is redrawn in place four times a second and never wraps: parts that do
    not fit are dropped, the least important first. Elsewhere a plain line is printed for the first
    and the last step, and at most every `interval` seconds between.
    """

    def __init__(
        self, steps: int, meter: Meter, *, console: Console | None = None, interval: float | int = 5
    ):
        self._steps, self._meter, self._interval = steps, meter, interval
        self._console = console or Console()
        self._step: int | None = None
        self._label = "compiling"
        self._loss: float | None = None
        self._depths: Sequence[float] = ()
        self._printed = -float("inf")
        self._live = Live(self, console=self._console, refresh_per_second=4, transient=False)

    def __enter__(self) -> "Progress":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._label = ""
        self._live.stop()

    def update(self, step: int, loss: float, depths: Sequence[float] = ()) -> None:
        """Shows `step` (counted from 1) with its loss.

        depths: fraction of tokens that ran exactly 1, 2, ... recursions; they sum to 1.
        """
        self._meter.tick(step)
        self._step, self._loss, self._depths, self._label = step, loss, depths, ""
        now = time.monotonic()
        due = now - self._printed >= self._interval or step >= self._steps
        if due and not self._console.is_terminal:
            self._printed = now
            self.note("  ".join(self._parts()))

    def note(self, text: str) -> None:
        """Prints a line of its own, above the live one."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    @contextlib.contextmanager
    def busy(self, label: str) -> Iterator[None]:
        """Shows `label` while something else than training runs, outside the rate."""
        before, self._label = self._label, label
        try:
            with self._meter.pause():
                yield
        finally:
            self._label = before

    def __rich_console__(self, console: Console, _: object) -> Iterator[Text]:
        """The live line for the width that the terminal has now."""
        width = console.width - 1
        line = ""
        for part in [p for p in (self._label, *self._parts()) if p]:
            if len(line) + len(part) + 2 <= width:
                line = f"{line}  {part}" if line else part
        text = Text(no_wrap=True, overflow="crop")
        if len(line) + 2 + _BAR <= width:
            done = round(_BAR * min((self._step or 0) / max(self._steps, 1), 1.0))
            text.append("━" * done, "green").append("━" * (_BAR - done), "bright_black")
            text.append("  ")
        yield text.append(line)

    def _parts(self) -> list[str]:
        # Most important first: a narrow terminal drops from the end.
        if self._step is None:
            return []
        meter, parts = self._meter, [f"step {self._step}/{self._steps}"]
        if self._loss is not None:
            parts.append(f"loss {self._loss:.4f}")
        if (left := meter.seconds_left(self._steps - self._step)) is not None:
            parts.append(f"ETA {duration(left)}")
        if (rate := meter.tokens_per_second) is not None:
            parts.append(f"{quantity(rate)} tok/s")
        if (mfu := meter.mfu) is not None:
            parts.append(f"MFU {mfu:.1%}")
        if self._depths:
            parts.append(depth_shares(self._depths))
        return parts


def depth_shares(shares: Sequence[float]) -> str:
    """`depth 1:33% 2:33% 3:34%` from the share of tokens at each depth; the sum shows as 100%."""
    whole = [int(100 * share) for share in shares]
    rest = round(100 * sum(shares)) - sum(whole)
    # Largest remainders first, so that rounded shares add up as the shares do.
    order = sorted(range(len(shares)), key=lambda i: whole[i] - 100 * shares[i])
    for i in order[: max(rest, 0)]:
        whole[i] += 1
    return "depth " + " ".join(f"{i}:{share}%" for i, share in enumerate(whole, start=1))
