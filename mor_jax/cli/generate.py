"""Generates text with a run: its newest checkpoint, or the weights that it starts from.

    python launch/generate.py --workdir=runs/mor --prompt="def "
    python launch/generate.py --workdir=runs/mor --prompt="def " --temperature=0 --depth_colours
    python launch/generate.py --workdir=runs/mor --prompt="class " --top_p=0.9 --n=4 --seed=7
    echo "import " | python launch/generate.py --workdir=runs/mor --prompt=-
    python launch/generate.py --workdir=runs/mor --jsonl=prompts.jsonl --output=answers.jsonl

JSON lines hold a "prompt" (a text or token numbers) or "messages", and may hold an "id" and the
settings of an answer under their names here. Answers keep the order of the prompts.
"""

import argparse
import io
import os
import sys
from collections.abc import Callable
from typing import Any

from mor_jax.cli import option_names
from mor_jax.runtime import exit_codes, platform
from mor_jax.runtime.preemption import Signals

_PATHS = {"engine.slots": "slots", "engine.cache_bytes": "cache"}
"""Options under other names than their settings."""


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    platform.skip_absent()
    try:
        return _generate(options)
    except BrokenPipeError:
        # Whoever read the answers has enough. The interpreter's own flush must not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return exit_codes.OK
    # A full disk, or less memory than was asked for.
    except (OSError, MemoryError) as error:
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
        return exit_codes.ERROR


def _generate(typed: argparse.Namespace) -> int:
    from rich.console import Console

    from mor_jax.config.parsing import parse_bytes
    from mor_jax.inference.cli.generate import Options, generate
    from mor_jax.inference.cli.prompts import ANSWER, PromptSettings
    from mor_jax.inference.engine.request import Stopped

    given, settings = dict(vars(typed)), PromptSettings.__dataclass_fields__
    wishes = {name: given.pop(name) for name in settings}
    prompts, cache = tuple(given.pop("prompt")), given.pop("cache")
    try:
        option_names.check_filled(typed, "output", "calibration", "workdir", "jsonl")
        options = Options(
            **given,
            prompts=prompts,
            wishes=PromptSettings(**{**wishes, "stop": tuple(wishes["stop"])}),
            cache_bytes=None if cache is None else parse_bytes("cache", cache),
        )
        console = Console(highlight=False, markup=False, emoji=False)
        totals = generate(options, _standard_input, console)
    except (ValueError, Stopped) as error:
        paths = {f"{ANSWER}.{name}": name for name in settings} | _PATHS
        names = option_names.options(typed, paths)
        print(f"error: {option_names.as_typed(error, names)}", file=sys.stderr)
        return exit_codes.of(error)
    for message in totals.errors:
        print(f"error: {message}", file=sys.stderr)
    return exit_codes.ERROR if totals.errors else exit_codes.OK


def _standard_input() -> bytes:
    # There is none where a caller has closed it.
    return b"" if sys.stdin is None else sys.stdin.buffer.read()


def _parser() -> argparse.ArgumentParser:
    about, _, more = (__doc__ or "").partition("\n")
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=about, epilog=more, formatter_class=raw)
    add = parser.add_argument
    add("--workdir", required=True, help="run to generate with")
    add("--step", type=int, help="checkpoint; default: the newest good one")
    add("--calibration", help="name or file of thresholds that launch/calibrate.py has made")
    add("--recursions", type=int, help="to run, in place of those trained")
    add("--prompt", action="append", default=[], help='text; may be repeated; "-": standard input')
    add("--jsonl", help='prompts as JSON lines, from a file or ("-") standard input')
    add("--chat", action="store_true", help="each prompt is a user's message")
    add("--system", help="message before the user's")
    _add_settings(parser.add_argument_group("settings of an answer").add_argument)
    shown = parser.add_argument_group("output")
    add = shown.add_argument
    either = argparse.BooleanOptionalAction
    add("--stream", action=either, help="tokens as they come; default: in a terminal")
    add("--echo", action=either, help="prompts before answers; default: in a terminal")
    add("--depth_colours", action="store_true", help="colour tokens by the depth they took")
    add("--json", action="store_true", help="answers as JSON lines; always so with --jsonl")
    add("--output", help="file for JSON lines, which appears when all are there")
    add("--overwrite", action="store_true", help="the output may exist")
    work = parser.add_argument_group("work")
    work.add_argument("--slots", type=int, help="answers at one time (default: up to 32)")
    work.add_argument("--cache", help="memory for keys and values, such as 2GB")
    return parser


def _add_settings(add: Callable[..., Any]) -> None:
    add("--max_tokens", type=int, help="of the answer; default: 256, as far as there is room")
    add("--temperature", type=float, default=1.0, help="0 takes the best token (default: 1)")
    add("--top_k", type=int, help="only the best k tokens")
    add("--top_p", type=float, default=1.0, help="fewest tokens whose probabilities reach this")
    add("--min_p", type=float, default=0.0, help="tokens at least this share as likely as the best")
    add("--repetition_penalty", type=float, default=1.0, help="above 1: against tokens seen before")
    add("--presence_penalty", type=float, default=0.0, help="against tokens of the answer")
    add("--frequency_penalty", type=float, default=0.0, help="the same for each time they occur")
    add("--seed", type=int, help="makes answers repeatable; default: one is drawn")
    add("--n", type=int, default=1, help="answers to each prompt (default: 1)")
    add("--stop", action="append", default=[], help="text that ends the answer; may be repeated")
    add("--ignore_eos", action="store_true", help="go on after an end of document")
    add("--logprobs", type=int, help="show log-probabilities, with this many alternatives (0..20)")


def _tidy(_: str) -> None:
    """What is left of an output that was not finished, and of a line that showed the state."""
    files = sys.modules.get("mor_jax.files")
    if files is not None:
        files.remove_drafts()
    if sys.stderr.isatty():
        # The cursor is shown again.
        sys.stderr.write("\x1b[?25h\n")
        sys.stderr.flush()


if __name__ == "__main__":
    signals = Signals("answers that were not finished are not written")
    signals.on_leaving(_tidy)
    signals.__enter__()
    # A terminal that lacks a letter gets a question mark, not an error.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    sys.exit(main())
