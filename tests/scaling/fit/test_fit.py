"""Fits of scaling studies: known laws come back, and what cannot be known is refused by name."""

import dataclasses
import json

import numpy as np
import pytest
from etils import epath
from support.synthetic_study import Law, inside, study

from mor_jax.scaling.fit import tables
from mor_jax.scaling.fit.fit import Fit, FitOptions, fit, save

PLAIN, MOR = Law(), Law(E=1.82, A=380.0, alpha=0.29, beta=0.42, flops=7.5, sharing=3)
QUICK = FitOptions(resamples=1000, law_resamples=0)


@pytest.fixture(scope="module")
def points():
    return study({"mor-3": MOR, "plain": PLAIN}, sizes=5, noise=0.004, seed=1, leak=0.02)


@pytest.fixture(scope="module")
def fitted(points) -> Fit:
    return fit(points, FitOptions(resamples=1000, law_resamples=50))


@pytest.mark.parametrize("kind", ["unique", "effective"])
@pytest.mark.parametrize("routing", ["causal", "topk"])
def test_a_known_law_comes_back_within_its_intervals(fitted, routing, kind):
    view = fitted.view(routing, kind)
    for law, found in zip((PLAIN, MOR), view.laws, strict=True):
        scale = law.sharing if kind == "effective" else 1
        assert inside(law.a, found.a_interval) and inside(1 - law.a, found.b_interval)
        assert found.parameters_at == pytest.approx(scale * law.best(found.at), rel=0.05)
        assert found.tokens_at == pytest.approx(found.at / law.flops / law.best(found.at), rel=0.05)
    assert [law.architecture for law in view.laws] == ["plain", "mor-3"]
    (slope,) = view.differences
    assert (slope.architecture, slope.against) == ("mor-3", "plain")
    assert inside(MOR.a - PLAIN.a, slope.interval) and slope.verdict == "more size"


def test_the_parametric_law_is_a_second_opinion(fitted):
    for law, found in zip((PLAIN, MOR), fitted.view().parametric, strict=True):
        assert found.alpha == pytest.approx(law.alpha, abs=0.03)
        assert found.a == pytest.approx(law.a, abs=0.02) and not found.doubts
        assert found.gamma == pytest.approx(1, abs=1e-3)
        for name, value in (("alpha", law.alpha), ("beta", law.beta), ("a", law.a)):
            low, high = found.intervals[name]
            room = high - low
            assert low - room < value < high + room
        assert found.loss(np.array(1e8), np.array(1e9)) == pytest.approx(law.loss(1e8, 1e9), 0.01)


def test_gaps_at_equal_flops_hold_the_true_difference(fitted):
    for routing, leak in (("causal", 0.0), ("topk", 0.02)):
        gaps = fitted.view(routing).gaps
        assert len(gaps) == 3
        for gap in gaps:
            sizes = [law.best(gap.budget) for law in (MOR, PLAIN)]
            mor, plain = (
                law.loss(size, gap.budget / law.flops / size)
                for law, size in zip((MOR, PLAIN), sizes, strict=True)
            )
            assert gap.at_minima == pytest.approx(mor - leak - plain, abs=0.015)
            assert inside(gap.at_minima, gap.minima_interval)
            assert gap.of_runs == pytest.approx(gap.at_minima, abs=0.03)


def test_intervals_hold_the_truth_as_often_as_they_say():
    """90 % intervals of 36 laws: chance leaves fewer than 27 of them in 1 of 200 studies."""
    laws = {f"a{i}": Law() for i in range(12)}
    held = []
    for seed in range(3):
        view = fit(study(laws, noise=0.02, seed=seed), QUICK).view()
        held += [inside(Law().a, law.a_interval) for law in view.laws]
    assert 27 <= sum(held) < len(held) == 36


def test_tokens_follow_from_flops_per_token_between_the_runs():
    """Where FLOPs per token are not 6 N, C / 6 N would be wrong."""
    points = [
        dataclasses.replace(p, flops_per_token=6 * p.unique + 4e8, tokens=p.tokens)
        for p in study({"plain": PLAIN}, noise=0.0)
    ]
    minima = fit(points, QUICK).view().minima
    assert len(minima) == 3
    for low in minima:
        assert low.tokens == pytest.approx(low.budget / (6 * low.parameters + 4e8), rel=0.01)


