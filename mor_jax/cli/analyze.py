"""Shows what the routers of a run do: depth maps, routing statistics, loss against recursions.

    mor analyze map --workdir=runs/mor --prompt="def area(r):"
    mor analyze map --workdir=runs/mor --text=README.md --window
    mor analyze statistics --workdir=runs/mor
    mor analyze depth --workdir=runs/mor --recursions=1,2,3,6

Each command writes a directory: tables as JSON lines, figures as PNG, maps also as HTML. The text
is the run's validation split, unless --text, --prompt or --source names another.
"""

import json
import sys
from typing import Any

from mor_jax.cli import option_names
from mor_jax.cli.parser import CommandParser
from mor_jax.runtime import exit_codes, platform
from mor_jax.runtime.preemption import Signals

_PATHS = {
    "data.sources": "source",
    "sources": "source",
    "sample.max_tokens": "max_tokens",
    "sample.temperature": "temperature",
    "sample.seed": "seed",
}
"""Options whose names differ from their settings."""


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    platform.use_cpu_without_accelerator()
    from mor_jax.analysis import command

    values = dict(vars(options))
    as_json = values.pop("json")
    try:
        option_names.check_filled(options, "output", "calibration", "workdir", "text")
        result = command.run(values, _standard_input)
    except ValueError as error:
        typed = option_names.options(options, _PATHS)
        print(f"error: {option_names.as_typed(error, typed)}", file=sys.stderr)
        return exit_codes.of(error)
    if as_json:
        print(json.dumps(result.to_dict()))
    else:
        print("\n".join(result.lines()))
    return exit_codes.OK


def _standard_input() -> bytes:
    # None if the caller closed it.
    return b"" if sys.stdin is None else sys.stdin.buffer.read()


def _parser() -> CommandParser:
    parser = CommandParser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    about = "depth map: a text with its tokens coloured by depth, as HTML, PNG and JSON lines"
    shown = _command(commands, "map", about, tokens=4096)
    shown.add_argument(
        "--recursions", type=int, help="number of recursions to run; default: as trained"
    )
    about = "depth by groups of tokens, router scores, agreement of causal and top-k routing"
    shown = _command(commands, "statistics", about, tokens=65_536)
    shown.add_argument(
        "--recursions", type=int, help="number of recursions to run; default: as trained"
    )
    shown.add_argument(
        "--min_count",
        type=int,
        default=20,
        help="list only token types with at least this many occurrences (default: 20)",
    )
    shown.add_argument(
        "--pos", action="store_true", help="also depth by part of speech (English; needs textblob)"
    )
    about = "loss and a sample for several numbers of recursions"
    shown = _command(commands, "depth", about, tokens=16_384)
    add = shown.add_argument
    add(
        "--recursions",
        help="numbers to run, such as 1,2,3,6; default: 1 to twice the trained number",
    )
    add("--sample", help="text to continue; default: the run's eval.prompt")
    add(
        "--max_tokens",
        type=int,
        default=64,
        help="tokens of the sample; 0: no sample (default: 64)",
    )
    add(
        "--temperature",
        type=float,
        default=0.0,
        help="sampling temperature (default: 0, greedy)",
    )
    add("--seed", type=int, default=0, help="random seed of the sample")
    return parser


def _command(commands: Any, name: str, about: str, tokens: int) -> CommandParser:
    parser = commands.add_parser(name, help=about, description=about)
    add = parser.add_argument
    add("--workdir", required=True, help="run to analyse")
    add("--step", type=int, help="step of the checkpoint; default: the newest good one")
    add("--calibration", help="name of a calibration of the run, or a file")
    text = parser.add_argument_group("text; default: the run's validation split")
    add = text.add_argument
    add("--text", help='text file; "-": standard input')
    add("--prompt", help="the text itself")
    about = "source written like data.sources, all of it is read; may be repeated"
    add("--source", action="append", help=about)
    add("--tokens", type=int, default=tokens, help=f"largest number of tokens (default: {tokens})")
    add("--length", type=int, help="sequence length in tokens; default: the run's")
    add("--window", action="store_true", help="cut longer texts into sequences of --length tokens")
    add("--batch_size", type=int, help="sequences per batch; default: the run's eval.batch_size")
    out = parser.add_argument_group("output")
    about = f"directory; default: <workdir>/analysis/{name}-STEP"
    out.add_argument("--output", help=about)
    about = "replace another analysis of this run"
    out.add_argument("--overwrite", action="store_true", help=about)
    out.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


if __name__ == "__main__":
    with Signals("the unfinished analysis was not written"):
        sys.exit(main())
