"""The tables of the evidence, as Markdown."""

import statistics
from collections.abc import Sequence
from typing import Any

from evidencing.variants import ABLATIONS, CAUSES, MAIN
from mor_jax.scaling.runs.points import Point
from mor_jax.scaling.study.manifest import Manifest

Timed = dict[str, dict[str, Any]]


def report(manifest: Manifest, points: Sequence[Point], timed: Timed, machine: dict) -> str:
    """Both main tables and the ablations."""
    steps = manifest.rules["steps"]
    batch = manifest.base["batch_size"] * manifest.base["seq_len"]
    equal, flops = steps * batch, manifest.rules["equal_flops"]
    parts = [
        "# Evidence",
        f"{machine['date']}, {machine['cores']} cores of {machine['device']}, JAX "
        f"{machine['jax']}; commit {manifest.code['commit']}. The standard library's text as "
        f"bytes, rows of {manifest.base['seq_len']}, {batch} tokens a step, width 48, eight "
        "effective layers. Losses are nats per held-out byte: mean of the seeds, and their "
        "standard deviation. Printed by `python benchmarks/evidence.py --save`.",
        f"## Equal tokens: {equal / 1e6:.2f}M",
        _main([p for p in points if p.tokens == equal], timed),
        f"## Equal training FLOPs: {flops:.3g}",
        _main([p for p in points if abs(p.flops / flops - 1) < 5e-3], timed),
        "Time and memory: of one train step, variants in turns in one process, beside the plain "
        "model; memory is what the compiled step needs beside its state. Token-choice has room "
        "for every token at every recursion here, so it saves neither.",
        "## One setting at a time, equal tokens",
        _ablations([p for p in points if p.tokens == equal]),
    ]
    return "\n\n".join(parts)


def _main(points: Sequence[Point], timed: Timed) -> str:
    head = (
        "| model | unique parameters | tokens | FLOPs | loss, causal | against plain | "
        "loss, top-k | leak | mean depth | step time | memory |"
    )
    lines = [head, "|---|" + "---|" * 10]
    base = _mean([p.loss_causal for p in points if p.architecture == MAIN[0].name])
    for variant in MAIN:
        mine = [p for p in points if p.architecture == variant.name]
        if mine:
            lines.append(_row(variant.name, mine, base, timed))
    return "\n".join(lines)


def _row(name: str, mine: Sequence[Point], base: float, timed: Timed) -> str:
    causal = [p.loss_causal for p in mine]
    topk = [p.loss_topk for p in mine if p.loss_topk is not None]
    depth = [p.depth for p in mine if p.depth is not None]
    plain, own = timed[MAIN[0].name], timed[name]
    cells = [
        name,
        f"{mine[0].unique / 1e3:.0f}k",
        f"{mine[0].tokens / 1e6:.2f}M",
        f"{mine[0].flops:.3g}",
        _spread(causal),
        f"{_mean(causal) - base:+.4f}",
        _spread(topk) if topk else "-",
        f"{_mean(causal) - _mean(topk):+.4f}" if topk else "-",
        f"{_mean(depth):.2f}" if depth else "-",
        f"{own['seconds'] * 1e3:.1f} ms ({own['seconds'] / plain['seconds']:.2f})",
        f"{own['temp_bytes'] / 2**20:.1f} MiB ({own['temp_bytes'] / plain['temp_bytes']:.2f})",
    ]
    return f"| {' | '.join(cells)} |"


def _ablations(points: Sequence[Point]) -> str:
    parts = []
    for title, group in ABLATIONS.items():
        lines = ["| variant | unique parameters | loss, causal | loss, top-k | seeds |"]
        lines.append("|---|---|---|---|---|")
        for variant in group:
            mine = [p for p in points if p.architecture == variant.name]
            topk = [p.loss_topk for p in mine if p.loss_topk is not None]
            cells = [
                CAUSES[variant.name],
                f"{mine[0].unique / 1e3:.0f}k",
                _spread([p.loss_causal for p in mine]),
                _spread(topk) if topk else "-",
                str(len(mine)),
            ]
            lines.append(f"| {' | '.join(cells)} |")
        parts.append(f"### {title[0].upper()}{title[1:]}\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values)


def _spread(values: Sequence[float]) -> str:
    more = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{_mean(values):.4f}{more}"
