"""Output of completions: streamed to a terminal, coloured by depth, or as JSON lines.

If the output is not a terminal, it is the plain generated text.
"""

import contextlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from rich.console import Console
from rich.style import Style
from rich.text import Text

from mor_jax.config.parsing import check, fail
from mor_jax.data.tokenizers.base import Tokenizer
from mor_jax.files import new_file
from mor_jax.inference.cli.answers import Completion
from mor_jax.inference.cli.prompts import Prompt
from mor_jax.inference.detokenizer import token_text
from mor_jax.inference.engine.request import Token
from mor_jax.plotting.plots import colour, text_pieces
from mor_jax.training.summary import printable

# Colours of depths 0, 1, ... on terminals with 16 colours.
_FEW = ("bright_white", "bright_yellow", "bright_red", "bright_magenta", "bright_cyan", "green")


@runtime_checkable
class OutputWriter(Protocol):
    """Receives completions, one after the other."""

    def begin(self, answer: Completion) -> None:
        """Starts a completion."""

    def add(self, token: Token) -> None:
        """Adds a token to it."""

    def end(self, answer: Completion) -> None:
        """Ends it."""


class JsonLinesWriter:
    """Writes a JSON object for each finished completion."""

    def __init__(self, write: Callable[[str], object], tokenizer: Tokenizer) -> None:
        """write: called with each line."""
        self._write, self._tokenizer = write, tokenizer

    def begin(self, answer: Completion) -> None:
        """Writes nothing yet."""

    def add(self, token: Token) -> None:
        """Writes nothing yet."""

    def end(self, answer: Completion) -> None:
        """Writes the line."""
        self._write(json.dumps(answer.to_dict(self._tokenizer), ensure_ascii=False))


@contextlib.contextmanager
def output_file(path: Path, replace: bool) -> Iterator[io.TextIOBase]:
    """A text file that is created only if the block ends without an error.

    Raises `ValueError` if it exists (unless `replace`) or cannot be written.
    """
    path = path.resolve()
    # Replacing a device, such as /dev/null, would break it for the whole system.
    file = path.is_file() or not path.exists()
    check(file, "output", str(path), "exists and is not a file", "Use the path of a file")
    exists = path.exists() and not replace
    check(not exists, "output", str(path), "exists already", "Add --overwrite to replace it")
    with contextlib.ExitStack() as stack:
        draft = stack.enter_context(new_file(path))
        try:
            file = stack.enter_context(draft.open("x", encoding="utf-8"))
        except OSError as error:
            fail("output", str(path), f"cannot be written ({error.strerror})", "Use another path")
        yield file


def depth_style(depth: int, console: Console) -> Style:
    """Black text on the colour of a depth: that of the figures, if the terminal supports it."""
    few = console.color_system == "standard"
    return Style(color="black", bgcolor=_FEW[depth % len(_FEW)] if few else colour(depth))


def legend(recursions: int, console: Console) -> Text:
    """The legend of depth colours."""
    text = Text("recursions that it took to predict a token:")
    for depth in range(recursions + 1):
        text.append(" ").append(f" {depth} ", depth_style(depth, console))
    return text.append("\n")


class TerminalWriter:
    """Formatted text on a terminal, plain text elsewhere."""

    def __init__(
        self,
        console: Console,
        tokenizer: Tokenizer,
        *,
        echo: bool = False,
        streaming: bool = True,
        titles: bool = False,
        depths: Callable[[Prompt], np.ndarray] | None = None,
    ) -> None:
        """echo: show the prompt before each completion. streaming: show tokens as they arrive, not
        at the end. titles: a title line before each completion. depths: returns the depths of a
        prompt's tokens (int [l]); None: no colours."""
        self._console, self._tokenizer = console, tokenizer
        self._echo, self._streaming, self._titles = echo, streaming, titles
        self._depths = depths
        self._prompt = Text()

    def begin(self, answer: Completion) -> None:
        """Shows title and prompt."""
        if self._titles:
            title = f"{answer.prompt.id}"
            if len(answer.prompt.requests) > 1:
                title += f", answer {answer.index + 1}"
            self._write(Text(f"==> {title} <==\n", "dim"))
        if self._echo:
            if answer.index == 0:
                self._prompt = self._coloured(answer.prompt)
            self._write(self._prompt.copy())

    def add(self, token: Token) -> None:
        """Shows what a token adds to the text."""
        if self._streaming:
            self._token(token)

    def end(self, answer: Completion) -> None:
        """Shows the rest of a completion, and its log-probabilities if it has any."""
        assert answer.finished is not None
        if not self._streaming:
            for token in answer.tokens:
                self._token(token)
        self._write(Text(answer.finished.text + "\n"))
        if answer.request.logprobs is not None:
            lines = logprob_lines(answer, self._tokenizer)
            self._write(Text("\n".join(["", *lines, "", ""])))

    def _token(self, token: Token) -> None:
        if token.text:
            style = "" if self._depths is None else self._style(token.depth)
            self._write(Text(token.text, style))

    def _coloured(self, prompt: Prompt) -> Text:
        if self._depths is None:
            return Text(prompt.text, "bold")
        pieces = text_pieces(prompt.tokens, self._tokenizer.decode)
        text = Text(pieces[0])
        # A token is predicted at the position before it.
        for piece, depth in zip(pieces[1:], self._depths(prompt)[:-1].tolist(), strict=True):
            text.append(piece, self._style(depth))
        # An incomplete last character is shown with the completion.
        return text[: len(prompt.text)]

    def _style(self, depth: int) -> Style:
        return depth_style(depth, self._console)

    def _write(self, text: Text) -> None:
        if self._console.is_terminal:
            text.plain = printable(text.plain)
            self._console.print(text, end="", soft_wrap=True)
        else:
            # A file gets the generated text unchanged, control characters included.
            self._console.file.write(text.plain)
        self._console.file.flush()


def logprob_lines(answer: Completion, tokenizer: Tokenizer) -> list[str]:
    """Lines of a table: token, log-probability (nats), depth, most likely alternatives."""
    rows: list[Sequence[str]] = [("token", "logprob", "depth", "likeliest")]
    for token in answer.tokens:
        tops = [f"{token_text(tokenizer, i)!r} {logprob:.2f}" for i, logprob in token.top]
        logprob = "-" if token.logprob is None else f"{token.logprob:.3f}"
        text = repr(token_text(tokenizer, token.id))
        rows.append((text, logprob, str(token.depth), "  ".join(tops)))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return [
        f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {d}".rstrip() for a, b, c, d in rows
    ]
