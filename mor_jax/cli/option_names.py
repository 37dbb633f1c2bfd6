"""Errors of commands: settings under their names on the command line.

Code below the commands names a setting by its path in the configuration (`eval.batch_size`,
`sample.max_tokens`). The user knows it by the name of the option.
"""

import argparse
import re
from collections.abc import Mapping, Sequence

from mor_jax.config.parsing import fail

Typed = Mapping[str, str]
"""Paths of settings -> options as they are typed. `path[]`: each value of a list is an option of
its own. `group.`: every setting of a group is a value of the option."""

_CONFIG = "config."

_SETTING = re.compile(r"([A-Za-z_][\w.]*)(\[\d+\])?=")


def as_typed(error: object, typed: Typed) -> str:
    """`sample.max_tokens=-1: must ...` as `--max_tokens=-1: must ...`.

    error: an error or its text, in the form of `parsing.fail`; other text is returned unchanged.
    """
    text = str(error)
    found = _SETTING.match(text)
    if found is None:
        return text
    path, index = found[1], found[2] or ""
    group = f"{path.partition('.')[0]}."
    if f"{path}[]" in typed:
        name = typed[f"{path}[]"]
    elif path in typed:
        name = f"{typed[path]}{index}"
    elif group in typed and path.startswith(group):
        name = f"{typed[group]} {path.removeprefix(group)}{index}"
    else:
        return text
    return f"{name}={text[found.end() :]}"


def check_filled(given: argparse.Namespace, *names: str) -> None:
    """Raises `ValueError` if one of these options of argparse is an empty text.

    Scripts give one where a variable of theirs is not set, and nothing would be written there.
    """
    for name in names:
        if getattr(given, name, None) == "":
            fail(f"--{name}", "", "is empty", "Give a value")


def options(given: argparse.Namespace, paths: Mapping[str, str] | None = None) -> dict[str, str]:
    """What of argparse's options decides on something: those that were left out are not in it.

    paths: path of a setting -> name of the option, where the two differ.
    """
    there = {name: value for name, value in vars(given).items() if value is not None}
    named = {name: name for name in there} | dict(paths or {})
    return {
        f"{path}[]" if isinstance(there[name], list | tuple) else path: f"--{name}"
        for path, name in named.items()
        if name in there
    }


def words(given: Sequence[str], groups: Sequence[str] = ()) -> dict[str, str]:
    """The same of words that another parser reads. groups: options that hold `name=value`.

    `--config.optim.lr=1` decides on `config.optim.lr`, and on `optim.lr`.
    """
    names = [word[2:].partition("=")[0] for word in given if word.startswith("--")]
    whole = {f"{name}." if name in groups else name: f"--{name}" for name in names}
    return {name.removeprefix(_CONFIG): option for name, option in whole.items()} | whole


def flags_given() -> dict[str, str]:
    """The same of absl's flags, settings of `--config` among them, once they are parsed."""
    from absl import flags

    return words([f"--{name}" for name in flags.FLAGS if flags.FLAGS[name].present])
