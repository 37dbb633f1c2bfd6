"""Depth map of one text, token by token, as HTML, PNG and JSON lines."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from mor_jax.analysis.output_directory import Write, json_lines, number
from mor_jax.analysis.page import Page, Token
from mor_jax.analysis.routing_record import ROUTINGS, RoutingRecord, scores
from mor_jax.inference.token_bytes import token_bytes
from mor_jax.plotting import plots

_FEW = 10
"""Depths below this are listed even if no token has them."""

END = "‖"
"""Sign for the end of a document."""


@dataclasses.dataclass(frozen=True, eq=False)
class DepthMap:
    """Text and routing of every token of `observed`.

    pieces: displayed text of each token: "" inside a character, `END` and a line break for the end
    of a document. records: as docs/analysis.md describes them.
    """

    observed: RoutingRecord
    pieces: list[str]
    records: list[dict[str, Any]]

    def files(self) -> dict[str, Write]:
        """map.html, map.png and map.jsonl."""
        observed, model = self.observed, self.observed.model
        mode = model.modes[0]
        title = f"Recursions per token, {ROUTINGS[mode]} routing: {model.name}"
        draw = partial(
            plots.depth_map,
            self._lines(),
            observed.first.depth,
            recursions=model.model.num_recursions,
            title=title,
        )
        return {
            "map.html": self._page().html(),
            "map.png": lambda path: draw(path=path),
            "map.jsonl": json_lines(self.records),
        }

    def facts(self) -> dict[str, Any]:
        """Mean depth, shares by depth and loss of the whole text, by routing: JSON values."""
        found = {}
        for mode, one in self.observed.passes.items():
            counts = np.bincount(one.depth, minlength=self.observed.model.model.num_recursions + 1)
            found[mode] = {
                "depth": number(one.depth.mean()),
                "shares": [number(share) for share in counts / counts.sum()],
                "loss": number(np.nanmean(one.loss)) if np.isfinite(one.loss).any() else None,
            }
        return {"tokens": len(self.pieces), "routings": found}

    def lines(self) -> list[str]:
        """`facts` as a table for a terminal."""
        facts = self.facts()
        made = [f"{'routing':<10}{'mean depth':>11}{'loss':>9}   share of tokens by depth"]
        for mode, one in facts["routings"].items():
            loss = "-" if one["loss"] is None else f"{one['loss']:.4f}"
            shares = list(enumerate(one["shares"]))
            # With many recursions, most depths are empty.
            short = [(depth, share) for depth, share in shares if share or 0 < depth < _FEW]
            each = "  ".join(f"{depth}: {share:.1%}" for depth, share in short)
            made.append(f"{ROUTINGS[mode]:<10}{one['depth']:>11.3f}{loss:>9}   {each}")
        return made

    def _page(self) -> Page:
        observed = self.observed
        tokens = [
            Token(
                text=piece,
                title=_title(record),
                depths={mode: record["depth"][mode] for mode in observed.passes},
                loss=record["loss"][observed.model.modes[0]],
            )
            for piece, record in zip(self.pieces, self.records, strict=True)
        ]
        parts = [observed.rows.name, f"{len(tokens):,} tokens", *observed.rows.notes]
        about = "; ".join([*parts, *observed.model.notes])
        return Page(
            title=f"Recursions per token: {observed.model.name}",
            about=f"{about}. Loss: nats, of the token itself. Hover over a token for its numbers.",
            routings={mode: ROUTINGS[mode] for mode in observed.passes},
            rows=[tokens[start:end] for start, end in stretches(observed)],
            recursions=observed.model.model.num_recursions,
        )

    def _lines(self) -> list[str]:
        """Pieces for the figure; unconnected sequences start on new lines."""
        pieces = list(self.pieces)
        if not self.observed.rows.joined:
            for start in self.observed.row_starts()[1:]:
                if not pieces[start - 1].endswith("\n"):
                    pieces[start - 1] += "\n"
        return pieces


def make_map(observed: RoutingRecord) -> DepthMap:
    """The depth map of a routing record."""
    pieces = plain_text(observed)
    records = _records(observed, pieces)
    for place in np.flatnonzero(observed.token == observed.model.tokenizer.eos_id):
        pieces[place] = f"{END}\n"
    return DepthMap(observed, pieces, records)


def plain_text(observed: RoutingRecord) -> list[str]:
    """The text that each token adds; "" for the end of a document."""
    decode, pieces = observed.model.tokenizer.decode, []
    for start, end in stretches(observed):
        pieces += plots.text_pieces(observed.token[start:end], decode)
    for place in np.flatnonzero(observed.token == observed.model.tokenizer.eos_id):
        pieces[place] = ""
    return pieces


def stretches(observed: RoutingRecord) -> list[tuple[int, int]]:
    """Start and end of each connected text: every sequence of a source, or all of one text."""
    starts = [0] if observed.rows.joined else observed.row_starts().tolist()
    return list(zip(starts, [*starts[1:], len(observed.token)], strict=True))


def _records(observed: RoutingRecord, pieces: Sequence[str]) -> list[dict[str, Any]]:
    """One record per token; docs/analysis.md describes the fields."""
    raw, cfg = token_bytes(observed.model.tokenizer), observed.model.model
    score = {mode: scores(cfg, one.logits) for mode, one in observed.passes.items()}
    main = {m: scores(cfg, one.main) for m, one in observed.passes.items() if one.main is not None}
    records = []
    for place, piece in enumerate(pieces):
        token = int(observed.token[place])
        record: dict[str, Any] = {
            "index": place,
            "row": int(observed.row[place]),
            "position": int(observed.position[place]),
            "token": token,
            "text": piece,
            "bytes": raw(token).hex(),
            "depth": {mode: int(one.depth[place]) for mode, one in observed.passes.items()},
            "loss": {mode: number(one.loss[place]) for mode, one in observed.passes.items()},
            "scores": {mode: _list(found[:, place]) for mode, found in score.items()},
        }
        if main:
            record["main_scores"] = {mode: _list(found[:, place]) for mode, found in main.items()}
        records.append(record)
    return records


def _list(values: np.ndarray) -> list[float | None]:
    return [number(value, 4) for value in values]


def _title(record: dict[str, Any]) -> str:
    """The text that the page shows on hover."""
    lines = [f"{record['text']!r}  token {record['token']}, position {record['position']}"]
    for mode, depth in record["depth"].items():
        loss, found = record["loss"][mode], record["scores"][mode]
        loss_text = "-" if loss is None else f"{loss:.2f} nats"
        each = " ".join("-" if score is None else f"{score:.3f}" for score in found)
        lines.append(f"{ROUTINGS[mode]}: depth {depth}, loss {loss_text}, scores {each}")
    return "\n".join(lines)
