"""The commands of `mor analyze`: from options to an output directory and a table."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mor_jax.analysis import maps, recursions, statistics
from mor_jax.analysis.output_directory import AnalysisOutput
from mor_jax.analysis.parts_of_speech import check_tagger
from mor_jax.analysis.routing_record import RoutedModel, observe, routed_model
from mor_jax.analysis.text_input import TextRequest, TokenBatches, read_sequences, utf8
from mor_jax.checkpoint.load_weights import RunWeights, load_run
from mor_jax.config.parsing import check

Options = Mapping[str, Any]
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


def run(options: Options, stdin: Stdin) -> Result:
    """Runs options["command"] (`map`, `statistics`, `depth`) on the command line's options.

    stdin: reads all of the standard input. Raises `ValueError` for a bad option, run or text; then
    nothing is written.
    """
    weights = load_run(options["workdir"], options["step"])
    commands = {"map": _map, "statistics": _statistics, "depth": _depth}
    return commands[options["command"]](weights, options, stdin)


def _text_request(options: Options) -> TextRequest:
    names = ("text", "prompt", "tokens", "length", "window", "batch_size")
    sources = None if options["source"] is None else tuple(options["source"])
    return TextRequest(sources=sources, **{name: options[name] for name in names})


def _output(weights: RunWeights, options: Options, sequences: TokenBatches) -> AnalysisOutput:
    """The output directory, with the request: the options that the result depends on.

    Raises `ValueError` if the directory may not be written, before anything is computed.
    """
    request = {
        name: value
        for name, value in options.items()
        if name not in ("output", "overwrite") and value is not None
    }
    request |= {"workdir": str(weights.path), "step": weights.step, "digest": sequences.digest}
    default = f"{options['command']}-{weights.step}"
    return AnalysisOutput.of(options["output"], request, default, options["overwrite"])


def _head(model: object, sequences: TokenBatches, notes: tuple[str, ...] = ()) -> list[str]:
    summary = f"{sequences.name}: {sequences.tokens:,} tokens in sequences of {sequences.length}"
    return [str(model), summary, *(f"  {note}" for note in (*sequences.notes, *notes))]


def _map(weights: RunWeights, options: Options, stdin: Stdin) -> Result:
    model: RoutedModel = routed_model(weights, options["calibration"], options["recursions"])
    sequences = read_sequences(model.cfg, model.tokenizer, _text_request(options), stdin)
    output = _output(weights, options, sequences)
    report = maps.make_map(observe(model, sequences))
    files = output.write(report.facts(), report.files())
    return Result(_head(model, sequences, model.notes), report.lines(), report.facts(), files)


def _statistics(weights: RunWeights, options: Options, stdin: Stdin) -> Result:
    min_count = options["min_count"]
    check(min_count > 0, "min_count", min_count, "must be greater than 0", "Try 20")
    if options["pos"]:
        check_tagger()
    model: RoutedModel = routed_model(weights, options["calibration"], options["recursions"])
    sequences = read_sequences(model.cfg, model.tokenizer, _text_request(options), stdin)
    output = _output(weights, options, sequences)
    report = statistics.measure(observe(model, sequences), min_count, options["pos"])
    files = output.write(report.facts(), report.files())
    head = _head(model, sequences, (*model.notes, *report.notes))
    return Result(head, report.lines(), report.facts(), files)


def _depth(weights: RunWeights, options: Options, stdin: Stdin) -> Result:
    model = recursions.truncate_model(
        weights, options["calibration"], numbers(options["recursions"])
    )
    sequences = read_sequences(model.cfg, model.tokenizer, _text_request(options), stdin)
    output = _output(weights, options, sequences)
    text = weights.cfg.eval.prompt
    if options["sample"] is not None:
        text = utf8("sample", options["sample"], "Give text")
    sample = recursions.Sample(
        text=text,
        max_tokens=options["max_tokens"],
        temperature=options["temperature"],
        seed=options["seed"],
    )
    report = recursions.measure(model, sequences, sample)
    files = output.write(report.facts(), report.files())
    named = weights.changes(weights.cfg.model.num_recursions, options["calibration"])
    return Result(
        _head(f"{weights}{named}", sequences, model.notes), report.lines(), report.facts(), files
    )


def numbers(text: str | None) -> tuple[int, ...] | None:
    """`1,2,6` as numbers; None for None. Raises `ValueError` for other text."""
    if text is None:
        return None
    parts = text.split(",")
    rule = "must be whole numbers with commas between them"
    check(all(part.strip().isdecimal() for part in parts), "recursions", text, rule, "Try 1,2,3")
    return tuple(int(part) for part in parts)
