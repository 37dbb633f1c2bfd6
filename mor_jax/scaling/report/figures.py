"""Figures of a study: curves per budget, frontiers, best size and tokens over compute.

An architecture has one colour and one marker in all of them; the colours can be told apart by
colour-blind readers (Okabe and Ito). matplotlib is imported inside functions, no window is opened.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from mor_jax.scaling.fit.fit import Fit, View
from mor_jax.scaling.fit.parabola import Group
from mor_jax.scaling.fit.power_law import PowerLaw
from mor_jax.scaling.fit.tables import compute
from mor_jax.scaling.report.axes import FAINT, INK, labels, new_figure, png, sizes, ticks, title

COLOURS = (
    *("#1a1a1a", "#0072b2", "#d55e00", "#009e73"),
    *("#cc79a7", "#e69f00", "#56b4e9", "#8c6d31"),
)
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")

UNITS = {
    "training": "training FLOPs",
    "paper": "FLOPs as the paper counts them",
}
"""Axis labels of what a study's budgets count; other units are shown as they are."""


class Figures:
    """Draws one view of a fit. unit: what the budgets count."""

    def __init__(self, fit: Fit, view: View, unit: str):
        self.fit, self.view = fit, view
        self.flops = UNITS.get(unit, unit)
        routing = "top-k" if view.routing == "topk" else view.routing
        self.loss = f"validation loss, nats per token ({routing} routing)"
        self.parameters = f"{view.kind} parameters, embedding not counted"
        names = fit.architectures
        self.styles = {
            name: (colour, marker)
            for name, colour, marker in zip(
                names, itertools.cycle(COLOURS), itertools.cycle(_MARKERS), strict=False
            )
        }

    def by_budget(self) -> bytes:
        """A panel per budget: the loss of every architecture at equal FLOPs."""
        figure, panels = new_figure(len(self.fit.budgets))
        for axes, budget in zip(panels, self.fit.budgets, strict=True):
            for group in self.view.groups:
                if group.budget == budget:
                    self._curve(axes, group, self.styles[group.architecture])
            title(axes, f"{compute(budget)} {'FLOPs' if len(panels) > 1 else self.flops}")
            sizes(axes)
        labels(panels, self.parameters, self.loss)
        self._legend(figure, self.fit.architectures, minimum=True)
        return png(figure, f"Loss at equal compute ({self.flops})")

    def by_architecture(self) -> bytes:
        """A panel per architecture: how its minimum moves with the budget."""
        figure, panels = new_figure(len(self.fit.architectures), shared=True)
        for axes, name in zip(panels, self.fit.architectures, strict=True):
            colour, marker = self.styles[name]
            for group in self.view.groups:
                if group.architecture == name:
                    self._curve(axes, group, (colour, marker), label=True)
            law = next((law for law in self.view.laws if law.architecture == name), None)
            if law is not None:
                self._path(axes, law, colour)
            title(axes, name, colour)
            sizes(axes)
        labels(panels, self.parameters, self.loss)
        return png(figure, f"Loss by size, a curve per budget in {self.flops}")

    def frontier(self) -> bytes:
        """Loss at the minimum over compute, and the difference from the baseline."""
        others = [name for name in self.fit.architectures if name != self.fit.baseline]
        figure, panels = new_figure(2 if others else 1, width=5.6)
        for name in self.fit.architectures:
            self._lowest(panels[0], name)
        title(panels[0], "lowest loss")
        panels[0].set_ylabel(self.loss, fontsize=9)
        for i, name in enumerate(others):
            self._gap(panels[1], name, i - (len(others) - 1) / 2)
        if others:
            base = self.fit.baseline
            panels[1].axhline(0, color=self.styles[base][0], linewidth=1.4)
            title(panels[1], f"difference from {base}: below 0 is better")
            panels[1].set_ylabel("difference, nats per token", fontsize=9)
        for axes in panels:
            self._budgets(axes)
            axes.set_xlabel(self.flops, fontsize=9)
        self._legend(figure, self.fit.architectures, hollow=True)
        return png(figure, "Frontier: loss at the best size of each budget")

    def optimum(self) -> bytes:
        """Best size and length over compute with their power laws and bands."""
        figure, panels = new_figure(2, width=5.6)
        for name in self.fit.architectures:
            self._optimum(panels, name)
        title(panels[0], "best size N")
        title(panels[1], "best length D")
        panels[0].set_ylabel(self.parameters, fontsize=9)
        panels[1].set_ylabel("training tokens", fontsize=9)
        for axes in panels:
            if self.view.minima:
                axes.set_yscale("log")
                ticks(axes.yaxis)
            else:
                axes.set_yticks([])
                text = "no budget has a minimum among its sizes"
                position = {"transform": axes.transAxes, "ha": "center", "fontsize": 9}
                axes.text(0.5, 0.5, text, color=FAINT, **position)
            self._budgets(axes)
            axes.set_xlabel(self.flops, fontsize=9)
            if axes.get_legend_handles_labels()[0]:
                axes.legend(frameon=False, fontsize=8.5, loc="upper left")
        share = f"{self.fit.options.confidence:.0%}"
        return png(figure, f"Best size and length of each budget, {share} intervals")

    def _curve(
        self, axes: Any, group: Group, style: tuple[str, str], *, label: bool = False
    ) -> None:
        colour, marker = style
        sizes = np.array([cell.parameters for cell in group.cells])
        losses = [cell.loss for cell in group.cells]
        spreads = [cell.spread or 0.0 for cell in group.cells]
        if any(spreads):
            dots = {"linestyle": "none", "color": colour, "capsize": 2.5, "linewidth": 1.2}
            axes.errorbar(sizes, losses, yerr=spreads, **dots)
        minimum = self._minimum(group.architecture, group.budget)
        axes.plot(sizes, losses, marker, color=colour, markersize=4.5, alpha=0.85, zorder=3)
        if minimum is None:
            axes.plot(sizes, losses, color=colour, linestyle=":", linewidth=1.1)
        else:
            x = np.linspace(math.log(sizes.min()), math.log(sizes.max()), 80)
            curve = np.polynomial.Polynomial(minimum.coefficients)(x - minimum.centre)
            axes.plot(np.exp(x), curve, color=colour, linewidth=1.6)
            axes.plot(
                minimum.parameters,
                minimum.loss,
                "*",
                markersize=13,
                markerfacecolor="white",
                markeredgecolor=colour,
                markeredgewidth=1.5,
                zorder=4,
            )
        if label:
            text = compute(group.budget)
            position = {"xytext": (6, 0), "textcoords": "offset points", "va": "center"}
            axes.annotate(text, (sizes[-1], losses[-1]), color=INK, fontsize=8, **position)
            axes.margins(x=0.14)

    def _path(self, axes: Any, law: PowerLaw, colour: str) -> None:
        # Connects the minima to show how they move with the budget.
        minima = [m for m in self.view.minima if m.architecture == law.architecture]
        points = [(m.parameters, m.loss) for m in minima]
        axes.plot(*zip(*points, strict=True), color=colour, linewidth=0.9, linestyle=(0, (4, 3)))

    def _lowest(self, axes: Any, name: str) -> None:
        colour, marker = self.styles[name]
        minima = [m for m in self.view.minima if m.architecture == name]
        if minima:
            budgets, losses = [m.budget for m in minima], np.array([m.loss for m in minima])
            ends = [m.loss_interval or (m.loss, m.loss) for m in minima]
            errors = np.abs(np.array(ends).T - losses)
            style = {"color": colour, "marker": marker, "markersize": 6, "capsize": 3}
            axes.errorbar(budgets, losses, yerr=errors, linewidth=1.6, **style)
        for best in self.view.best:
            if best.architecture == name and self._refused(name, best.budget):
                style = {"markerfacecolor": "white", "markeredgecolor": colour, "markersize": 7}
                axes.plot(best.budget, best.loss, marker, markeredgewidth=1.5, **style)

    def _gap(self, axes: Any, name: str, position: float) -> None:
        colour, marker = self.styles[name]
        own = [gap for gap in self.view.gaps if gap.architecture == name]
        for gap in own:
            refused = gap.at_minima is None
            value = gap.of_runs if refused else gap.at_minima
            ends = gap.runs_interval if refused else gap.minima_interval
            errors = None if ends is None else np.abs(np.array([ends]).T - value)
            axes.errorbar(
                # Side by side, so that intervals of one budget do not overlap.
                gap.budget * 1.06**position,
                value,
                yerr=errors,
                color=colour,
                marker=marker,
                markersize=6.5,
                markerfacecolor="white" if refused else colour,
                capsize=3,
                linewidth=1.4,
            )

    def _optimum(self, panels: Sequence[Any], name: str) -> None:
        colour, marker = self.styles[name]
        law = next((law for law in self.view.laws if law.architecture == name), None)
        minima = [m for m in self.view.minima if m.architecture == name]
        for axes, letter in zip(panels, "ND", strict=True):
            values = [(m.parameters if letter == "N" else m.tokens) for m in minima]
            pairs = [
                (m.parameters_interval if letter == "N" else m.tokens_interval) for m in minima
            ]
            label = f"{name}: no law"
            if law is not None:
                label = f"{name}: {_exponent(law, letter)}"
                self._law(axes, law, letter, colour)
            elif not minima:
                axes.plot([], [], marker, color=colour, label=label)
                continue
            ends = [pair or (v, v) for pair, v in zip(pairs, values, strict=True)]
            errors = np.abs(np.array(ends).T - np.array(values))
            style = {"color": colour, "marker": marker, "markersize": 5.5, "capsize": 3}
            budgets = [m.budget for m in minima]
            axes.errorbar(budgets, values, errors, linestyle="none", label=label, **style)

    def _law(self, axes: Any, law: PowerLaw, letter: str, colour: str) -> None:
        exponent, factor = (law.a, law.k) if letter == "N" else (law.b, law.m)
        ends = (self.fit.budgets[0], self.fit.budgets[-1])
        x = np.geomspace(ends[0] / 1.2, ends[1] * 1.2, 30)
        if law.band:
            band = np.array(law.band)
            low, high = (1, 2) if letter == "N" else (3, 4)
            axes.fill_between(
                band[:, 0], band[:, low], band[:, high], color=colour, alpha=0.14, linewidth=0
            )
            x = band[:, 0]
        axes.plot(x, factor * x**exponent, color=colour, linewidth=1.6)

    def _minimum(self, architecture: str, budget: float) -> Any:
        for minimum in self.view.minima:
            if (minimum.architecture, minimum.budget) == (architecture, budget):
                return minimum
        return None

    def _refused(self, architecture: str, budget: float) -> bool:
        return self._minimum(architecture, budget) is None

    def _budgets(self, axes: Any) -> None:
        # Up to six budgets are the ticks themselves; more get the usual ticks.
        axes.set_xscale("log")
        budgets = self.fit.budgets
        axes.set_xlim(budgets[0] / 1.6, budgets[-1] * 1.6)
        if len(budgets) <= 6:
            axes.set_xticks(budgets, [compute(b) for b in budgets])
            axes.minorticks_off()

    def _legend(
        self, figure: Any, names: Sequence[str], *, minimum: bool = False, hollow: bool = False
    ) -> None:
        from matplotlib.lines import Line2D

        handles = []
        for name in names:
            colour, marker = self.styles[name]
            handles.append(Line2D([], [], color=colour, marker=marker, label=name))
        faint = {"color": FAINT, "markerfacecolor": "white"}
        if minimum:
            star = {"marker": "*", "markersize": 12, "linestyle": "none"}
            handles.append(Line2D([], [], label="minimum of the parabola", **star, **faint))
        if any(self._refused(row.architecture, row.budget) for row in self.view.best):
            if minimum:
                label = "no minimum among the sizes"
                handles.append(Line2D([], [], label=label, linestyle=":", color=FAINT))
            if hollow:
                label = "lowest run, no minimum among the sizes"
                mark = {"marker": "o", "linestyle": "none"}
                handles.append(Line2D([], [], label=label, **mark, **faint))
        most = int(figure.get_size_inches()[0] / 1.8)
        columns = math.ceil(len(handles) / math.ceil(len(handles) / most))
        position = {"loc": "outside lower center", "ncols": columns, "frameon": False}
        figure.legend(handles=handles, fontsize=9, **position)


def _exponent(law: PowerLaw, letter: str) -> str:
    value, ends = (law.a, law.a_interval) if letter == "N" else (law.b, law.b_interval)
    text = f"{letter} ~ C^{value:.2f}"
    return text if ends is None else f"{text} [{ends[0]:.2f}, {ends[1]:.2f}]"


__all__ = ["COLOURS", "UNITS", "Figures"]
