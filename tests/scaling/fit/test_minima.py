"""Minima with their intervals and warnings, the lowest runs, and gaps between architectures."""

import dataclasses
import math

import numpy as np
import pytest
from support.loss_groups import loss_group

from mor_jax.scaling.fit.minima import best_of, gaps, minimum
from mor_jax.scaling.fit.parabola import parabola
from mor_jax.scaling.fit.power_law import BootstrapDraws

SIZES, BEST = (5e6, 1e7, 3e7, 9e7), 2e7


def group(depth=3.0, budget=1e18, name="plain", **changes):
    """A parabola in ln N with its lowest point at `BEST` and `depth`."""
    return loss_group(
        SIZES, lambda size, _: depth + 0.1 * math.log(size / BEST) ** 2, budget, name, **changes
    )


def draws(loss, found=1.0, count=101):
    """Sizes and tokens spread by a tenth about the truth, evenly, and losses about `loss`."""
    spread = np.linspace(-0.1, 0.1, count)
    logs = math.log(BEST) + spread
    return BootstrapDraws(logs, math.log(1e18 / (6 * BEST)) - spread, loss + spread, found)


def test_a_minimum_without_draws_has_no_intervals():
    found = minimum(parabola(group(runs=2)), None, 0.9)
    assert (found.architecture, found.budget, found.sizes, found.runs) == ("plain", 1e18, 4, 8)
    assert found.parameters == pytest.approx(BEST) and found.loss == pytest.approx(3.0)
    assert found.tokens == pytest.approx(1e18 / (6 * BEST))
    intervals = (found.parameters_interval, found.tokens_interval, found.loss_interval)
    assert intervals == (None, None, None) and found.found is None and found.warning is None
    x = math.log(1e8) - found.centre
    c0, c1, c2 = found.coefficients
    assert c0 + c1 * x + c2 * x * x == pytest.approx(3.0 + 0.1 * math.log(1e8 / BEST) ** 2)


def test_intervals_hold_the_middle_of_the_draws():
    found = minimum(parabola(group()), draws(3.0), 0.8)
    # Of evenly spread draws between -0.1 and 0.1 the middle 80 % lie between -0.08 and 0.08.
    ends = np.array([math.exp(-0.08), math.exp(0.08)])
    assert found.parameters_interval == pytest.approx(tuple(BEST * ends))
    assert found.tokens_interval == pytest.approx(tuple(1e18 / (6 * BEST) * ends))
    assert found.loss_interval == pytest.approx((2.92, 3.08))


@pytest.mark.parametrize(("share", "warned"), [(0.9, False), (0.6, True)])
def test_resamples_without_a_minimum_are_warned_of(share, warned):
    found = minimum(parabola(group()), draws(3.0, share), 0.9)
    text = "only 60% of the resamples have a minimum inside" if warned else None
    assert found.found == share and found.warning == text


def test_both_warnings_stand_side_by_side():
    one = loss_group((1.8e7, 4e7, 9e7), lambda size, _: math.log(size / BEST) ** 2)
    found = minimum(parabola(one), draws(3.0, 0.5), 0.9)
    assert found.warning == (
        "the lowest loss is at the smallest size; only 50% of the resamples have a minimum inside"
    )


def test_the_best_run_is_the_one_of_the_lowest_mean_loss():
    found = best_of(group(runs=3, spread=0.02))
    # 1e7 lies ln 2 from the best size, 3e7 ln 1.5.
    assert (found.size, found.parameters, found.runs, found.spread) == ("s2", 3e7, 3, 0.02)
    assert found.loss == pytest.approx(3.0 + 0.1 * math.log(1.5) ** 2)


def pairs_of(*members):
    """Best runs, and parabolas with draws, of groups with their draws."""
    best = [best_of(one) for one, _ in members]
    return best, [(parabola(one), drawn) for one, drawn in members]


def test_gaps_are_those_to_the_baseline_of_the_same_budget():
    best, pairs = pairs_of(
        (group(3.0, 1e18), None),
        (group(2.5, 1e19), None),
        (group(2.9, 1e18, "mor"), None),
        (group(2.6, 1e19, "mor"), None),
        (group(2.0, 1e20, "mor"), None),
    )
    found = gaps(best, pairs, "plain", (None, np.random.default_rng(0), 0.9))
    assert [(gap.architecture, gap.budget) for gap in found] == [("mor", 1e18), ("mor", 1e19)]
    for gap, want in zip(found, (-0.1, 0.1), strict=True):
        assert gap.at_minima == pytest.approx(want) and gap.of_runs == pytest.approx(want)
        assert gap.minima_interval is None and gap.runs_interval is None


def test_intervals_of_gaps_come_from_the_differences_of_the_draws():
    still = dataclasses.replace(draws(2.9), loss=np.full(101, 2.9))
    best, pairs = pairs_of((group(3.0), draws(3.0)), (group(2.9, name="mor"), still))
    (gap,) = gaps(best, pairs, "plain", (None, np.random.default_rng(0), 0.8))
    assert gap.minima_interval == pytest.approx((-0.18, -0.02))
    # What two architectures share moves neither: draws that move together leave no interval.
    best, pairs = pairs_of((group(3.0), draws(3.0)), (group(2.9, name="mor"), draws(2.9)))
    (gap,) = gaps(best, pairs, "plain", (None, np.random.default_rng(0), 0.8))
    assert gap.minima_interval == pytest.approx((-0.1, -0.1))


def test_the_interval_of_two_runs_follows_from_the_noise_and_their_number():
    best, pairs = pairs_of((group(3.0, runs=4), None), (group(2.9, name="mor", runs=1), None))
    noise = np.full(40_000, 0.02)
    (gap,) = gaps(best, pairs, "plain", (noise, np.random.default_rng(0), 0.9))
    # The standard normal's 95 % point, and the deviation of a run less a mean of four.
    half = 1.645 * 0.02 * math.sqrt(1 + 1 / 4)
    assert gap.runs_interval == pytest.approx((-0.1 - half, -0.1 + half), abs=0.001)


def test_a_refused_parabola_leaves_the_gap_of_the_runs():
    best, pairs = pairs_of((group(3.0), None), (group(2.9, name="mor"), None))
    (gap,) = gaps(best, pairs[:1], "plain", (None, np.random.default_rng(0), 0.9))
    assert gap.at_minima is None and gap.minima_interval is None
    assert gap.of_runs == pytest.approx(-0.1)
