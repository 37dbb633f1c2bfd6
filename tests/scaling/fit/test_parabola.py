"""Parabolas of loss in ln N: exact ones come back, others are refused with what would help."""

import dataclasses
import math

import numpy as np
import pytest
from support.loss_groups import loss_group

from mor_jax.scaling.fit.parabola import FitRefused, Parabola, groups, parabola
from mor_jax.scaling.runs.points import Point

BEST, DEPTH, BEND = 2e7, 3.1, 0.05
SIZES = (5e6, 1e7, 3e7, 9e7)


def curve(size, tokens=None):
    """A parabola in ln N whose lowest point is known."""
    return DEPTH + BEND * math.log(size / BEST) ** 2


def point(size, budget=1e18, name="plain", seed=0, **changes):
    values = {
        "run": f"{name}-{size}-{budget}-{seed}",
        "architecture": name,
        "size": f"w{size:.0f}",
        "budget": budget,
        "seed": seed,
        "unique": int(size),
        "effective": 3 * int(size),
        "tokens": int(budget / (6 * size)),
        "flops": budget,
        "flops_per_token": 6.0 * size,
        "loss_causal": curve(size),
    }
    return Point(**(values | changes))


def test_runs_are_grouped_by_architecture_then_budget_with_sizes_rising():
    points = [
        point(4e6, 1e18, "mor"),
        point(2e6, 1e18, "mor"),
        point(2e6, 1e17, "plain"),
        point(8e6, 1e17, "mor"),
        point(1e6, 1e17, "mor"),
    ]
    found = groups(points, "causal", "unique")
    # Architectures in the order of their first runs.
    assert [(one.architecture, one.budget) for one in found] == [
        ("mor", 1e17),
        ("mor", 1e18),
        ("plain", 1e17),
    ]
    sizes = [[cell.parameters for cell in one.cells] for one in found]
    assert sizes == [[1e6, 8e6], [2e6, 4e6], [2e6]]


def test_seeds_of_a_size_become_one_cell():
    points = [
        point(2e6, seed=seed, loss_causal=loss, loss_topk=loss - 1, flops=flops, tokens=tokens)
        for seed, (loss, flops, tokens) in enumerate(
            [(3.0, 1e18, 10), (3.5, 2e18, 20), (4.0, 3e18, 60)]
        )
    ]
    (cell,) = groups(points, "causal", "effective")[0].cells
    assert (cell.size, cell.parameters, cell.runs) == ("w2000000", 6e6, 3)
    assert (cell.loss, cell.flops, cell.tokens) == (3.5, 2e18, 30)
    # Of 3, 3.5 and 4: squares of 1/4 twice, over two degrees of freedom.
    assert cell.spread == pytest.approx(0.5)
    (trained,) = groups(points, "topk", "unique")[0].cells
    assert (trained.loss, trained.parameters) == (2.5, 2e6)
    (alone,) = groups(points[:1], "causal", "unique")[0].cells
    assert alone.spread is None


def test_tokens_follow_flops_per_token_between_the_sizes_and_beyond():
    one = loss_group((1e6, 1e8), curve, budget=1e18)
    # FLOPs per token of 100 N^0.5 at the two sizes: on a straight line of the logs.
    cells = tuple(
        dataclasses.replace(cell, flops_per_token=100 * cell.parameters**0.5) for cell in one.cells
    )
    one = dataclasses.replace(one, cells=cells)
    sizes = np.array([[1e5, 1e6], [1e7, 1e9]])
    want = np.log(1e18 / (100 * sizes**0.5))
    np.testing.assert_allclose(one.log_tokens(np.log(sizes)), want, rtol=1e-12)


@pytest.mark.parametrize("count", [3, 4])
def test_the_lowest_point_of_an_exact_parabola_comes_back(count):
    fitted = parabola(loss_group(SIZES[:count], curve))
    assert isinstance(fitted, Parabola)
    assert math.exp(fitted.lowest) == pytest.approx(BEST, rel=1e-9)
    assert fitted.loss == pytest.approx(DEPTH, abs=1e-12)
    assert fitted.coefficients[2] == pytest.approx(BEND, rel=1e-9)
    logs = np.log([1e6, 1e9])
    want = [curve(1e6), curve(1e9)]
    np.testing.assert_allclose(fitted.at(logs), want, rtol=1e-9)
    assert fitted.freedom == count - 3 and fitted.squares == pytest.approx(0, abs=1e-20)


