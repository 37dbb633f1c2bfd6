"""The progress line: numbers, widths, plain output, interruption."""

import io

import pytest
from rich.console import Console

from mor_jax.observability.number_format import duration, quantity
from mor_jax.observability.progress import Meter, Progress, depth_shares


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def console(width=100, terminal=True):
    return Console(file=io.StringIO(), force_terminal=terminal, width=width, color_system=None)


def metered(clock, **peaks):
    """A meter that saw steps 1 to 5 at one step in two seconds."""
    meter = Meter(1000, clock=clock, **peaks)
    for step in range(1, 6):
        meter.tick(step)
        clock.now += 2.0
    clock.now -= 2.0
    return meter


def drawn(progress, width):
    screen = console(width)
    screen.print(progress)
    return screen.file.getvalue().rstrip("\n")


def test_rates_come_from_the_steps_between_reports():
    meter = metered(Clock(), flops_per_token=3e6, peak_flops=1e10)
    assert meter.steps_per_second == pytest.approx(0.5)
    assert meter.tokens_per_second == pytest.approx(500.0)
    assert meter.mfu == pytest.approx(500.0 * 3e6 / 1e10)
    assert meter.seconds_left(30) == pytest.approx(60.0)


def test_nothing_is_claimed_before_it_is_known():
    meter = Meter(1000, clock=Clock())
    meter.tick(1)
    assert meter.tokens_per_second is None and meter.seconds_left(9) is None
    assert metered(Clock()).mfu is None


def test_pauses_do_not_slow_the_rate():
    clock = Clock()
    meter = metered(clock)
    with meter.pause():
        clock.now += 1000.0
    clock.now += 2.0
    meter.tick(6)
    assert meter.tokens_per_second == pytest.approx(500.0)


def test_rate_follows_the_last_fifty_steps():
    clock = Clock()
    meter = metered(clock)
    for step in range(6, 80):
        clock.now += 0.5
        meter.tick(step)
    assert meter.steps_per_second == pytest.approx(2.0)


def test_the_line_says_everything_where_there_is_room():
    clock = Clock()
    progress = Progress(
        100, metered(clock, flops_per_token=1e6, peak_flops=1e9), console=console(200)
    )
    clock.now += 2.0
    progress.update(6, 4.25, (1 / 3, 1 / 3, 1 / 3))
    line = drawn(progress, 200)
    for part in ("step 6/100", "loss 4.2500", "500 tok/s", "MFU 50.0%", "ETA 3m08s"):
        assert part in line
    assert line.rstrip().endswith("depth 1:34% 2:33% 3:33%")


@pytest.mark.parametrize("width", [12, 20, 31, 40, 60, 79, 80, 120])
def test_the_line_never_wraps_and_keeps_the_step(width):
    clock = Clock()
    progress = Progress(100000, metered(clock), console=console(width))
    progress.update(99999, 4.25, (0.125, 0.125, 0.25, 0.5))
    line = drawn(progress, width)
    assert "\n" not in line and len(line) < width
    assert ("step 99999/100000" in line) == (width > 18)
    assert ("depth" in line) == (width > 90)


def test_the_label_stands_in_for_the_first_step_and_for_what_interrupts_training():
    progress = Progress(10, Meter(8, clock=Clock()), console=console())
    assert "compiling" in drawn(progress, 80)
    progress.update(1, 2.0)
    assert "compiling" not in drawn(progress, 80)
    with progress.busy("evaluating"):
        assert "evaluating" in drawn(progress, 80) and "step 1/10" in drawn(progress, 80)
    assert "evaluating" not in drawn(progress, 80)


def test_plain_lines_where_there_is_no_terminal():
    screen = console(terminal=False)
    with Progress(50, Meter(8), console=screen, interval=1e9) as progress:
        for step in range(1, 51):
            progress.update(step, 5.0 - step / 50)
        progress.note("[held out] loss 4.5")
    first, last, note = screen.file.getvalue().splitlines()
    assert first == "step 1/50  loss 4.9800"
    assert last.startswith("step 50/50  loss 4.0000  ETA 0s") and last.endswith("tok/s")
    assert note == "[held out] loss 4.5"
    assert "\x1b" not in screen.file.getvalue() and "\r" not in screen.file.getvalue()


def test_plain_lines_come_at_intervals():
    screen = console(terminal=False)
    with Progress(50, Meter(8), console=screen, interval=0.0) as progress:
        for step in (1, 2, 3):
            progress.update(step, 1.0)
    assert len(screen.file.getvalue().splitlines()) == 3


def test_an_interruption_passes_through_and_restores_the_terminal():
    screen = console()
    with pytest.raises(KeyboardInterrupt), Progress(9, Meter(8), console=screen) as progress:
        progress.update(3, 1.5)
        raise KeyboardInterrupt
    hide, show = "\x1b[?25l", "\x1b[?25h"
    output = screen.file.getvalue()
    assert output.rfind(show) > output.rfind(hide) >= 0
    assert "step 3/9  loss 1.5000" in output


@pytest.mark.parametrize(
    ("shares", "text"),
    [
        ((1 / 3, 1 / 3, 1 / 3), "depth 1:34% 2:33% 3:33%"),
        ((0.005, 0.995), "depth 1:1% 2:99%"),
        ((0.0, 1.0), "depth 1:0% 2:100%"),
        ((0.25, 0.25), "depth 1:25% 2:25%"),
    ],
)
def test_depth_shares_add_up(shares, text):
    assert depth_shares(shares) == text


def test_quantities_and_durations():
    assert [quantity(v) for v in (0.5, 999.4, 999.9, 12345, 999950, 4.56e6, 2e13)] == [
        *("0.5", "999", "1k", "12.3k", "1M", "4.56M", "20T")
    ]
    assert [duration(s) for s in (0.2, 45, 59.7, 200, 7500, 273600)] == [
        *("0s", "45s", "1m00s", "3m20s", "2h05m", "3d04h")
    ]
