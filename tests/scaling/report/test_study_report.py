"""The report of a study: one page with everything in it, and figures that show what they should."""

import base64
import dataclasses
import io
import re

import numpy as np
import pytest
from etils import epath
from matplotlib import image
from support.synthetic_study import Law, study

from mor_jax.scaling.fit.fit import FitOptions, fit
from mor_jax.scaling.report import report
from mor_jax.scaling.report.figures import COLOURS, Figures
from mor_jax.scaling.report.report import write_report

MOR = "mor<3>"
MANIFEST = {
    "study": "small & quick",
    "unit": "training",
    "code": {"version": "0.1.0", "commit": "abc1234", "clean": False},
    "runs": [{"name": "lost-run", "steps": 7}],
    "rules": {"batch": "<one>"},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    points = study({"plain": Law(), MOR: Law(E=1.7)}, seeds=2)
    # One group that has no minimum among its sizes.
    points = [p for p in points if (p.architecture, p.budget) != (MOR, 1e18) or p.size > "s1"]
    points[0] = dataclasses.replace(points[0], seconds=75.0, depth=1.5)
    fitted = fit(points, FitOptions(resamples=500, law_resamples=0))
    folder = epath.Path(tmp_path_factory.mktemp("study")) / "report"
    return fitted, write_report(fitted, points, MANIFEST, folder)


def shown(png: bytes) -> set[str]:
    """Colours of architectures that are in a picture."""
    page = np.round(image.imread(io.BytesIO(png))[..., :3] * 255).astype(np.int32)
    page = set(np.unique(page @ (1 << 16, 1 << 8, 1)).tolist())
    return {colour for colour in COLOURS if int(colour[1:], 16) in page}


def test_the_page_says_everything_and_needs_nothing(made):
    _, (page, *_) = made
    text = page.read_text()
    assert not re.search(r"(src|href)=(?!'data:)|https?:|<script", text)
    for part in (
        "small &amp; quick",
        "mor&lt;3&gt;",
        "abc1234",
        "with uncommitted changes",
        "Refused fits",
        "mor&lt;3&gt; at 1e+18 FLOPs: no parabola",
        "Power laws of compute",
        "Comparison of slopes",
        "Second opinion: L = E + A / N^alpha + B / D^beta",
        "Planned but not finished: lost-run",
        "All 44 finished runs",
        "1m15s",
        "&lt;one&gt;",
        "mor isoflop run",
    ):
        assert part in text, part


def test_its_pictures_are_those_beside_it(made):
    _, (page, *pictures) = made
    inside = re.findall(r"data:image/png;base64,([^']+)", page.read_text())
    assert [base64.b64decode(data) for data in inside] == [p.read_bytes() for p in pictures]
    assert {p.name for p in page.parent.iterdir()} == {p.name for p in (page, *pictures)}
    assert {p.name for p in pictures} >= {"curves-causal-unique.png", "optimum-causal-unique.png"}
    for picture in pictures:
        assert shown(picture.read_bytes()) == set(COLOURS[:2]), picture.name


def test_a_study_of_one_architecture_at_one_budget_has_a_report_too(tmp_path):
    points = study({"plain": Law()}, budgets=(1e17,), sizes=3)
    fitted = fit(points, FitOptions(resamples=500, law_resamples=0))
    for name in ("by_budget", "by_architecture", "frontier", "optimum"):
        png = getattr(Figures(fitted, fitted.view(), "paper"), name)()
        assert shown(png) == set(COLOURS[:1])


def test_files_that_no_report_made_are_kept(made, tmp_path):
    fitted, written = made
    mine = epath.Path(tmp_path / written[1].name)
    mine.write_text("mine")
    with pytest.raises(ValueError, match=rf"holds {mine.name}, which no report made"):
        write_report(fitted, [], MANIFEST, epath.Path(tmp_path))
    (tmp_path / "report.html").write_text("<h1>Quarterly figures</h1>")
    with pytest.raises(ValueError, match=r"report\.html, which no report made"):
        write_report(fitted, [], MANIFEST, epath.Path(tmp_path))
    assert mine.read_text() == "mine" and len(list(tmp_path.iterdir())) == 2
    report._check_free(fitted, written[0].parent)
