"""Sets the mean depth of generation: thresholds of causal routing, computed from text.

    mor calibrate --workdir=runs/mor --mean_depth=1.5 --name=fast
    mor calibrate --workdir=runs/mor --curve
    mor generate --workdir=runs/mor --calibration=fast --prompt="def "

Writes `<workdir>/calibrations/<name>.json`: for expert-choice a threshold for each recursion, for
token-choice a bias for each depth. The default target is the capacity of each recursion in
training. Thresholds are computed on one half of the text and measured on the other.
"""

import argparse
import json
import sys

from mor_jax.cli import option_names
from mor_jax.cli.parser import CommandParser
from mor_jax.runtime import exit_codes, platform
from mor_jax.runtime.preemption import Signals

_PATHS = {
    "eval.batches": "batches",
    "eval.batch_size": "batch_size",
    "data.sources": "source",
    "seq_len": "length",
}
"""Options whose names differ from their settings."""

POINTS = 9
"""Depths of a curve."""


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    platform.use_cpu_without_accelerator()
    from mor_jax.calibration import calibrate
    from mor_jax.checkpoint.load_weights import load_run
    from mor_jax.evaluation import EvalRequest

    asked = EvalRequest(
        sources=None if options.source is None else tuple(options.source),
        length=options.length,
        batches=options.batches,
        batch_size=options.batch_size,
        recursions=options.recursions,
    )
    try:
        option_names.check_filled(options, "name", "workdir")
        aim = calibrate.CalibrationTarget(
            shares=_numbers(options.shares), depth=options.mean_depth, points=_points(options)
        )
        found = load_run(options.workdir, options.step)
        calibrate.check_name(found, options.name)
        measured = calibrate.calibrate(found, asked, aim)
        files = calibrate.write(measured, options.name)
    except ValueError as error:
        typed = option_names.options(options, _PATHS)
        print(f"error: {option_names.as_typed(error, typed)}", file=sys.stderr)
        return exit_codes.of(error)
    if options.json:
        print(json.dumps(measured.to_dict()))
    else:
        print("\n".join([*measured.lines(), "", *(f"wrote {file}" for file in files)]))
    return exit_codes.OK


def _points(options: argparse.Namespace) -> int | None:
    """Of the curve, None without one."""
    if options.curve:
        return POINTS if options.points is None else options.points
    if options.points is not None:
        raise ValueError(f"points={options.points}: is of a curve. Add --curve, or leave it out")
    return None


def _numbers(text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        rule = "must be numbers like 1,0.5,0.25. Try --mean_depth=1.5"
        raise ValueError(f"shares={text!r}: {rule}") from None


def _parser() -> CommandParser:
    parser = CommandParser(__doc__)
    parser.add_argument("--workdir", required=True, help="run to calibrate")
    parser.add_argument(
        "--step", type=int, help="step of the checkpoint; default: the newest good one"
    )
    parser.add_argument(
        "--name", default="default", help="name of the calibration (default: default)"
    )
    parser.add_argument(
        "--shares", help="target share of tokens at each recursion, such as 1,0.5,0.25"
    )
    parser.add_argument(
        "--mean_depth", type=float, help="target mean depth in recursions, instead of --shares"
    )
    parser.add_argument(
        "--recursions", type=int, help="number of recursions to run; default: as trained"
    )
    parser.add_argument(
        "--source",
        action="append",
        help="text to calibrate on, written like data.sources; all of it is used; may be repeated; "
        "default: the validation part of the run's own text",
    )
    parser.add_argument("--length", type=int, help="sequence length in tokens; default: the run's")
    parser.add_argument(
        "--batches", type=int, help="batches of each half; default: the run's eval.batches"
    )
    parser.add_argument(
        "--batch_size", type=int, help="sequences per batch; default: the run's eval.batch_size"
    )
    parser.add_argument("--curve", action="store_true", help="also measure loss against mean depth")
    parser.add_argument("--points", type=int, help=f"points of the curve (default: {POINTS})")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


if __name__ == "__main__":
    with Signals("nothing was written"):
        sys.exit(main())
