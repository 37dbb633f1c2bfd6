"""Statistics of a routed model on a text: depths, router scores, agreement, savings."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from mor_jax.analysis import maps, tables
from mor_jax.analysis.buckets import Buckets, by_frequency, by_loss, by_position, by_token
from mor_jax.analysis.figures import depth_figure, score_figure
from mor_jax.analysis.frequency import token_shares
from mor_jax.analysis.output_directory import FileContents, json_lines
from mor_jax.analysis.parts_of_speech import CLASSES, tagged, token_classes
from mor_jax.analysis.routing_record import ROUTINGS, RoutingRecord
from mor_jax.analysis.savings import dead_records, saving_records
from mor_jax.analysis.separation import agreement_records, choice_records, score_records
from mor_jax.inference.token_bytes import token_bytes

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Statistics:
    """All records, as docs/analysis.md describes them. notes: statistics that were omitted."""

    observed: RoutingRecord
    records: list[Record]
    min_count: int
    notes: tuple[str, ...] = ()

    def of(self, statistic: str, routing: str | None = None) -> list[Record]:
        """Records of one statistic in order. routing: only those of this routing."""
        records = [record for record in self.records if record["statistic"] == statistic]
        return [r for r in records if routing is None or r.get("routing") == routing]

    def files(self) -> dict[str, FileContents]:
        """statistics.jsonl, depth.png and scores.png."""
        model = self.observed.model
        mode = model.modes[0]
        grouped = {
            title: self.of(statistic, mode)
            for statistic, title in tables.GROUPED.items()
            if statistic != "token"
        }
        recursions, about = model.model.num_recursions, f"{model.name}, {ROUTINGS[mode]} routing"
        return {
            "statistics.jsonl": json_lines(self.records),
            "depth.png": lambda path: depth_figure(grouped, recursions, about, path),
            "scores.png": lambda path: score_figure(self.of("scores"), model.name, path),
        }

    def facts(self) -> Record:
        """Records by statistic, without groups of tokens and histogram counts: JSON values."""
        names = [
            n for n in _unique(r["statistic"] for r in self.records) if n not in tables.GROUPED
        ]
        bins = ("bins_chosen", "bins_other", "statistic")
        compact = {
            n: [{k: v for k, v in r.items() if k not in bins} for r in self.of(n)] for n in names
        }
        return {"tokens": len(self.observed.token), **compact}

    def lines(self) -> list[str]:
        """Tables for a terminal. Tables of groups show only the routing of generation."""
        mode = self.observed.model.modes[0]
        lines = tables.routings(self.of("routing"))
        lines += tables.agreement(self.of("agreement")) + tables.choice(self.of("choice"))
        lines += tables.scores(self.of("scores"))
        lines += tables.savings(self.of("savings")) + tables.dead(self.of("dead"), self.of("token"))
        for statistic, title in tables.GROUPED.items():
            records = self.of(statistic, mode)
            if statistic == "token":
                lines += tables.extremes(records, self.min_count)
            elif records:
                lines += tables.grouped(title, records)
        return lines[1:]


def _unique(names: Any) -> list[str]:
    return list(dict.fromkeys(names))


def measure(observed: RoutingRecord, min_count: int, pos: bool) -> Statistics:
    """All statistics. min_count: token types with fewer occurrences are not listed.

    pos: add parts of speech. Raises `ValueError` if their tagger is not installed.
    """
    model, notes = observed.model, []
    groups = [by_position(observed), by_token(observed, _display_names(observed))]
    try:
        share = token_shares(model.cfg.data, model.tokenizer, model.model.vocab_size)
        groups.append(by_frequency(observed, share))
    except ValueError as error:
        notes.append(f"omitted: depth by frequency in the training text ({error})")
    if pos:
        groups.append(_by_part_of_speech(observed))
    records = _routing_records(observed)
    records += agreement_records(observed) + choice_records(observed) + score_records(observed)
    records += saving_records(observed) + dead_records(observed, min_count)
    for mode, routing_pass in observed.passes.items():
        losses = [by_loss(observed, routing_pass, which) for which in ("loss", "ahead")]
        for group in [*groups, *losses]:
            records += group.records(mode, routing_pass, model.model.num_recursions)
    return Statistics(observed, records, min_count, tuple(notes))


def _routing_records(observed: RoutingRecord) -> list[Record]:
    """One record per routing, over all tokens."""
    label = np.zeros(len(observed.token), int)
    everything = Buckets("routing", label, ["all tokens"], [{}])
    nr = observed.model.model.num_recursions
    records = []
    for mode, routing_pass in observed.passes.items():
        records += everything.records(mode, routing_pass, nr)
    return records


def _display_names(observed: RoutingRecord) -> dict[int, str]:
    """Display name of each token type: its text, or its bytes if they are not UTF-8."""
    raw = token_bytes(observed.model.tokenizer)
    names = {}
    for token in np.unique(observed.token).tolist():
        try:
            names[token] = repr(raw(token).decode("utf-8"))
        except UnicodeDecodeError:
            names[token] = "0x" + raw(token).hex()
        if token == observed.model.tokenizer.eos_id:
            names[token] = "end of document"
    return names


def _by_part_of_speech(observed: RoutingRecord) -> Buckets:
    pieces, label = maps.plain_text(observed), []
    for start, end in maps.connected_spans(observed):
        span = pieces[start:end]
        label.append(token_classes(span, tagged("".join(span))))
    extra: Sequence[Record] = [{} for _ in CLASSES]
    return Buckets("part_of_speech", np.concatenate(label), CLASSES, extra)
