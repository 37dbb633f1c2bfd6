"""Shows what a run's routers do: a text coloured by depth, statistics, depth at test time.

    python launch/analyze.py map --workdir=runs/mor --prompt="def area(r):"
    python launch/analyze.py map --workdir=runs/mor --text=README.md --window
    python launch/analyze.py statistics --workdir=runs/mor
    python launch/analyze.py depth --workdir=runs/mor --recursions=1,2,3,6

Each writes a directory: tables as JSON lines, pictures as PNG, a map as HTML too. The text is the
held-out part of the run's own unless --text, --prompt or --source names another.
"""

import argparse
import json
import sys
from typing import Any

from mor_jax.cli import option_names
from mor_jax.runtime import exit_codes, platform
from mor_jax.runtime.preemption import Signals

_PATHS = {
    "data.sources": "source",
    "sources": "source",
    "sample.max_tokens": "max_tokens",
    "sample.temperature": "temperature",
    "sample.seed": "seed",
}
"""Options under other names than their settings."""


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    platform.skip_absent()
    from mor_jax.analysis import command

    given = dict(vars(options))
    as_json = given.pop("json")
    try:
        option_names.check_filled(options, "output", "calibration", "workdir", "text")
        result = command.run(given, _standard_input)
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
    # There is none where a caller has closed it.
    return b"" if sys.stdin is None else sys.stdin.buffer.read()


def _parser() -> argparse.ArgumentParser:
    about, _, more = (__doc__ or "").partition("\n")
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=about, epilog=more, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    told = "a text coloured by the depth of its tokens: HTML, PNG, JSON lines"
    shown = _command(commands, "map", told, tokens=4096)
    shown.add_argument("--recursions", type=int, help="to run, in place of those trained")
    told = "who goes deep, how the routers score, what top-k and causal routing have in common"
    shown = _command(commands, "statistics", told, tokens=65_536)
    shown.add_argument("--recursions", type=int, help="to run, in place of those trained")
    shown.add_argument(
        "--min_count", type=int, default=20, help="of a token in tables (default: 20)"
    )
    shown.add_argument("--pos", action="store_true", help="depth by part of speech, English")
    told = "loss and a sample against the number of recursions"
    shown = _command(commands, "depth", told, tokens=16_384)
    add = shown.add_argument
    add(
        "--recursions", help="such as 1,2,3,6; default: 1 to twice those trained, as far as it goes"
    )
    add("--sample", help="text to continue; default: the run's eval.prompt")
    add("--max_tokens", type=int, default=64, help="of a sample; 0 for none (default: 64)")
    add("--temperature", type=float, default=0.0, help="of samples (default: 0, the best token)")
    add("--seed", type=int, default=0, help="of samples")
    return parser


def _command(commands: Any, name: str, told: str, tokens: int) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=told, description=told)
    add = parser.add_argument
    add("--workdir", required=True, help="run to analyse")
    add("--step", type=int, help="checkpoint; default: the newest good one")
    add("--calibration", help="one of the run's, by name, or a file")
    text = parser.add_argument_group("text; default: the held-out part of the run's own")
    add = text.add_argument
    add("--text", help='a file; "-": the standard input')
    add("--prompt", help="a text itself")
    told = "all of it, written like data.sources; may be repeated"
    add("--source", action="append", help=told)
    add("--tokens", type=int, default=tokens, help=f"at most so many (default: {tokens})")
    add("--length", type=int, help="tokens of a row; default: the run's")
    add("--window", action="store_true", help="cut longer texts into rows of --length tokens")
    add("--batch_size", type=int, help="rows of a pass; default: the run's eval.batch_size")
    out = parser.add_argument_group("output")
    told = f"directory; default: <workdir>/analysis/{name}-STEP"
    out.add_argument("--output", help=told)
    told = "replace another analysis of this run"
    out.add_argument("--overwrite", action="store_true", help=told)
    out.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


if __name__ == "__main__":
    with Signals("what was under way was not written"):
        sys.exit(main())
