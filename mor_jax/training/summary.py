"""The summary at the end of a run: sizes and losses of the model, next to the baseline's.

Prints a table in a terminal and aligned lines elsewhere; computes nothing.
"""

import dataclasses
import os
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mor_jax.observability.number_format import duration, quantity

Row = tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSummary:
    """Values of the summary. Losses are nats per token on the validation text.

    seconds: of this call, which resumed the run after `first_step`. started_from: the weights
    before step 1, empty if random.
    unique_parameters: stored numbers. effective_parameters: of the vanilla model of the same
    depth. flops_per_token, plain_flops_per_token: of a training step, of this and of that model.
    loss_causal: under causal routing, or of a model without routers. loss_topk: under top-k
    routing, as in training; None without routers. loss_bigram: of a bigram model, counted on the
    training text; None if it was not counted. mean_depth: mean recursions per token; None without
    routers. Other values are None where they are unknown.
    """

    name: str
    steps: int
    seconds: float
    first_step: int = 0
    started_from: str = ""
    unique_parameters: int
    effective_parameters: int
    flops_per_token: float
    plain_flops_per_token: float
    loss_causal: float
    loss_topk: float | None = None
    loss_bigram: float | None = None
    recursions: int = 1
    mean_depth: float | None = None
    skipped_steps: int = 0
    tokens_per_second: float | None = None
    mfu: float | None = None
    prompt: str = ""
    completion: str = ""
    loss_picture: str | os.PathLike[str] | None = None
    depth_picture: str | os.PathLike[str] | None = None


def show(summary: RunSummary, console: Console | None = None) -> None:
    """Prints `summary`, by default to the standard output."""
    console = console or Console()
    write = _table if console.is_terminal else _lines
    console.print()
    console.print(Text(summary.name, style="bold"), soft_wrap=True)
    console.print(Text(f"{_run(summary)}\n"), soft_wrap=True)
    write(console, ("size", "this model", "vanilla, same depth", "ratio"), _sizes(summary))
    write(console, ("validation loss, nats per token", "", ""), _losses(summary))
    if summary.mean_depth is not None:
        share = summary.mean_depth / summary.recursions
        text = f"mean depth: {summary.mean_depth:.2f} of {summary.recursions} recursions"
        console.print(Text(f"{text} ({share:.0%})\n"), soft_wrap=True)
    if summary.completion:
        _completion(console, summary)
    pictures = (("loss curves", summary.loss_picture), ("depth of tokens", summary.depth_picture))
    for label, path in pictures:
        if path is not None:
            console.print(Text(f"{label}: {os.fspath(path)}"), soft_wrap=True)


def _completion(console: Console, summary: RunSummary) -> None:
    prompt, completion = printable(summary.prompt), printable(summary.completion)
    console.print(Text(f"completion of {summary.prompt!r}:"), soft_wrap=True)
    text = Text.assemble((prompt, "bold"), completion)
    console.print(text, soft_wrap=True)
    console.print()


def _run(summary: RunSummary) -> str:
    parts = [f"{summary.steps} steps"]
    if summary.first_step:
        parts.append(f"{summary.steps - summary.first_step} of them in this call")
    parts[-1] += f" in {duration(summary.seconds)}"
    if summary.tokens_per_second is not None:
        parts.append(f"{quantity(summary.tokens_per_second)} tokens/s")
    if summary.mfu is not None:
        parts.append(f"MFU {summary.mfu:.1%}")
    if summary.skipped_steps:
        parts.append(f"{summary.skipped_steps} skipped (loss or gradient not finite)")
    if summary.started_from:
        parts.append(f"started from {summary.started_from}")
    return ", ".join(parts)


def _sizes(summary: RunSummary) -> list[Row]:
    pairs = (
        ("parameters stored", summary.unique_parameters, summary.effective_parameters),
        ("training FLOPs per token", summary.flops_per_token, summary.plain_flops_per_token),
    )
    return [(name, quantity(a), quantity(b), f"{a / b:.2f}") for name, a, b in pairs]


def _losses(summary: RunSummary) -> list[Row]:
    causal, topk, bigram = summary.loss_causal, summary.loss_topk, summary.loss_bigram
    if topk is None:
        rows = [("this model", f"{causal:.4f}", "")]
    else:
        rows = [
            ("causal routing", f"{causal:.4f}", "as in generation: uses no later token"),
            ("top-k routing", f"{topk:.4f}", "as in training: compares all tokens"),
            ("difference", f"{causal - topk:+.4f}", "causal minus top-k"),
        ]
    if bigram is not None:
        rows += [
            ("bigram model", f"{bigram:.4f}", "counts of token pairs, same text"),
            ("improvement over it", f"{bigram - causal:+.4f}", "causal routing" if topk else ""),
        ]
    return rows


def _table(console: Console, head: Row, rows: Sequence[Row]) -> None:
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for i, title in enumerate(head):
        numbers = all(row[i][:1] in "+-0123456789" for row in rows)
        table.add_column(title, justify="right" if numbers else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _lines(console: Console, head: Row, rows: Sequence[Row]) -> None:
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    for row in (head, *rows):
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        console.print(Text(line.rstrip()), soft_wrap=True)
    console.print()


def printable(text: str) -> str:
    """The text with control characters replaced: an untrained model generates them."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
