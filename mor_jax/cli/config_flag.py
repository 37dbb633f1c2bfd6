"""The command line of programs that take `--config`: errors are one line."""

import difflib
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import flags
from ml_collections import ConfigDict

from mor_jax.config import old_names
from mor_jax.config.shipped import config_path, nearest, shipped
from mor_jax.runtime import exit_codes

_CONFIG = "--config"
_LATE = "Configuration is not available because of an earlier failure to load: "


def parsed(argv: Sequence[str]) -> list[str]:
    """Parses the flags, for `app.run(main, flags_parser=parsed)`; returns the other words.

    Ends the process with `exit_codes.REFUSED` and one line if a flag, the configuration's file or
    a setting is wrong.
    """
    typed, argv = argv, _with_paths(argv)
    try:
        try:
            rest = flags.FLAGS(argv)
        except SystemExit:
            # --help is no failure, but absl exits with 1.
            sys.exit(exit_codes.OK)
        config: Any = flags.FLAGS["config"].value
        if type(config).__name__ != "ConfigDict":
            # A file that cannot be read shows only when its content is used.
            rule = f"its get_config() returned {config.lock and config!r}, not a ConfigDict"
            raise ValueError(rule)
    except BrokenPipeError:
        # The reader of the help text has enough.
        raise
    except Exception as error:
        _refuse(_message(error, typed, argv))
    if len(rest) > 1:
        fix = f"Settings are {_CONFIG}.NAME=VALUE, other flags --NAME=VALUE"
        _refuse(f"{rest[1]}: unknown argument. {fix}")
    return rest


def _with_paths(argv: Sequence[str]) -> list[str]:
    """The words with names of shipped configurations as their paths."""
    words = list(argv)
    for i, word in enumerate(words):
        if word.startswith(f"{_CONFIG}="):
            words[i] = f"{_CONFIG}={config_path(word.removeprefix(f'{_CONFIG}='))}"
        elif i and words[i - 1] == _CONFIG:
            words[i] = config_path(word)
    return words


def _refuse(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(exit_codes.REFUSED)


def _message(error: Exception, typed: Sequence[str], argv: Sequence[str]) -> str:
    """typed: the words as the user wrote them; argv: with paths for the names in `--config`."""
    config = _given(typed)
    if isinstance(error, OSError):
        reason = str(error).strip().splitlines()[-1].strip().removeprefix(_LATE).rstrip(".")
        name = config.partition(":")[0]
        near, known = nearest(name), ", ".join(shipped())
        fix = f"Did you mean {_CONFIG}={near}?" if near else f"Give a file or one of: {known}"
        if name and not Path(name).exists() and "/" not in name and not name.endswith(".py"):
            return f"{_CONFIG}={config}: neither a file nor a shipped configuration. {fix}"
        return f"{_CONFIG}={config}: cannot be read: {reason}. {fix}"
    if isinstance(error, (flags.ValidationError, flags.Error)):
        # absl wraps an exception of the configuration file in a traceback.
        inner = error.__cause__ or error.__context__
        inner = inner and (inner.__cause__ or inner.__context__)
        if inner is not None and "Error whilst parsing config file" in str(error):
            return f"{_CONFIG}={config}: {_old_name(inner) or _one_line(inner)}"
        text = _one_line(error).removeprefix("flag ").rstrip(".")
        if missing := re.match(r"(--\w+)=None: Flag .* must have a value", text):
            text = f"{missing[1]}: is missing"
        if text.startswith(f"{_CONFIG}."):
            return f"{_plain(text)}. docs/configuration.md lists the settings with their types"
        return f"{text}. Every flag is listed by --help"
    message = _old_name(error) or f"{_place(error)}{_one_line(error)}"
    if "has no attribute 'get_config'" in message:
        message = "has no function get_config. Define get_config(), which returns a ConfigDict"
    return _unknown(argv) or f"{_CONFIG}={config}: {message}"


def _plain(text: str) -> str:
    """The message of absl about a value, without Python's own words."""
    text = re.sub(r"could not convert string to float.*", "must be a number", text)
    text = re.sub(r"invalid literal for int\(\).*", "must be a whole number", text)
    return re.sub(r"Failed to parse .* as a ConfigDict.*", "is a group of settings", text)


def _old_name(error: BaseException) -> str | None:
    """The message for a configuration file that uses the old name of a setting."""
    found = re.search(r'Key "(\w+)" does not|^\W*(?:Did.* instead of \W)?(\w+)\W*$', str(error))
    name = (
        (found[1] or found[2]) if found and isinstance(error, LookupError | AttributeError) else ""
    )
    message = old_names.rename_hint_for_leaf(name)
    return f"{name}: unknown setting. {message}" if message else None


def _given(argv: Sequence[str]) -> str:
    # The last one counts.
    words, given = list(argv), ""
    for i, word in enumerate(words):
        if word.startswith(f"{_CONFIG}="):
            given = word.removeprefix(f"{_CONFIG}=")
        elif word == _CONFIG and i + 1 < len(words):
            given = words[i + 1]
    return given


def _unknown(argv: Sequence[str]) -> str | None:
    """The first setting on the command line that the configuration does not have."""
    try:
        tree: Any = flags.FLAGS["config"].parser.parse(_given(argv))
        names = _names(tree)
    except Exception:
        # The file itself is wrong.
        return None
    for word in argv:
        name, _, _ = word.removeprefix(f"{_CONFIG}.").partition("=")
        if word.startswith(f"{_CONFIG}.") and name not in names:
            if name in old_names.SETTINGS:
                new = f"{_CONFIG}.{old_names.SETTINGS[name]}"
                return f"{word}: unknown setting. It is called {new} now"
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
            return f"{word}: unknown setting. Did you mean {_CONFIG}.{near}?"
    return None


def _names(tree: ConfigDict, prefix: str = "") -> list[str]:
    names = []
    for key in tree:
        value = tree.get(key)
        names.append(f"{prefix}{key}")
        names += _names(value, f"{prefix}{key}.") if isinstance(value, ConfigDict) else []
    return names


def _place(error: Exception) -> str:
    """FILE:LINE of the innermost call."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}: "
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not _is_ours(frame.filename)]
    return f"{own[-1].filename}:{own[-1].lineno}: {type(error).__name__}: " if own else ""


def _is_ours(file: str) -> bool:
    return file == __file__ or "site-packages" in file


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


__all__ = ["parsed"]
