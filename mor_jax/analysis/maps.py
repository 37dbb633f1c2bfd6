"""Depth map of one text, token by token, as HTML, PNG and JSON lines."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from mor_jax.analysis.output_directory import FileContents, json_lines, rounded
from mor_jax.analysis.page import Page, Token
from mor_jax.analysis.routing_record import ROUTINGS, RoutingRecord, scores
from mor_jax.inference.token_bytes import token_bytes
from mor_jax.plotting import plots

_ALWAYS_LISTED = 10
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

    def files(self) -> dict[str, FileContents]:
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
        facts, recursions = {}, self.observed.model.model.num_recursions
        for mode, routing_pass in self.observed.passes.items():
            counts = np.bincount(routing_pass.depth, minlength=recursions + 1)
            facts[mode] = {
                "depth": rounded(routing_pass.depth.mean()),
                "shares": [rounded(share) for share in counts / counts.sum()],
                "loss": _mean_loss(routing_pass.loss),
            }
        return {"tokens": len(self.pieces), "routings": facts}

    def lines(self) -> list[str]:
        """`facts` as a table for a terminal."""
        facts = self.facts()
        lines = [f"{'routing':<10}{'mean depth':>11}{'loss':>9}   share of tokens by depth"]
        for mode, values in facts["routings"].items():
            loss = "-" if values["loss"] is None else f"{values['loss']:.4f}"
            shares = list(enumerate(values["shares"]))
            # With many recursions, most depths are empty.
            listed = [
                (depth, share) for depth, share in shares if share or 0 < depth < _ALWAYS_LISTED
            ]
            each = "  ".join(f"{depth}: {share:.1%}" for depth, share in listed)
            lines.append(f"{ROUTINGS[mode]:<10}{values['depth']:>11.3f}{loss:>9}   {each}")
        return lines

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
        parts = [observed.sequences.name, f"{len(tokens):,} tokens", *observed.sequences.notes]
        about = "; ".join([*parts, *observed.model.notes])
        return Page(
            title=f"Recursions per token: {observed.model.name}",
            about=f"{about}. Loss: nats, of the token itself. Hover over a token for its numbers.",
            routings={mode: ROUTINGS[mode] for mode in observed.passes},
            rows=[tokens[start:end] for start, end in connected_spans(observed)],
            recursions=observed.model.model.num_recursions,
        )

    def _lines(self) -> list[str]:
        """Pieces for the figure; unconnected sequences start on new lines."""
        pieces = list(self.pieces)
        if not self.observed.sequences.contiguous:
            for start in self.observed.sequence_starts()[1:]:
                if not pieces[start - 1].endswith("\n"):
                    pieces[start - 1] += "\n"
        return pieces


def make_map(observed: RoutingRecord) -> DepthMap:
    """The depth map of a routing record."""
    pieces = plain_text(observed)
    records = _records(observed, pieces)
    for index in np.flatnonzero(observed.token == observed.model.tokenizer.eos_id):
        pieces[index] = f"{END}\n"
    return DepthMap(observed, pieces, records)


def plain_text(observed: RoutingRecord) -> list[str]:
    """The text that each token adds; "" for the end of a document."""
    decode, pieces = observed.model.tokenizer.decode, []
    for start, end in connected_spans(observed):
        pieces += plots.text_pieces(observed.token[start:end], decode)
    for index in np.flatnonzero(observed.token == observed.model.tokenizer.eos_id):
        pieces[index] = ""
    return pieces


def connected_spans(observed: RoutingRecord) -> list[tuple[int, int]]:
    """Start and end of each connected text: every sequence of a source, or all of one text."""
    starts = [0] if observed.sequences.contiguous else observed.sequence_starts().tolist()
    return list(zip(starts, [*starts[1:], len(observed.token)], strict=True))


def _records(observed: RoutingRecord, pieces: Sequence[str]) -> list[dict[str, Any]]:
    """One record per token; docs/analysis.md describes the fields."""
    raw, cfg = token_bytes(observed.model.tokenizer), observed.model.model
    passes, records = observed.passes, []
    score = {mode: scores(cfg, each.logits) for mode, each in passes.items()}
    main = {m: scores(cfg, each.main) for m, each in passes.items() if each.main is not None}
    for index, piece in enumerate(pieces):
        token = int(observed.token[index])
        record: dict[str, Any] = {
            "index": index,
            "row": int(observed.sequence[index]),
            "position": int(observed.position[index]),
            "token": token,
            "text": piece,
            "bytes": raw(token).hex(),
            "depth": {mode: int(each.depth[index]) for mode, each in passes.items()},
            "loss": {mode: rounded(each.loss[index]) for mode, each in passes.items()},
            "scores": {mode: _list(values[:, index]) for mode, values in score.items()},
        }
        if main:
            record["main_scores"] = {mode: _list(values[:, index]) for mode, values in main.items()}
        records.append(record)
    return records


def _mean_loss(loss: np.ndarray) -> float | None:
    """Mean of the finite losses; None without any, as for a single token."""
    return rounded(np.nanmean(loss)) if np.isfinite(loss).any() else None


def _list(values: np.ndarray) -> list[float | None]:
    return [rounded(value, 4) for value in values]


def _title(record: dict[str, Any]) -> str:
    """The text that the page shows on hover."""
    lines = [f"{record['text']!r}  token {record['token']}, position {record['position']}"]
    for mode, depth in record["depth"].items():
        loss, scores_of_token = record["loss"][mode], record["scores"][mode]
        loss_text = "-" if loss is None else f"{loss:.2f} nats"
        each = " ".join("-" if score is None else f"{score:.3f}" for score in scores_of_token)
        lines.append(f"{ROUTINGS[mode]}: depth {depth}, loss {loss_text}, scores {each}")
    return "\n".join(lines)
