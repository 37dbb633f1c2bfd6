"""The command `mor`: its subcommands, help and completion. Imports nothing that takes time."""

import difflib
import importlib.util
import os
import re
import sys
from pathlib import Path
from typing import NoReturn

from mor_jax import __version__
from mor_jax.runtime import exit_codes

COMMANDS = {
    "train": "train a model, or resume a run",
    "generate": "continue prompts",
    "serve": "serve OpenAI's HTTP API",
    "evaluate": "loss on text, and tasks of lm-evaluation-harness",
    "analyze": "depth maps, statistics of routing, loss against recursions",
    "calibrate": "set the mean depth of generation",
    "convert": "export to Hugging Face and PyTorch, import from there and from GGUF",
    "isoflop": "scaling studies: plan, run, fit, report",
    "plan": "plan a run on other devices: memory, traffic, time",
    "prepare-data": "tokenise a corpus once, into shards",
    "accounting": "parameters, FLOPs and bytes of a configuration",
}

_COMPLETION = """\
_mor() {
  local word="${COMP_WORDS[COMP_CWORD]}" command="${COMP_WORDS[1]}"
  if ((COMP_CWORD == 1)); then
    COMPREPLY=($(compgen -W "$(mor completion words)" -- "$word"))
  elif [[ "$word" == --* ]]; then
    COMPREPLY=($(compgen -W "$(mor completion words "$command")" -- "$word"))
  else
    COMPREPLY=($(compgen -f -- "$word"))
  fi
}
complete -o nospace -F _mor mor
"""
_ZSH = "autoload -U +X bashcompinit && bashcompinit\n"


def main() -> None:
    """Runs the command that `sys.argv` names. Ends the process with the command's exit code."""
    words = sys.argv[1:]
    name = words[0] if words else "--help"
    if name in ("-h", "--help", "help"):
        print(usage())
    elif name == "--version":
        print(__version__)
    elif name == "completion":
        print(completion(words[1:]))
    elif name.replace("_", "-") in COMMANDS:
        del sys.argv[1]
        run(name.replace("_", "-"), f"mor {name}")
    else:
        near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
        hint = f" Did you mean mor {near[0]}?" if near else ""
        _refuse(f"{name or repr(name)}: unknown command.{hint} mor --help lists all")


def run(name: str, program: str | None = None) -> None:
    """Runs a command with the arguments in `sys.argv`, as its file would run as a program.

    Commands listen to signals before they import what takes seconds, which only a program may do.
    program: what help texts call it; default: as it was started.
    """
    if program is not None:
        sys.argv[0] = program
    spec = importlib.util.find_spec(f"mor_jax.cli.{name.replace('-', '_')}")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    module.__name__ = "__main__"
    sys.modules["__main__"] = module
    code = spec.loader.get_code(spec.name)  # type: ignore[attr-defined]
    try:
        exec(code, module.__dict__)
    except BrokenPipeError:
        # The reader of the output, such as `head`, has enough. What the interpreter still flushes
        # must not complain either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(exit_codes.OK)


def usage() -> str:
    """The help text of `mor`."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {about}" for name, about in COMMANDS.items()]
    return "\n".join(
        [
            "usage: mor COMMAND [OPTIONS]",
            "",
            "Mixture-of-Recursions language models in JAX.",
            "",
            *lines,
            "",
            "mor COMMAND --help shows the options of a command. mor --version prints the version,",
            "mor completion bash (or zsh) a script for the shell's completion.",
        ]
    )


def completion(words: list[str]) -> str:
    """The completion script of a shell, or the words that may stand next."""
    if words[:1] == ["bash"]:
        return _COMPLETION
    if words[:1] == ["zsh"]:
        return _ZSH + _COMPLETION
    if words[:1] == ["words"]:
        return " ".join(COMMANDS if len(words) == 1 else flags_of(words[1]))
    _refuse(f"{' '.join(['completion', *words])}: must name a shell: bash or zsh")


def flags_of(name: str) -> list[str]:
    """The flags of a command, read from its source, so that nothing has to be imported."""
    if name not in COMMANDS:
        return []
    text = (Path(__file__).parent / f"{name.replace('-', '_')}.py").read_text()
    named = re.findall(r"""(?:add|add_argument)\(\s*"(--[\w-]+)\"""", text)
    named += [f"--{flag}" for flag in re.findall(r'DEFINE_\w+\(\s*"(\w+)"', text)]
    return sorted({*named, "--help"})


def _refuse(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(exit_codes.REFUSED)
