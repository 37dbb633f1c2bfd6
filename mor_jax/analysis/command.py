"""The commands of `mor analyze`: from options to an output directory and a table."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mor_jax.analysis import maps, recursions, statistics
from mor_jax.analysis.output_directory import AnalysisOutput
from mor_jax.analysis.parts_of_speech import check_tagger
from mor_jax.analysis.routing_record import Model, observe, routed_model
from mor_jax.analysis.text_input import TextRequest, TokenBatches, read, utf8
from mor_jax.checkpoint.load_weights import RunWeights, load_run
from mor_jax.config.parsing import check

Given = Mapping[str, Any]
Stdin = Callable[[], bytes]


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of a command.

    head: lines about run and text. table: lines. facts: JSON values. files: those written.
    """

    head: list[str]
    table: list[str]
    facts: dict[str, Any]
    files: list[Path]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {**self.facts, "files": [str(file) for file in self.files]}

    def lines(self) -> list[str]:
        """The report for a terminal."""
        return [*self.head, "", *self.table, "", *(f"wrote {file}" for file in self.files)]


def run(given: Given, stdin: Stdin) -> Result:
    """Runs given["command"] (`map`, `statistics`, `depth`) with the command line's options.

    stdin: reads all of the standard input. Raises `ValueError` for a bad option, run or text; then
    nothing is written.
    """
    found = load_run(given["workdir"], given["step"])
    commands = {"map": _map, "statistics": _statistics, "depth": _depth}
    return commands[given["command"]](found, given, stdin)


def _wanted(given: Given) -> TextRequest:
    names = ("text", "prompt", "tokens", "length", "window", "batch_size")
    sources = None if given["source"] is None else tuple(given["source"])
    return TextRequest(sources=sources, **{name: given[name] for name in names})


def _place(found: RunWeights, given: Given, rows: TokenBatches) -> AnalysisOutput:
    """The output directory, with the request: the options that the result depends on.

    Raises `ValueError` if the directory may not be written, before anything is computed.
    """
    request = {
        name: value
        for name, value in given.items()
        if name not in ("output", "overwrite") and value is not None
    }
    request |= {"workdir": str(found.path), "step": found.step, "digest": rows.digest}
    default = f"{given['command']}-{found.step}"
    return AnalysisOutput.of(given["output"], request, default, given["overwrite"])


def _head(model: object, rows: TokenBatches, notes: tuple[str, ...] = ()) -> list[str]:
    summary = f"{rows.name}: {rows.tokens:,} tokens in sequences of {rows.length}"
    return [str(model), summary, *(f"  {note}" for note in (*rows.notes, *notes))]


def _map(found: RunWeights, given: Given, stdin: Stdin) -> Result:
    model: Model = routed_model(found, given["calibration"], given["recursions"])
    rows = read(model.cfg, model.tokenizer, _wanted(given), stdin)
    place = _place(found, given, rows)
    made = maps.make_map(observe(model, rows))
    files = place.write(made.facts(), made.files())
    return Result(_head(model, rows, model.notes), made.lines(), made.facts(), files)


def _statistics(found: RunWeights, given: Given, stdin: Stdin) -> Result:
    least = given["min_count"]
    check(least > 0, "min_count", least, "must be greater than 0", "Try 20")
    if given["pos"]:
        check_tagger()
    model: Model = routed_model(found, given["calibration"], given["recursions"])
    rows = read(model.cfg, model.tokenizer, _wanted(given), stdin)
    place = _place(found, given, rows)
    made = statistics.measure(observe(model, rows), least, given["pos"])
    files = place.write(made.facts(), made.files())
    head = _head(model, rows, (*model.notes, *made.notes))
    return Result(head, made.lines(), made.facts(), files)


def _depth(found: RunWeights, given: Given, stdin: Stdin) -> Result:
    model = recursions.truncate_model(found, given["calibration"], numbers(given["recursions"]))
    rows = read(model.cfg, model.tokenizer, _wanted(given), stdin)
    place = _place(found, given, rows)
    text = found.cfg.eval.prompt
    if given["sample"] is not None:
        text = utf8("sample", given["sample"], "Give text")
    sample = recursions.Sample(
        text=text,
        max_tokens=given["max_tokens"],
        temperature=given["temperature"],
        seed=given["seed"],
    )
    made = recursions.measure(model, rows, sample)
    files = place.write(made.facts(), made.files())
    named = found.changes(found.cfg.model.num_recursions, given["calibration"])
    return Result(_head(f"{found}{named}", rows, model.notes), made.lines(), made.facts(), files)


def numbers(text: str | None) -> tuple[int, ...] | None:
    """`1,2,6` as numbers; None for None. Raises `ValueError` for other text."""
    if text is None:
        return None
    parts = text.split(",")
    rule = "must be whole numbers with commas between them"
    check(all(part.strip().isdecimal() for part in parts), "recursions", text, rule, "Try 1,2,3")
    return tuple(int(part) for part in parts)
