"""A fit in words: cells, intervals, columns that are left out, and both kinds of output."""

import dataclasses
import io

import pytest
from rich.console import Console

from mor_jax.scaling.fit import tables
from mor_jax.scaling.fit.fit import Fit, FitOptions, View
from mor_jax.scaling.fit.minima import Best, Gap, Minimum
from mor_jax.scaling.fit.parabola import FitRefused
from mor_jax.scaling.fit.parametric import LossLaw
from mor_jax.scaling.fit.power_law import Noise, PowerLaw, SlopeDifference

MINIMUM = Minimum(
    architecture="plain",
    budget=1e15,
    sizes=4,
    runs=8,
    parameters=12_345.0,
    parameters_interval=(11_000.0, 14_000.0),
    tokens=2_469_000.0,
    tokens_interval=None,
    loss=3.14159,
    loss_interval=(3.1, 3.2),
    centre=10.0,
    coefficients=(3.2, 0.1, 0.05),
    found=1.0,
    warning="the lowest loss is at the smallest size",
)
BEST = Best(
    architecture="plain",
    budget=1e15,
    size="w64",
    parameters=12_000.0,
    tokens=2.5e6,
    runs=2,
    loss=3.15,
    spread=0.0123,
)
GAP = Gap(
    architecture="mor-3",
    budget=1e15,
    at_minima=None,
    minima_interval=None,
    of_runs=-0.05,
    runs_interval=(-0.08, 0.01),
)
LAW = PowerLaw(
    architecture="plain",
    budgets=3,
    a=0.5234,
    a_interval=(0.4567, 0.6),
    b=0.4766,
    b_interval=None,
    k=0.1,
    m=0.2,
    at=3.16e15,
    parameters_at=23_000.0,
    parameters_interval=None,
    tokens_at=4e6,
    tokens_interval=(3e6, 5e6),
    scatter=0.0321,
    band=(),
)
SLOPES = SlopeDifference(
    architecture="mor-3",
    against="plain",
    difference=-0.04,
    interval=(-0.07, -0.01),
    verdict="more length",
)
SECOND = LossLaw(
    architecture="plain",
    runs=12,
    A=480.0,
    B=2000.0,
    E=1.8,
    alpha=0.34,
    beta=0.37,
    gamma=1.0,
    a=0.521,
    b=0.479,
    at=3.16e15,
    parameters_at=24_000.0,
    intervals={"alpha": (0.3, 0.38)},
    error=0.001,
    doubts=("A is at the edge", "few runs"),
)
VIEW = View(
    routing="causal",
    kind="unique",
    noise=Noise(deviation=0.01234, freedom=7, between_seeds=0.011, seeds_freedom=4),
    groups=(),
    minima=(MINIMUM,),
    refused=(FitRefused(architecture="mor-3", budget=1e15, what="law", reason="why", fix="Do"),),
    laws=(LAW,),
    differences=(SLOPES,),
    best=(dataclasses.replace(BEST, architecture="mor-3", spread=None, runs=1, loss=3.1), BEST),
    gaps=(GAP,),
    parametric=(SECOND,),
)
EMPTY = dataclasses.replace(
    VIEW, minima=(), refused=(), laws=(), differences=(), best=(), gaps=(), parametric=()
)


def fit_of(*views, notes=()):
    return Fit(
        options=FitOptions(confidence=0.8),
        architectures=("plain", "mor-3"),
        baseline="plain",
        budgets=(1e15,),
        views=views,
        notes=notes,
    )


def cells(title, view=VIEW):
    """The rows of a table, each as a dict by column; columns of one name hold their last cell."""
    (found,) = [t for t in tables.tables(fit_of(view), view) if t.title.startswith(title)]
    assert found.rows
    return [dict(zip(found.head, row, strict=True)) for row in found.rows]


@pytest.mark.parametrize(
    ("flops", "text"),
    [(3.16227e15, "3.16e15"), (10**17, "1e17"), (999, "999"), (1234.0, "1.23e03")],
)
def test_flops_are_written_with_three_digits(flops, text):
    assert tables.compute(flops) == text


def test_intervals_stand_in_brackets_or_not_at_all():
    assert tables.ends((0.49123, 0.5)) == " [0.491, 0.500]"
    assert tables.ends((-0.1, 0.25), "+.1f") == " [-0.1, +0.2]"
    assert tables.ends(None) == ""


def test_noise_is_told_with_what_it_rests_on():
    assert tables.noise_line(VIEW) == (
        "noise of a run: 0.0123 nats per token, from 7 residuals; "
        "between seeds 0.0110 (4 repeated runs)"
    )
    alone = dataclasses.replace(VIEW.noise, between_seeds=None)
    text = tables.noise_line(dataclasses.replace(VIEW, noise=alone))
    assert text == "noise of a run: 0.0123 nats per token, from 7 residuals"
    unknown = dataclasses.replace(alone, deviation=None)
    assert tables.noise_line(dataclasses.replace(VIEW, noise=unknown)).endswith("unknown")


