"""The parametric law: known coefficients come back, too few runs and bad fits are named."""

import dataclasses
import math

import numpy as np
import pytest
from support.loss_groups import loss_group
from support.synthetic_study import Law

from mor_jax.scaling.fit.parabola import FitRefused
from mor_jax.scaling.fit.parametric import LossLaw, loss_law

LAW = Law(E=1.7, A=400.0, alpha=0.33, B=1500.0, beta=0.36)
SIZES, BUDGETS = (1e6, 3e6, 1e7, 4e7), (1e16, 1e17, 1e18)


def fitted(loss=LAW.loss, sizes=SIZES, budgets=BUDGETS, resamples=0, confidence=0.9):
    groups = [loss_group(sizes, loss, budget) for budget in budgets]
    return loss_law(groups, resamples, confidence, np.random.default_rng(0))


@pytest.fixture(scope="module")
def exact():
    found = fitted()
    assert isinstance(found, LossLaw)
    return found


def test_the_five_values_of_an_exact_law_come_back(exact):
    for name in ("E", "A", "alpha", "B", "beta"):
        assert getattr(exact, name) == pytest.approx(getattr(LAW, name), rel=0.02), name
    assert exact.runs == 12 and exact.error < 1e-4 and exact.doubts == ()
    assert exact.intervals == {}


def test_the_exponents_of_compute_follow_from_them(exact):
    # 6 N FLOPs a token: gamma is 1.
    assert exact.gamma == pytest.approx(1) and exact.a + exact.b == pytest.approx(1)
    assert exact.a == pytest.approx(0.36 / 0.69, abs=0.005)
    assert exact.at == pytest.approx(1e17)
    assert exact.parameters_at == pytest.approx(LAW.best(1e17), rel=0.01)


def test_the_best_size_has_the_lowest_loss_of_its_compute(exact):
    def at(size):
        return float(exact.loss(np.array(size), np.array(exact.at / (6 * size))))

    best = at(exact.parameters_at)
    assert best < min(at(exact.parameters_at * factor) for factor in (0.8, 0.97, 1.03, 1.25))


def test_the_law_gives_losses_of_arrays(exact):
    sizes, tokens = np.array([[1e7, 1e9]]), np.array([[1e9, 1e10]])
    want = exact.E + exact.A * sizes**-exact.alpha + exact.B * tokens**-exact.beta
    np.testing.assert_allclose(exact.loss(sizes, tokens), want)


def test_flops_that_grow_otherwise_than_the_size_move_the_best_size():
    """40 N^0.8 FLOPs a token: a = beta / (alpha + 0.8 beta), and D = C / (40 N^0.8)."""
    groups = []
    for budget in BUDGETS:
        one = loss_group(SIZES, LAW.loss, budget)
        cells = []
        for cell in one.cells:
            rate = 40 * cell.parameters**0.8
            loss = LAW.loss(cell.parameters, budget / rate)
            cells.append(
                dataclasses.replace(cell, flops_per_token=rate, tokens=budget / rate, loss=loss)
            )
        groups.append(dataclasses.replace(one, cells=tuple(cells)))
    found = loss_law(groups, 0, 0.9, np.random.default_rng(0))
    assert found.gamma == pytest.approx(0.8)
    assert found.a == pytest.approx(0.36 / (0.33 + 0.8 * 0.36), abs=0.005)
    assert found.b == pytest.approx(1 - 0.8 * found.a)
    # Where the law's derivative along the budget is zero, searched for on a fine grid.
    sizes = np.geomspace(1e5, 1e9, 200_001)
    losses = LAW.loss(sizes, 1e17 / (40 * sizes**0.8))
    assert found.parameters_at == pytest.approx(sizes[np.argmin(losses)], rel=0.01)


def test_one_wrong_run_of_many_moves_the_law_little():
    """Huber's loss: least squares would follow an outlier of 5 %."""
    wrong = (SIZES[1], BUDGETS[1])

    def loss(size, tokens):
        off = math.isclose(size, wrong[0]) and math.isclose(6 * size * tokens, wrong[1])
        return LAW.loss(size, tokens) * (1.05 if off else 1.0)

    found = fitted(loss)
    assert found.a == pytest.approx(LAW.a, abs=0.01)
    assert LAW.E * 0.98 < found.E < LAW.E * 1.02
    assert found.error < 1e-3


@pytest.mark.parametrize(
    ("sizes", "budgets", "have"),
    [
        (SIZES, BUDGETS[:1], "4 runs of 4 sizes at 1 budgets"),
        ((1e6, 3e6), (1e16, 1e17, 1e18, 1e19), "8 runs of 2 sizes at 4 budgets"),
        ((1e6, 3e6, 1e7), BUDGETS[:2], "6 runs of 3 sizes at 2 budgets"),
        ((1e6, 2e6, 3e6, 4e6, 5e6, 6e6, 7e6, 8e6), BUDGETS[:1], "8 runs of 8 sizes at 1 budgets"),
    ],
)
def test_too_few_runs_sizes_or_budgets_are_refused(sizes, budgets, have):
    refused = fitted(sizes=sizes, budgets=budgets)
    assert isinstance(refused, FitRefused)
    assert refused.line() == (
        f"plain: no parametric law: it has {have} and needs 8 of 3 at 2. Run more sizes or budgets"
    )


def test_losses_without_a_term_of_the_tokens_are_doubted():
    found = fitted(lambda size, tokens: 2 + 400 / size**0.33)
    assert any(doubt.startswith(("B is", "beta is")) for doubt in found.doubts)
    assert all(doubt.endswith("at its bound") for doubt in found.doubts)


def test_few_runs_are_fitted_and_doubted():
    found = fitted(budgets=BUDGETS[:2])
    assert found.runs == 8 and "8 runs are few for 5 values" in found.doubts


def test_intervals_widen_with_the_noise_and_hold_what_was_fitted():
    widths = []
    for noise in (0.0, 1e-3, 4e-3):
        rng = np.random.default_rng(1)
        found = fitted(
            lambda size, tokens, rng=rng, noise=noise: (
                LAW.loss(size, tokens) * math.exp(noise * rng.standard_normal())
            ),
            resamples=30,
        )
        assert set(found.intervals) >= {"E", "A", "B", "alpha", "beta", "a", "parameters_at"}
        low, high = found.intervals["a"]
        assert low - 1e-9 < found.a < high + 1e-9
        widths.append(high - low)
    # An exact law leaves nothing to draw from.
    assert widths[0] < 1e-3 < widths[1] < widths[2] / 2
