"""Generates text with the newest checkpoint of a run, or the weights that it starts from.

    mor generate --workdir=runs/mor --prompt="def "
    mor generate --workdir=runs/mor --prompt="def " --temperature=0 --depth_colours
    mor generate --workdir=runs/mor --prompt="class " --top_p=0.9 --n=4 --seed=7
    echo "import " | mor generate --workdir=runs/mor --prompt=-
    mor generate --workdir=runs/mor --jsonl=prompts.jsonl --output=answers.jsonl

A line of --jsonl holds a "prompt" (a text or token ids) or "messages", and may hold an "id" and the
sampling settings below. Answers keep the order of the prompts.
"""

import argparse
import io
import os
import sys
from collections.abc import Callable
from typing import Any

from mor_jax.cli import option_names
from mor_jax.cli.parser import CommandParser
from mor_jax.runtime import exit_codes, platform
from mor_jax.runtime.preemption import Signals

_PATHS = {"engine.slots": "slots", "engine.cache_bytes": "cache"}
"""Options whose names differ from their settings."""


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    platform.use_cpu_without_accelerator()
    try:
        return _generate(options)
    except BrokenPipeError:
        # The reader of the output has enough. The interpreter's own flush must not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return exit_codes.OK
    # A full disk, or less memory than requested.
    except (OSError, MemoryError) as error:
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
        return exit_codes.ERROR


def _generate(typed: argparse.Namespace) -> int:
    from rich.console import Console

    from mor_jax.config.parsing import parse_bytes
    from mor_jax.inference.cli.generate import GenerateOptions, generate
    from mor_jax.inference.cli.prompts import COMMAND_LINE, PromptSettings
    from mor_jax.inference.engine.request import Stopped

    given, names = dict(vars(typed)), PromptSettings.__dataclass_fields__
    settings = {name: given.pop(name) for name in names}
    prompts, cache = tuple(given.pop("prompt")), given.pop("cache")
    try:
        option_names.check_filled(typed, "output", "calibration", "workdir", "jsonl")
        options = GenerateOptions(
            **given,
            prompts=prompts,
            settings=PromptSettings(**{**settings, "stop": tuple(settings["stop"])}),
            cache_bytes=None if cache is None else parse_bytes("cache", cache),
        )
        console = Console(highlight=False, markup=False, emoji=False)
        totals = generate(options, _standard_input, console)
    except (ValueError, Stopped) as error:
        paths = {f"{COMMAND_LINE}.{name}": name for name in settings} | _PATHS
        names = option_names.options(typed, paths)
        print(f"error: {option_names.as_typed(error, names)}", file=sys.stderr)
        return exit_codes.of(error)
    for message in totals.errors:
        print(f"error: {message}", file=sys.stderr)
    return exit_codes.ERROR if totals.errors else exit_codes.OK


def _standard_input() -> bytes:
    # None if the caller has closed it.
    return b"" if sys.stdin is None else sys.stdin.buffer.read()


def _parser() -> CommandParser:
    parser = CommandParser(__doc__)
    add = parser.add_argument
    add("--workdir", required=True, help="run directory")
    add("--step", type=int, help="step of the checkpoint; default: the newest good one")
    add("--calibration", help="name or file of thresholds made by mor calibrate")
    add("--recursions", type=int, help="number of recursions to run; default: as trained")
    add(
        "--prompt", action="append", default=[], help='prompt; may be repeated; "-": standard input'
    )
    add("--jsonl", help='prompts as JSON lines: a file, or "-" for standard input')
    add(
        "--chat",
        action="store_true",
        help="each prompt is a message of the user, in the chat template",
    )
    add("--system", help="system message of the chat")
    _add_settings(parser.add_argument_group("sampling").add_argument)
    shown = parser.add_argument_group("output")
    add = shown.add_argument
    either = argparse.BooleanOptionalAction
    add(
        "--stream", action=either, help="print tokens as they are generated; default: in a terminal"
    )
    add("--echo", action=either, help="print the prompt before the answer; default: in a terminal")
    add("--depth_colours", action="store_true", help="colour tokens by depth")
    add("--json", action="store_true", help="print answers as JSON lines; implied by --jsonl")
    add("--output", help="JSON lines file; it appears when all answers are complete")
    add("--overwrite", action="store_true", help="replace an existing output file")
    work = parser.add_argument_group("engine")
    work.add_argument(
        "--slots", type=int, help="answers generated at the same time (default: up to 32)"
    )
    work.add_argument("--cache", help="memory of the KV cache, such as 2GB")
    return parser


def _add_settings(add: Callable[..., Any]) -> None:
    add(
        "--max_tokens",
        type=int,
        help="length of the answer; default: 256, or what the context has left",
    )
    add("--temperature", type=float, default=1.0, help="0 takes the likeliest token (default: 1)")
    add("--top_k", type=int, help="only the k likeliest tokens")
    add(
        "--top_p",
        type=float,
        default=1.0,
        help="the fewest tokens whose probabilities add up to this",
    )
    add(
        "--min_p",
        type=float,
        default=0.0,
        help="only tokens with at least this fraction of the largest probability",
    )
    add(
        "--repetition_penalty",
        type=float,
        default=1.0,
        help="above 1: makes tokens of the prompt and the answer less likely",
    )
    add(
        "--presence_penalty", type=float, default=0.0, help="makes tokens of the answer less likely"
    )
    add("--frequency_penalty", type=float, default=0.0, help="the same, for each occurrence")
    add("--seed", type=int, help="makes answers reproducible; default: random")
    add("--n", type=int, default=1, help="answers per prompt (default: 1)")
    add(
        "--stop",
        action="append",
        default=[],
        help="stop string, not part of the answer; may be repeated",
    )
    add("--ignore_eos", action="store_true", help="continue after the end-of-text token")
    add("--logprobs", type=int, help="log-probabilities, with this many alternatives (0 to 20)")


def _tidy(_: str) -> None:
    """Removes an unfinished output and the status line."""
    files = sys.modules.get("mor_jax.files")
    if files is not None:
        files.remove_drafts()
    if sys.stderr.isatty():
        # Shows the cursor again.
        sys.stderr.write("\x1b[?25h\n")
        sys.stderr.flush()


if __name__ == "__main__":
    signals = Signals("unfinished answers are not written")
    signals.on_exit(_tidy)
    signals.__enter__()
    # A terminal that cannot show a character prints a question mark.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    sys.exit(main())
