"""The HTML page of a study's report: findings, figures, tables, runs, manifest. No scripts."""

import base64
import dataclasses
import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

from mor_jax.observability.number_format import duration, quantity
from mor_jax.scaling.fit.fit import Fit, View
from mor_jax.scaling.fit.tables import (
    VERDICTS,
    Table,
    about,
    compute,
    ends,
    noise_line,
    refusals,
    tables,
)
from mor_jax.scaling.report.figures import UNITS
from mor_jax.scaling.runs.points import Point

OPENING = "<h2>Findings</h2>"
"""Marks a file as a page of this module, so that it may be replaced."""

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2937; max-width: 1180px; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.7rem; margin-bottom: 0; } h2 { font-size: 1.25rem; margin-top: 2.2rem; }
h3 { font-size: 1.02rem; margin: 1.4rem 0 0.3rem; }
.faint, figcaption, .note { color: #6b7280; } figure { margin: 1.2rem 0; }
img { max-width: 100%; height: auto; } .scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.86rem; }
th, td { padding: 0.28rem 0.7rem; text-align: left; white-space: nowrap;
  border-bottom: 1px solid #e5e7eb; font-variant-numeric: tabular-nums; }
th { border-bottom: 2px solid #9ca3af; } tr:nth-child(even) td { background: #f9fafb; }
.refused { background: #fff7ed; border-left: 4px solid #d55e00; padding: 0.5rem 1rem; }
pre { background: #f3f4f6; padding: 0.8rem; overflow-x: auto; font-size: 0.8rem; }
summary { cursor: pointer; font-weight: 600; margin: 1rem 0 0.4rem; }
"""

_CAPTIONS = {
    "by_budget": "Each point is a model size; repeated seeds are averaged, bars show one standard "
    "deviation. Each curve is a parabola in ln N, the star its minimum. Lower is better.",
    "by_architecture": "The same runs, one panel per architecture. The dashed line joins the "
    "minima: the more it leans to the right, the faster the best size grows with compute.",
    "frontier": "Left: the loss of each architecture at each budget. Right: its difference to the "
    "baseline; an interval that contains 0 shows no significant difference.",
    "optimum": "Minima with intervals and the power laws through them with bands. A steeper line "
    "spends more of additional compute on size (left) or on tokens (right).",
}


@dataclasses.dataclass(frozen=True)
class Picture:
    """name: of the method that drew it. file: its name beside the page."""

    name: str
    file: str
    png: bytes


def page(
    fit: Fit,
    points: Sequence[Point],
    manifest: Mapping[str, Any],
    pictures: Mapping[tuple[str, str], Sequence[Picture]],
) -> str:
    """The whole page. pictures: by routing and kind of parameters."""
    main, *others = fit.views
    name = str(manifest.get("study", "study"))
    parts = [
        f"<h1>{_text(name)}</h1>",
        f"<p class='faint'>{_text(_subtitle(fit, points, manifest))}</p>",
        OPENING,
        _list(findings(fit, main)),
        _refused(main),
        _list(fit.notes, "note"),
        "<h2>Figures</h2>",
        *_figures(pictures.get((main.routing, main.kind), ())),
        f"<h2>Tables</h2><p class='faint'>{_text(_reading(fit, main))}</p>",
        *(_table(table) for table in tables(fit, main)),
    ]
    if others:
        parts.append("<h2>Other parameter counts and routings</h2>")
    for view in others:
        shown = [*_figures(pictures.get((view.routing, view.kind), ())), _refused(view)]
        shown += [f"<p class='faint'>{_text(noise_line(view))}</p>"]
        shown += [_table(table) for table in tables(fit, view)]
        parts.append(_folded(about(view), "".join(shown)))
    parts += _runs(points, manifest)
    parts += _reproduction(manifest)
    body = "\n".join(part for part in parts if part)
    head = f"<meta charset='utf-8'><title>{_text(name)}</title><style>{_STYLE}</style>"
    meta = "<meta name='viewport' content='width=device-width, initial-scale=1'>"
    return (
        f"<!DOCTYPE html>\n<html lang='en'><head>{head}{meta}</head>\n<body>{body}</body></html>\n"
    )


def findings(fit: Fit, view: View) -> list[str]:
    """The main results, one sentence each."""
    found = []
    for budget in fit.budgets:
        best = min((b for b in view.best if b.budget == budget), key=lambda row: row.loss)
        text = f"{compute(budget)} FLOPs: the lowest loss is {best.architecture}'s, "
        text += f"{best.loss:.4f} nats per token at {quantity(best.parameters)} {view.kind} "
        text += f"parameters and {quantity(best.tokens)} tokens"
        gaps = [g for g in view.gaps if g.budget == budget]
        texts = [_gap(fit, g.architecture, g.of_runs, g.runs_interval) for g in gaps]
        found.append(f"{text}. {'; '.join(texts)}." if texts else f"{text}.")
    for d in view.differences:
        if fit.baseline in (d.architecture, d.against):
            value = f"{d.difference:+.3f}{ends(d.interval, '+.3f')}"
            reading = VERDICTS[d.verdict] if d.interval else "no interval"
            text = f"Exponent of size: {d.architecture} minus {d.against} is {value}: {reading}."
            found.append(text)
    if not view.differences and len(fit.architectures) > 1:
        found.append("Slopes cannot be compared: fewer than two architectures have a power law.")
    found.append(f"{_sentence(noise_line(view))}.")
    return found


def _gap(fit: Fit, name: str, value: float, pair: tuple[float, float] | None) -> str:
    text = f"{name} {value:+.4f}{ends(pair, '+.4f')} relative to {fit.baseline}"
    if pair is not None and pair[0] < 0 < pair[1]:
        text += " (not significant)"
    return text


def _subtitle(fit: Fit, points: Sequence[Point], manifest: Mapping[str, Any]) -> str:
    unit = str(manifest.get("unit", "training"))
    names, counted = ", ".join(fit.architectures), UNITS.get(unit, unit)
    budgets = ", ".join(compute(budget) for budget in fit.budgets)
    return f"{len(points)} runs of {names} at {budgets} FLOPs ({counted})"


def _reading(fit: Fit, view: View) -> str:
    share = f"{fit.options.confidence:.0%}"
    return (
        f"{_sentence(about(view))}. Brackets are {share} intervals. {_sentence(noise_line(view))}."
    )


def _figures(pictures: Sequence[Picture]) -> list[str]:
    found = []
    for picture in pictures:
        data = base64.b64encode(picture.png).decode()
        caption = _text(_CAPTIONS[picture.name])
        image = f"<img alt='{caption}' src='data:image/png;base64,{data}'>"
        found.append(f"<figure>{image}<figcaption>{caption}</figcaption></figure>")
    return found


def _refused(view: View) -> str:
    lines = refusals(view)
    if not lines:
        return ""
    return f"<div class='refused'><strong>Refused fits</strong>{_list(lines)}</div>"


def _table(table: Table) -> str:
    note = f"<p class='note'>{_text(table.note)}</p>" if table.note else ""
    return f"<h3>{_text(_sentence(table.title))}</h3>{note}{_grid(table.head, table.rows)}"


def _grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    keep = [i for i in range(len(head)) if any(row[i] for row in rows)]
    titles = "".join(f"<th>{_text(head[i])}</th>" for i in keep)
    lines = ["".join(f"<td>{_text(row[i])}</td>" for i in keep) for row in rows]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    table = f"<table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table>"
    return f"<div class='scroll'>{table}</div>"


def _runs(points: Sequence[Point], manifest: Mapping[str, Any]) -> list[str]:
    head = ("run", "architecture", "size", "budget", "seed", "unique N", "effective N", "tokens")
    head += ("FLOPs of budget", "loss, causal", "loss, top-k", "mean depth", "time")
    order = sorted(points, key=lambda p: (p.architecture, p.budget, p.effective, p.seed))
    rows = [_run(point) for point in order]
    finished = {point.run for point in points}
    planned = [str(run.get("name")) for run in manifest.get("runs", ()) if isinstance(run, Mapping)]
    left = [name for name in planned if name not in finished]
    parts = [f"<h2>Runs</h2>{_folded(f'all {len(rows)} finished runs', _grid(head, rows))}"]
    if left:
        parts.append(f"<p>Planned but not finished: {_text(', '.join(left))}.</p>")
    return parts


def _run(point: Point) -> tuple[str, ...]:
    return (
        point.run,
        point.architecture,
        point.size,
        compute(point.budget),
        str(point.seed),
        f"{point.unique:,}",
        f"{point.effective:,}",
        f"{point.tokens:,}",
        f"{point.flops / point.budget:.1%}",
        f"{point.loss_causal:.4f}",
        "" if point.loss_topk is None else f"{point.loss_topk:.4f}",
        "" if point.depth is None else f"{point.depth:.2f}",
        "" if point.seconds is None else duration(point.seconds),
    )


def _reproduction(manifest: Mapping[str, Any]) -> list[str]:
    code = manifest.get("code") or {}
    code = code if isinstance(code, Mapping) else {"version": code}
    facts = [f"{key} {value}" for key, value in code.items() if key != "clean"]
    if code.get("clean") is False:
        facts.append("with uncommitted changes")
    commit = code.get("commit")
    lines = [f"git checkout {commit}"] if commit else []
    lines += [
        "# save the manifest below as STUDY/manifest.json, then",
        "mor isoflop run --study=STUDY",
        "mor isoflop fit --study=STUDY",
        "mor isoflop report --study=STUDY",
    ]
    stated = manifest.get("reproduce")
    if isinstance(stated, Sequence) and not isinstance(stated, str) and stated:
        lines = [str(line) for line in stated]
    text = json.dumps(dict(manifest), indent=1, default=str)
    return [
        "<h2>How to reproduce it</h2>",
        f"<p>Code: {_text(', '.join(facts) or 'unknown')}.</p>",
        f"<pre>{_text(chr(10).join(lines))}</pre>",
        _folded("the full manifest", f"<pre>{_text(text)}</pre>"),
    ]


def _folded(title: str, content: str) -> str:
    return f"<details><summary>{_text(_sentence(title))}</summary>{content}</details>"


def _list(lines: Sequence[str], kind: str = "") -> str:
    if not lines:
        return ""
    items = "".join(f"<li>{_text(line)}</li>" for line in lines)
    return f"<ul class='{kind}'>{items}</ul>" if kind else f"<ul>{items}</ul>"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _text(value: str) -> str:
    return html.escape(value, quote=True)


__all__ = ["Picture", "findings", "page"]
