"""Generation from the command line: reads prompts, runs the engine, shows or writes the answers."""

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.status import Status

from mor_jax.config.parsing import check, fail
from mor_jax.inference.cli.answers import Totals, stream
from mor_jax.inference.cli.prompts import (
    Prompt,
    PromptInput,
    PromptSettings,
    from_lines,
    from_texts,
    prepare,
)
from mor_jax.inference.cli.show import (
    JsonLinesWriter,
    OutputWriter,
    TerminalWriter,
    legend,
    output_file,
)
from mor_jax.inference.config import EngineConfig, compute_config, plan_cache
from mor_jax.inference.engine.engine import Engine
from mor_jax.inference.engine.request import Finished
from mor_jax.inference.load_model import LoadedModel, load_model
from mor_jax.training.evaluator import token_depths

USUAL_SLOTS = 32
"""Answers that run at one time where nothing is asked for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What to generate from, and how to show it.

    step, calibration, recursions: as in `load_model`. prompts: texts; "-" is all of the standard
    input. jsonl: a file of JSON lines in place of prompts; "-" again. chat: prompts are messages of
    a user, after the message `system` if there is one. slots, cache_bytes: as in `EngineConfig`.
    json: answers as JSON lines; always so for `jsonl` and `output`, the file to write them to
    (overwrite: it may exist). echo: prompts before answers; stream: tokens as they come; None: both
    in a terminal only. depth_colours: tokens coloured by depth.
    """

    workdir: str
    step: int | None = None
    calibration: str | None = None
    recursions: int | None = None
    prompts: tuple[str, ...] = ()
    jsonl: str | None = None
    chat: bool = False
    system: str | None = None
    wishes: PromptSettings = dataclasses.field(default_factory=PromptSettings)
    slots: int | None = None
    cache_bytes: int | None = None
    json: bool = False
    output: str | None = None
    overwrite: bool = False
    echo: bool | None = None
    stream: bool | None = None
    depth_colours: bool = False

    def asks(self, stdin: Callable[[], bytes]) -> list[PromptInput]:
        """The prompts, read. Raises `ValueError` where they are none."""
        if self.jsonl is not None and self.prompts:
            fail("jsonl", self.jsonl, "stands beside --prompt", "Give one of the two")
        some = bool(self.prompts) or self.jsonl is not None
        check(some, "--prompt", "", "is missing, and so is --jsonl", "Try --prompt=Once")
        fix = "Add --chat, or write messages into --jsonl"
        check(self.chat or not self.system, "system", self.system, "is for chats", fix)
        if self.jsonl is None:
            # Its last end of line is the shell's, no part of the text.
            texts = [
                stdin().decode("utf-8", "surrogateescape").removesuffix("\n")
                if text == "-"
                else text
                for text in self.prompts
            ]
            return from_texts(texts, self.wishes, self.chat, self.system)
        fix = 'Write lines like {"messages": [...]}'
        check(not self.chat, "chat", self.chat, "is for --prompt", fix)
        if self.jsonl == "-":
            return from_lines(stdin().splitlines(), self.wishes)
        try:
            with Path(self.jsonl).open("rb") as file:
                return from_lines(file, self.wishes, self.jsonl)
        except OSError as error:
            fail("jsonl", self.jsonl, f"cannot be read ({error.strerror})", "Give another file")


def generate(options: Options, stdin: Callable[[], bytes], console: Console) -> Totals:
    """Answers all prompts. Answers go to `console`, what is said about them to standard error.

    stdin: reads all of the standard input.

    Raises:
        ValueError: something is wrong with the options, the prompts or the model; no file is
            written.
        KeyboardInterrupt: what was running is cancelled, and no file is written.
    """
    asks = options.asks(stdin)
    with contextlib.ExitStack() as stack:
        file = None
        if options.output is not None:
            file = stack.enter_context(output_file(Path(options.output), options.overwrite))
        status = stack.enter_context(_status("loading"))
        model = load_model(
            options.workdir,
            step=options.step,
            calibration=options.calibration,
            recursions=options.recursions,
        )
        status.update("compiling")
        context = plan_cache(model, _work(options)).max_length
        prompts = prepare(asks, model, context)
        if file is not None or options.json or options.jsonl is not None:
            write = functools.partial(print, file=file or console.file, flush=file is None)
            show: OutputWriter = JsonLinesWriter(write, model.tokenizer)
        else:
            show = _screen(options, model, prompts, console)
        with Engine(model, _settings(options, prompts, context)) as engine:
            return _run(engine, prompts, show, status)


def _status(text: str) -> Status:
    # Shown in terminals only, and gone with the first token.
    return Status(text, console=Console(stderr=True, quiet=not sys.stderr.isatty()))


def _work(options: Options) -> EngineConfig:
    return EngineConfig(slots=options.slots, cache_bytes=options.cache_bytes)


def _settings(options: Options, prompts: list[Prompt], context: int) -> EngineConfig:
    """context: tokens that a prompt and its answer may have."""
    requests = [request for prompt in prompts for request in prompt.requests]
    longest = max(len(request.prompt) + request.max_tokens for request in requests)
    return dataclasses.replace(
        _work(options),
        slots=min(USUAL_SLOTS, len(requests)) if options.slots is None else options.slots,
        # Few different lengths, so that programs are found again where JAX keeps them.
        max_length=min(1 << (longest - 1).bit_length(), context),
    )


def _screen(
    options: Options, model: LoadedModel, prompts: list[Prompt], console: Console
) -> TerminalWriter:
    rule = "nothing is routed in this model: all tokens have the same depth"
    ok = _recursions(model) is not None or not options.depth_colours
    check(ok, "depth_colours", options.depth_colours, rule, "Leave it out")
    here = console.is_terminal
    if options.depth_colours:
        console.print(legend(model.cfg.num_recursions, console), end="")
    return TerminalWriter(
        console,
        model.tokenizer,
        # A chat's prompt is its template: nobody has written that.
        echo=here and not options.chat if options.echo is None else options.echo,
        streaming=here if options.stream is None else options.stream,
        titles=sum(len(prompt.requests) for prompt in prompts) > 1,
        depths=functools.partial(_depths, model) if options.depth_colours and here else None,
    )


def _recursions(model: LoadedModel) -> int | None:
    return None if model.cfg.router.kind == "none" else model.cfg.num_recursions


def _depths(model: LoadedModel, prompt: Prompt) -> np.ndarray:
    """Recursions that each token of a prompt goes through."""
    cfg = compute_config(model.cfg, None)
    return token_depths(cfg, model.params, np.array(prompt.tokens), model.thresholds)


def _run(engine: Engine, prompts: list[Prompt], show: OutputWriter, status: Status) -> Totals:
    totals, current = Totals(), None
    try:
        with contextlib.closing(stream(engine, prompts, 2 * engine.plan.slots)) as events:
            for answer, event in events:
                if answer is not current:
                    status.stop()
                    current = answer
                    show.begin(answer)
                totals.add(answer, event)
                if isinstance(event, Finished):
                    show.end(answer)
                else:
                    show.add(event)
    finally:
        if totals.tokens or totals.answers:
            print(_summary(totals, engine.model, prompts), file=sys.stderr)
    return totals


def _summary(totals: Totals, model: LoadedModel, prompts: list[Prompt]) -> str:
    line = totals.line(_recursions(model))
    sampling = [prompt.requests[0].sampling for prompt in prompts]
    seeds = {one.seed for one in sampling if one.temperature}
    return f"{line}, seed {seeds.pop()}" if len(seeds) == 1 else line
