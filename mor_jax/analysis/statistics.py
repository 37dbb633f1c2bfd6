"""Statistics of a routed model on a text: who goes deep, how the routers score, what it saves."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from mor_jax.analysis import maps, tables
from mor_jax.analysis.buckets import Buckets, by_frequency, by_loss, by_position, by_token
from mor_jax.analysis.figures import depth_figure, score_figure
from mor_jax.analysis.frequency import token_shares
from mor_jax.analysis.output_directory import Write, json_lines
from mor_jax.analysis.parts_of_speech import CLASSES, tagged, token_classes
from mor_jax.analysis.routing_record import ROUTINGS, RoutingRecord
from mor_jax.analysis.savings import dead_records, saving_records
from mor_jax.analysis.separation import agreement_records, choice_records, score_records
from mor_jax.inference.token_bytes import token_bytes

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Statistics:
    """Records of everything, as docs/analysis.md describes them. notes: what is left out."""

    observed: RoutingRecord
    records: list[Record]
    min_count: int
    notes: tuple[str, ...] = ()

    def of(self, statistic: str, routing: str | None = None) -> list[Record]:
        """Records of one statistic, in order; routing: of that alone."""
        found = [record for record in self.records if record["statistic"] == statistic]
        return [r for r in found if routing is None or r.get("routing") == routing]

    def files(self) -> dict[str, Write]:
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
        """All records but those of groups of tokens, by statistic."""
        names = [
            n for n in _unique(r["statistic"] for r in self.records) if n not in tables.GROUPED
        ]
        bins = ("bins_chosen", "bins_other", "statistic")
        cut = {
            n: [{k: v for k, v in r.items() if k not in bins} for r in self.of(n)] for n in names
        }
        return {"tokens": len(self.observed.token), **cut}

    def lines(self) -> list[str]:
        """Tables for a terminal, under the routing that generation uses where there are two."""
        mode = self.observed.model.modes[0]
        made = tables.routings(self.of("routing"))
        made += tables.agreement(self.of("agreement")) + tables.choice(self.of("choice"))
        made += tables.scores(self.of("scores"))
        made += tables.savings(self.of("savings")) + tables.dead(self.of("dead"), self.of("token"))
        for statistic, title in tables.GROUPED.items():
            found = self.of(statistic, mode)
            if statistic == "token":
                made += tables.extremes(found, self.min_count)
            elif found:
                made += tables.grouped(title, found)
        return made[1:]


def _unique(names: Any) -> list[str]:
    return list(dict.fromkeys(names))


def measure(observed: RoutingRecord, min_count: int, pos: bool) -> Statistics:
    """All statistics. min_count: occurrences below which a kind of token is not judged.

    pos: parts of speech as well. Raises `ValueError` if their tagger is missing.
    """
    model, notes = observed.model, []
    groups = [by_position(observed), by_token(observed, _texts(observed))]
    try:
        share = token_shares(model.cfg.data, model.tokenizer, model.model.vocab_size)
        groups.append(by_frequency(observed, share))
    except ValueError as error:
        notes.append(f"left out: depth by frequency in the training text ({error})")
    if pos:
        groups.append(_by_part_of_speech(observed))
    records = _routing_records(observed)
    records += agreement_records(observed) + choice_records(observed) + score_records(observed)
    records += saving_records(observed) + dead_records(observed, min_count)
    for mode, one in observed.passes.items():
        losses = [by_loss(observed, one, which) for which in ("loss", "ahead")]
        for group in [*groups, *losses]:
            records += group.records(mode, one, model.model.num_recursions)
    return Statistics(observed, records, min_count, tuple(notes))


def _routing_records(observed: RoutingRecord) -> list[Record]:
    """Everything as one group."""
    label = np.zeros(len(observed.token), int)
    everything = Buckets("routing", label, ["all tokens"], [{}])
    nr = observed.model.model.num_recursions
    return [r for mode, one in observed.passes.items() for r in everything.records(mode, one, nr)]


def _texts(observed: RoutingRecord) -> dict[int, str]:
    """What people see of each kind of token: its text, or its bytes where it is no text."""
    raw = token_bytes(observed.model.tokenizer)
    texts = {}
    for token in np.unique(observed.token).tolist():
        try:
            texts[token] = repr(raw(token).decode("utf-8"))
        except UnicodeDecodeError:
            texts[token] = "0x" + raw(token).hex()
        if token == observed.model.tokenizer.eos_id:
            texts[token] = "end of document"
    return texts


def _by_part_of_speech(observed: RoutingRecord) -> Buckets:
    pieces, label = maps.plain_text(observed), []
    for start, end in maps.stretches(observed):
        here = pieces[start:end]
        label.append(token_classes(here, tagged("".join(here))))
    extra: Sequence[Record] = [{} for _ in CLASSES]
    return Buckets("part_of_speech", np.concatenate(label), CLASSES, extra)
