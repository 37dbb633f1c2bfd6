"""Points that others published, fitted again: see published/README.md for their sources."""

import csv
from pathlib import Path

import numpy as np
import pytest

from mor_jax.scaling.fit.fit import FitOptions, fit
from mor_jax.scaling.runs.points import Point

OPTIONS = FitOptions(resamples=1000, law_resamples=0)


def point(number: int, size: float, budget: float, loss: float) -> Point:
    """Both sources count C = 6 N D."""
    return Point(
        run=str(number),
        architecture="plain",
        size=str(number),
        budget=budget,
        seed=0,
        unique=round(size),
        effective=round(size),
        tokens=round(budget / (6 * size)),
        flops=budget,
        flops_per_token=6 * size,
        loss_causal=loss,
    )


def rows(name: str) -> np.ndarray:
    with (Path(__file__).parent / "published" / name).open() as file:
        lines = list(csv.reader(file))[1:]
    return np.array(lines, float)


def test_chinchilla_s_parametric_law():
    """The values of Besiroglu et al. (2024), who also left the five highest losses out."""
    data = rows("chinchilla.csv") * (1e6, 1e18, 1)
    data = data[np.argsort(data[:, 2])][:-5]
    (law,) = fit([point(i, *row) for i, row in enumerate(data)], OPTIONS).view().parametric
    assert law.runs == 240 and not law.doubts
    assert law.alpha == pytest.approx(0.3478, abs=0.005)
    assert law.beta == pytest.approx(0.3658, abs=0.005)
    terms = np.array([law.E, law.A, law.B])
    assert terms == pytest.approx(np.array([1.8172, 482.01, 2085.43]), rel=0.03)
    assert law.a == pytest.approx(0.5126, abs=0.005)


def test_llama_3_s_law_of_tokens():
    """Section 3.2.1 of its paper: D = 0.29 C^0.53, which makes 16.55T tokens and 402B parameters
    of 3.8e25 FLOPs."""
    points = [
        point(i, budget / (6e9 * billions), budget, loss)
        for i, (budget, billions, loss) in enumerate(rows("llama3.csv"))
    ]
    found = fit(points, OPTIONS)
    view = found.view()
    (law,) = view.laws
    assert law.budgets == 10 and not view.refused
    assert law.b_interval[0] < 0.53 < law.b_interval[1] and law.b == pytest.approx(0.53, abs=0.01)
    assert law.m * 3.8e25**law.b == pytest.approx(16.55e12, rel=0.05)
    assert law.k * 3.8e25**law.a == pytest.approx(402e9, rel=0.05)
    assert any("sizes of one budget span up to" in note for note in found.notes)
