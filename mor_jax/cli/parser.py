"""The argument parser of the commands: what is wrong is said in one line, with the nearest option.

Imports nothing that takes time: it comes before the rest of a command.
"""

import argparse
import difflib
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from mor_jax.runtime import exit_codes

RENAMED = {"--heldout-share": "--validation-fraction"}
"""Options of earlier versions -> their names now."""


class CommandParser(argparse.ArgumentParser):
    """An `ArgumentParser` whose errors are one line; the exit code is `exit_codes.REFUSED`.

    about: the module's docstring: its first line is the description, the rest follows the options.
    """

    def __init__(self, about: str | None = None, **options: Any):
        first, _, rest = (about or "").partition("\n")
        # Help texts keep their lines; an option is written out, never shortened.
        options = {
            "formatter_class": argparse.RawDescriptionHelpFormatter,
            "allow_abbrev": False,
        } | options
        if about is not None:
            options |= {"description": first, "epilog": rest}
        super().__init__(**options)
        self._words: list[str] = []

    def parse_known_args(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, args: Any = None, namespace: Any = None
    ) -> Any:
        """As in argparse; remembers the words for the error."""
        self._words = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Prints one line and ends the process."""
        message = self._reworded(message)
        hints = [f"{word}: unknown option. Did you mean {near}?" for word, near in self._unknown()]
        message = hints[0] if hints else message
        message = message if message.endswith("?") else f"{message}."
        print(f"error: {message} {self.prog} --help lists all options", file=sys.stderr)
        sys.exit(exit_codes.REFUSED)

    def _reworded(self, message: str) -> str:
        message = message.removeprefix("argument ")
        message = message.replace("the following arguments are required:", "missing:")
        if message.startswith("unrecognized arguments: "):
            words = message.removeprefix("unrecognized arguments: ")
            return f"{words}: unexpected. Options are --NAME=VALUE"
        name, invalid, rest = message.partition(": invalid choice: ")
        value, _, choices = rest.partition(" (choose from ")
        if not invalid or not choices:
            return message
        names = [choice.strip("' ") for choice in choices.rstrip(")").split(",")]
        near = difflib.get_close_matches(value.strip("'"), names, n=1, cutoff=0.0)
        hint = f". Did you mean {near[0]}?" if near else ""
        if not name.startswith("-"):
            return f"{value}: unknown command of {self.prog}{hint}"
        return f"{name}: must be one of {', '.join(names)}, not {value}{hint}"

    def _unknown(self) -> Iterator[tuple[str, str]]:
        """Options that this parser does not have, with the nearest one that it has."""
        options = [name for name in self._option_string_actions if name.startswith("--")]
        for word in _until_separator(self._words):
            name = word.partition("=")[0]
            if RENAMED.get(name) in options:
                yield name, RENAMED[name]
                continue
            near = difflib.get_close_matches(name, options, n=1, cutoff=0.6)
            if name.startswith("--") and name not in options and near:
                yield name, near[0]


def _until_separator(words: Sequence[str]) -> Sequence[str]:
    return words[: words.index("--")] if "--" in words else words