def test_tables_come_in_reading_order_and_empty_ones_not_at_all():
    titles = [table.title for table in tables.tables(fit_of(VIEW), VIEW)]
    assert [title.split(":")[0] for title in titles] == [
        "loss at equal FLOPs",
        "minima",
        "power laws of compute",
        "comparison of slopes",
        "second opinion",
    ]
    assert tables.tables(fit_of(EMPTY), EMPTY) == []


def test_minima_and_laws_show_values_with_their_intervals():
    (row,) = cells("minima")
    assert row["runs of sizes"] == "8 of 4" and row["FLOPs"] == "1e15"
    assert row["best N"] == "12.3k [11k, 14k]" and row["best D"] == "2.47M"
    assert row["D / N"] == "200" and row["loss"] == "3.1416 [3.1000, 3.2000]"
    assert row["warning"] == "the lowest loss is at the smallest size"
    (row,) = cells("power laws")
    assert row["a"] == "0.523 [0.457, 0.600]" and row["b"] == "0.477"
    assert row["at FLOPs"] == "3.16e15" and row["best D there"] == "4M [3M, 5M]"
    assert row["scatter of N"] == "3.2%"


def test_slopes_are_read_only_where_there_is_an_interval():
    (row,) = cells("comparison")
    assert row["exponents a"] == "mor-3 minus plain"
    assert row["difference"] == "-0.040 [-0.070, -0.010]"
    assert row["reading"] == "mor-3: spends more of additional compute on length"
    without = dataclasses.replace(SLOPES, interval=None, verdict="undecided")
    (row,) = cells("comparison", dataclasses.replace(VIEW, differences=(without,)))
    assert row["reading"] == "no interval" and row["difference"] == "-0.040"


def test_a_gap_whose_minimum_was_refused_says_so():
    (table, *_) = tables.tables(fit_of(VIEW), VIEW)
    routed, plain = table.rows
    # Columns 3 and 5 are the gaps of the lowest runs and of the minima.
    assert routed[:3] == ("1e15", "mor-3", "3.1000 at w64")
    assert routed[3:] == ("-0.0500 [-0.0800, +0.0100]", "refused", "refused")
    assert plain[2] == "3.1500 ± 0.0123 (2 seeds) at w64"
    assert plain[3:] == ("", "3.1416", "")
    both = dataclasses.replace(GAP, at_minima=-0.02, minima_interval=(-0.03, -0.01))
    view = dataclasses.replace(VIEW, gaps=(both,))
    assert tables.tables(fit_of(view), view)[0].rows[0][5] == "-0.0200 [-0.0300, -0.0100]"


def test_doubts_about_the_parametric_law_are_told():
    (row,) = cells("second opinion")
    assert row["warning"] == "unreliable: A is at the edge; few runs"
    assert row["alpha"] == "0.340 [0.300, 0.380]" and row["beta"] == "0.370"
    assert row["best N at 3.16e15"] == "24k"
    sure = dataclasses.replace(VIEW, parametric=(dataclasses.replace(SECOND, doubts=()),))
    assert cells("second opinion", sure)[0]["warning"] == ""


def test_lines_are_aligned_and_leave_empty_columns_out():
    quiet = dataclasses.replace(VIEW, minima=(dataclasses.replace(MINIMUM, warning=None),))
    text = tables.lines(fit_of(quiet, notes=("look twice",)))
    assert text[0] == "unique (stored) parameters, loss under causal routing; 80% intervals"
    start = text.index("minima")
    head, row = text[start + 1], text[start + 2]
    assert "warning" not in head and head.index("best N") == row.index("12.3k")
    assert head.index("D / N") == row.index("200")
    assert "refused: mor-3 at 1e+15 FLOPs: no law: why. Do" in text
    assert text[-1] == "note: look twice"


def test_other_views_are_named_and_missing_ones_refused():
    other = dataclasses.replace(VIEW, routing="topk", kind="effective")
    head = tables.lines(fit_of(VIEW, other), "topk", "effective")[0]
    assert head.startswith("effective (as if nothing were shared) parameters, loss under top-k")
    with pytest.raises(ValueError, match=r"view=\('topk', 'effective'\): was not computed"):
        tables.lines(fit_of(VIEW), "topk", "effective")


def test_a_terminal_gets_ruled_tables_with_the_same_cells():
    file = io.StringIO()
    # What looks like rich's markup is a name like any other.
    view = dataclasses.replace(VIEW, laws=(dataclasses.replace(LAW, architecture="[red]mor"),))
    tables.show(fit_of(view), Console(file=file, force_terminal=True, width=300, no_color=True))
    text = file.getvalue()
    assert "─" in text and "12.3k [11k, 14k]" in text and "0.523 [0.457, 0.600]" in text
    assert "[red]mor" in text
