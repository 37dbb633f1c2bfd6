"""Evaluates a run on text, or on tasks of lm-evaluation-harness.

    mor evaluate --workdir=runs/mor
    mor evaluate --workdir=runs/smollm2 --source="text:docs/*.md" --length=512
    mor evaluate --workdir=runs/mor --tasks=hellaswag,piqa --num_fewshot=5 --limit=100
    mor evaluate --workdir=runs/mor --watch

The newest good checkpoint is used, or the weights that the run starts from. On text: loss (nats per
token), perplexity, bits per byte, accuracy and mean depth, also by depth, position and source;
routed models are evaluated under causal and under top-k routing. On tasks: every option of
lm-evaluation-harness (python -m lm_eval run --help) but --model and --device is passed on;
--tasks=paper runs the tasks of the Mixture-of-Recursions paper. Training may continue in the same
directory.
"""

import argparse
import json
import sys
from typing import TYPE_CHECKING

from mor_jax.cli import option_names
from mor_jax.cli.parser import CommandParser
from mor_jax.runtime import exit_codes, platform
from mor_jax.runtime.preemption import Signals

if TYPE_CHECKING:
    from mor_jax.config import TrainConfig
    from mor_jax.evaluation.eval_runner import EvalRunner

_PATHS = {
    "eval.batches": "batches",
    "eval.batch_size": "batch_size",
    "data.sources": "source",
    "seq_len": "length",
    "evaluation.fsdp": "fsdp",
}
"""Options whose names differ from their settings."""


def main(argv: list[str] | None = None) -> int:
    options, others = _options(argv)
    platform.use_cpu_without_accelerator()
    try:
        option_names.check_filled(options, "output", "figure", "calibration", "workdir")
        _watch(options, others) if options.watch else _once(options, others)
    except ValueError as error:
        typed = option_names.options(options, _PATHS)
        typed |= option_names.words(others, groups=("model_args", "gen_kwargs"))
        print(f"error: {option_names.as_typed(error, typed)}", file=sys.stderr)
        return exit_codes.of(error)
    return exit_codes.OK


def _once(options: argparse.Namespace, others: list[str]) -> None:
    from mor_jax.checkpoint.load_weights import load_run
    from mor_jax.evaluation.plot import check_path, draw
    from mor_jax.evaluation.results import EvalLog

    if options.figure:
        check_path(options.figure)
    found = load_run(options.workdir, options.step)
    questions = _questions(options, others, found.cfg)
    records = EvalLog(options.output, questions.result()) if options.output else None
    answer = questions(found)
    # First of all: a full disk takes no result away.
    print(json.dumps(answer.to_dict()) if options.json else "\n".join(answer.lines()), flush=True)
    if records is not None:
        records.append(found.step, answer.record())
    if options.figure and answer.text is not None:
        draw(answer.text.to_dict(), options.figure)


def _watch(options: argparse.Namespace, others: list[str]) -> None:
    from mor_jax.checkpoint import run_dir
    from mor_jax.evaluation.eval_runner import line
    from mor_jax.evaluation.results import FILE, EvalLog
    from mor_jax.evaluation.watch_checkpoints import CheckpointWatcher

    path = run_dir.resolved_path(options.workdir)
    questions = _questions(options, others, run_dir.read_config(path))
    records = EvalLog(options.output or path / FILE, questions.result())
    watch = CheckpointWatcher(
        path, records, poll=30.0 if options.poll is None else options.poll, report=_note
    )
    for record in watch(lambda found: questions(found).record()):
        print(json.dumps(record) if options.json else line(record), flush=True)


def _questions(options: argparse.Namespace, others: list[str], cfg: "TrainConfig") -> "EvalRunner":
    from mor_jax.evaluation import EvalRequest
    from mor_jax.evaluation.eval_runner import EvalRunner, Tasks

    rows, tasks = options.batch_size, None
    if options.tasks:
        names, given = tuple(options.tasks), tuple(others)
        tasks = Tasks(names=names, options=given, batch_size=options.batch_size)
    asked = EvalRequest(
        sources=None if options.source is None else tuple(options.source),
        length=options.length,
        batches=options.batches,
        batch_size=int(rows) if rows and rows.isdecimal() else None,
        fsdp=options.fsdp,
        calibration=options.calibration,
        recursions=options.recursions,
    )
    text = not tasks or options.text or options.source is not None
    return EvalRunner(cfg, asked, text, tasks)


def _note(news: str) -> None:
    print(news, file=sys.stderr, flush=True)


def _options(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Our options, and those that are lm-eval's."""
    parser = _parser()
    options, others = parser.parse_known_args(argv)
    if others and not options.tasks:
        parser.error(f"unknown options (they are passed on only with --tasks): {' '.join(others)}")
    rows = options.batch_size
    if rows is not None and not (rows.isdecimal() or (options.tasks and rows.startswith("auto"))):
        parser.error(f"argument --batch_size: invalid number of rows: {rows!r}")
    if options.watch and (options.step is not None or options.figure):
        parser.error("--watch evaluates every checkpoint: leave out --step and --figure")
    if options.poll is not None and not options.watch:
        parser.error("--poll needs --watch")
    if options.tasks and "" in options.tasks:
        parser.error("--tasks is empty: name tasks, or leave it out")
    if options.figure and options.tasks and not (options.text or options.source):
        parser.error("--figure shows losses on text: add --text or --source")
    return options, others


def _parser() -> CommandParser:
    parser = CommandParser(__doc__)
    add = parser.add_argument
    add("--workdir", required=True, help="run to evaluate")
    add("--step", type=int, help="step of the checkpoint; default: the newest good one")
    add(
        "--source",
        action="append",
        help="text to evaluate on, written like data.sources; all of it is used; may be repeated; "
        "default: "
        "the validation part of the run's own text",
    )
    add("--length", type=int, help="sequence length of text in tokens; default: the run's")
    add("--batches", type=int, help="batches of text; default: the run's eval.batches")
    add(
        "--batch_size",
        help="sequences per batch; default: the run's eval.batch_size; for tasks: auto",
    )
    add("--fsdp", type=int, default=1, help="devices over which each parameter is sharded")
    add("--calibration", help="name of a calibration of the run, or a file")
    add("--recursions", type=int, help="number of recursions to run; default: as trained")
    add(
        "--tasks",
        nargs="+",
        help="tasks of lm-evaluation-harness instead of text; its other options may follow",
    )
    add("--text", action="store_true", help="with --tasks: evaluate on text as well")
    add("--watch", action="store_true", help="evaluate every checkpoint, and each new one")
    add("--poll", type=float, help="seconds between two checks of --watch; default 30")
    add("--output", help="JSON lines file to append to; default with --watch: that of the run")
    add("--figure", help="figure of the losses by position and depth: FILE.png")
    add("--json", action="store_true", help="print one JSON object for each checkpoint")
    return parser


if __name__ == "__main__":
    with Signals("recorded results are kept"):
        sys.exit(main())