def test_a_cell_of_many_runs_counts_as_often():
    sizes, losses = (1e6, 1e7, 1e8, 1e9), (3.0, 2.4, 2.5, 3.4)
    one = loss_group(sizes, lambda size, _: losses[sizes.index(size)])
    cells = (one.cells[0], dataclasses.replace(one.cells[1], runs=5), *one.cells[2:])
    fitted = parabola(dataclasses.replace(one, cells=cells))
    # The same as a fit of eight points, of which five are the second cell.
    x = np.log(sizes)[[0, 1, 1, 1, 1, 1, 2, 3]]
    y = np.array(losses)[[0, 1, 1, 1, 1, 1, 2, 3]]
    c2, c1, c0 = np.polyfit(x, y, 2)
    assert fitted.lowest == pytest.approx(-c1 / (2 * c2), rel=1e-9)
    residuals = y - np.polyval([c2, c1, c0], x)
    assert fitted.squares == pytest.approx(np.sum(residuals**2), rel=1e-6)
    assert fitted.freedom == 1


@pytest.mark.parametrize(
    ("sizes", "edge"),
    [
        # Around the best of 2e7 the second size is lowest, then the first, then the last.
        ((5e6, 2e7, 9e7), None),
        ((1.8e7, 4e7, 9e7), "the lowest loss is at the smallest size"),
        ((2e6, 8e6, 2.1e7), "the lowest loss is at the largest size"),
    ],
)
def test_a_lowest_run_at_an_end_is_warned_of(sizes, edge):
    assert parabola(loss_group(sizes, curve)).edge() == edge


@pytest.mark.parametrize(
    ("sizes", "have"),
    [((1e7,), "one size"), ((1e7, 2e7), "2 different sizes"), ((1e7, 2e7, 2e7), "2 different")],
)
def test_fewer_than_three_sizes_are_refused(sizes, have):
    refused = parabola(loss_group(sizes, curve))
    assert isinstance(refused, FitRefused)
    assert refused.line().startswith(f"plain at 1e+18 FLOPs: no parabola: it has runs of {have}")
    assert "needs 3. Run more sizes, on both sides" in refused.line()


def test_losses_that_bend_down_are_refused():
    refused = parabola(loss_group(SIZES, lambda size, _: 9 - curve(size)))
    assert isinstance(refused, FitRefused)
    assert "its loss is concave in ln N" in refused.reason
    assert refused.fix == "Run sizes beyond s0, 5M and s3, 90M, or more seeds of these"


def test_losses_that_are_all_equal_are_refused():
    assert isinstance(parabola(loss_group(SIZES, lambda size, _: 3.0)), FitRefused)


@pytest.mark.parametrize(
    ("sizes", "side", "wanted"),
    [
        # Steps of a factor of 2 from the lowest point at 20M on, away from the sizes.
        ((2.4e7, 4.8e7, 9.6e7), "below the sizes run (s0, 24M)", "10M and 20M"),
        ((4e6, 8e6, 1.6e7), "above the sizes run (s2, 16M)", "20M and 40M"),
        # Far outside: the next step and the one after, not the lowest point itself.
        ((1e5, 2e5, 4e5), "above the sizes run (s2, 400k)", "800k and 1.6M"),
    ],
)
def test_a_lowest_point_outside_the_sizes_is_refused_with_sizes_to_add(sizes, side, wanted):
    refused = parabola(loss_group(sizes, curve))
    assert isinstance(refused, FitRefused)
    assert refused.reason.startswith("its minimum lies near 20M parameters, " + side)
    assert refused.fix == f"Add sizes of about {wanted} parameters"


def test_a_refusal_of_an_architecture_as_a_whole_names_no_budget():
    refused = FitRefused(architecture="mor", budget=None, what="law", reason="why", fix="Do that")
    assert refused.line() == "mor: no law: why. Do that"