@pytest.mark.parametrize(
    ("shift", "side"), [(2.5, "below the sizes run"), (-2.5, "above the sizes run")]
)
def test_a_minimum_outside_the_sizes_is_refused_and_the_rest_goes_on(shift, side):
    wrong = study({"mor-3": MOR}, noise=0.0, shift=shift)
    view = fit(study({"plain": PLAIN}) + wrong, QUICK).view()
    assert {m.architecture for m in view.minima} == {"plain"} and len(view.laws) == 1
    lines = [refusal.line() for refusal in view.refused]
    assert all(line.startswith("mor-3") for line in lines) and len(lines) == 4
    assert "at 1e+17 FLOPs: no parabola: its minimum lies near" in lines[0] and side in lines[0]
    assert "Add sizes of about" in lines[0] and "minima at 0 of its 3 budgets" in lines[-1]
    assert len(view.gaps) == 3
    assert all(gap.at_minima is None and gap.of_runs > 0 for gap in view.gaps)


def test_too_few_sizes_and_losses_that_bend_down_are_refused():
    points = study({"plain": PLAIN}, sizes=5, noise=0.0)
    two = [p for p in points if p.budget < 1e18 or p.size in ("s0", "s4")]
    (refusal,) = fit(two, QUICK).view().refused
    assert "runs of 2 different sizes and needs 3" in refusal.line()
    bent = [dataclasses.replace(p, loss_causal=9 - p.loss_causal) for p in points]
    assert "is concave in ln N" in fit(bent, QUICK).view().refused[0].line()


def test_seeds_are_averaged_and_tell_the_noise():
    points = study({"plain": PLAIN}, sizes=3, noise=0.02, seeds=6)
    found = fit(points, QUICK)
    noise = found.view().noise
    assert noise.between_seeds == pytest.approx(0.02, rel=0.3) and noise.seeds_freedom == 45
    assert [(m.sizes, m.runs) for m in found.view().minima] == [(3, 18)] * 3
    best = found.view().best[0]
    losses = [p.loss_causal for p in points if p.budget == 1e17 and p.size == best.size]
    assert best.loss == pytest.approx(np.mean(losses)) and best.runs == 6
    assert best.spread == pytest.approx(np.std(losses, ddof=1))


def test_without_anything_left_over_there_are_no_intervals():
    found = fit(study({"plain": PLAIN}, sizes=3), QUICK)
    assert found.view().laws[0].a_interval is None and found.view().minima[0].found is None
    assert "there are no intervals" in found.notes[0]


def test_what_weakens_a_study_is_noted():
    points = study({"plain": PLAIN}, budgets=(1e17, 1e18)) + study({"mor-3": MOR}, (1e18, 3e18))
    points[0] = dataclasses.replace(points[0], flops=1.2e17)
    notes = " | ".join(fit(points, QUICK).notes)
    for text in (
        "1e+17 FLOPs: only plain was run",
        "3e+18 FLOPs: no run of plain",
        "most plain-1e+17-0-0 (+20%)",
        "plain, mor-3: a law through two budgets",
        "no run was repeated with another seed",
    ):
        assert text in notes


def test_a_baseline_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"fit.baseline='plane'.*\['plain'\]"):
        fit(study({"plain": PLAIN}), FitOptions(baseline="plane"))
    with pytest.raises(ValueError, match="points=0"):
        fit([])
    found = fit(study({"mor-3": MOR, "mor-2": MOR}), QUICK)
    assert found.baseline == "mor-3"


def test_results_are_plain_values_and_lines(fitted, tmp_path):
    path = save(fitted, epath.Path(tmp_path) / "study")
    values = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert values["views"][0]["laws"][1]["architecture"] == "mor-3"
    assert [p.name for p in path.parent.iterdir()] == ["fit.json"]
    text = "\n".join(tables.lines(fitted, "topk", "effective"))
    assert "effective" in text and "top-k routing" in text and "mor-3 minus plain" in text
    for law in fitted.view("topk", "effective").laws:
        assert f"{law.a:.3f} [{law.a_interval[0]:.3f}, {law.a_interval[1]:.3f}]" in text
