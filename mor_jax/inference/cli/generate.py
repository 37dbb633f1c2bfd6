"""`mor generate`: reads prompts, runs the engine, shows or writes the completions."""

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

DEFAULT_SLOTS = 32
"""Default number of completions that run at a time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """What to generate, and how to show it.

    step, calibration, recursions: as in `load_model`. prompts: texts; "-" reads all of standard
    input. jsonl: a file of JSON lines instead of prompts, or "-". chat: prompts are user messages,
    after the message `system` if there is one. slots, cache_bytes: as in `EngineConfig`. json:
    print JSON lines; implied by `jsonl` and by `output`, the file to write them to (overwrite: it
    may exist). echo: show prompts before completions; stream: show tokens as they arrive; None: on
    a terminal only. depth_colours: colour tokens by depth.
    """

    workdir: str
    step: int | None = None
    calibration: str | None = None
    recursions: int | None = None
    prompts: tuple[str, ...] = ()
    jsonl: str | None = None
    chat: bool = False
    system: str | None = None
    settings: PromptSettings = dataclasses.field(default_factory=PromptSettings)
    slots: int | None = None
    cache_bytes: int | None = None
    json: bool = False
    output: str | None = None
    overwrite: bool = False
    echo: bool | None = None
    stream: bool | None = None
    depth_colours: bool = False

    def read_prompts(self, stdin: Callable[[], bytes]) -> list[PromptInput]:
        """Reads the prompts. Raises `ValueError` if there are none, or on conflicting options."""
        if self.jsonl is not None and self.prompts:
            fail("jsonl", self.jsonl, "cannot be combined with --prompt", "Use one of the two")
        has_prompts = bool(self.prompts) or self.jsonl is not None
        check(has_prompts, "--prompt", "", "is missing, and so is --jsonl", "Try --prompt=Once")
        fix = "Add --chat, or put messages into --jsonl"
        check(self.chat or not self.system, "system", self.system, "needs --chat", fix)
        if self.jsonl is None:
            # The shell adds the last newline; it is not part of the prompt.
            texts = [
                stdin().decode("utf-8", "surrogateescape").removesuffix("\n")
                if text == "-"
                else text
                for text in self.prompts
            ]
            return from_texts(texts, self.settings, self.chat, self.system)
        fix = 'Write lines like {"messages": [...]}'
        check(not self.chat, "chat", self.chat, "applies to --prompt only", fix)
        if self.jsonl == "-":
            return from_lines(stdin().splitlines(), self.settings)
        try:
            with Path(self.jsonl).open("rb") as file:
                return from_lines(file, self.settings, self.jsonl)
        except OSError as error:
            fail("jsonl", self.jsonl, f"cannot be read ({error.strerror})", "Use another file")


def generate(options: GenerateOptions, stdin: Callable[[], bytes], console: Console) -> Totals:
    """Completes all prompts. Completions go to `console`, statistics to standard error.

    stdin: reads all of standard input.

    Raises:
        ValueError: the options, the prompts or the model are invalid; no file is written.
        KeyboardInterrupt: running requests are cancelled, and no file is written.
    """
    inputs = options.read_prompts(stdin)
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
        context = plan_cache(model, _base_config(options)).max_length
        prompts = prepare(inputs, model, context)
        if file is not None or options.json or options.jsonl is not None:
            write = functools.partial(print, file=file or console.file, flush=file is None)
            writer: OutputWriter = JsonLinesWriter(write, model.tokenizer)
        else:
            writer = _terminal_writer(options, model, prompts, console)
        with Engine(model, _engine_config(options, prompts, context)) as engine:
            return _stream_answers(engine, prompts, writer, status)


def _status(text: str) -> Status:
    # Shown on terminals only; removed at the first token.
    return Status(text, console=Console(stderr=True, quiet=not sys.stderr.isatty()))


def _base_config(options: GenerateOptions) -> EngineConfig:
    return EngineConfig(slots=options.slots, cache_bytes=options.cache_bytes)


def _engine_config(options: GenerateOptions, prompts: list[Prompt], context: int) -> EngineConfig:
    """context: most tokens of prompt and output together."""
    requests = [request for prompt in prompts for request in prompt.requests]
    longest = max(len(request.prompt) + request.max_tokens for request in requests)
    return dataclasses.replace(
        _base_config(options),
        slots=min(DEFAULT_SLOTS, len(requests)) if options.slots is None else options.slots,
        # A power of two, so that JAX's compilation cache is used again for similar lengths.
        max_length=min(1 << (longest - 1).bit_length(), context),
    )


def _terminal_writer(
    options: GenerateOptions, model: LoadedModel, prompts: list[Prompt], console: Console
) -> TerminalWriter:
    rule = "this model has no router: all tokens have the same depth"
    ok = _recursions(model) is not None or not options.depth_colours
    check(ok, "depth_colours", options.depth_colours, rule, "Leave it out")
    on_terminal = console.is_terminal
    if options.depth_colours:
        console.print(legend(model.cfg.num_recursions, console), end="")
    return TerminalWriter(
        console,
        model.tokenizer,
        # The prompt of a chat is a filled template, not what the user wrote.
        echo=on_terminal and not options.chat if options.echo is None else options.echo,
        streaming=on_terminal if options.stream is None else options.stream,
        titles=sum(len(prompt.requests) for prompt in prompts) > 1,
        depths=functools.partial(_depths, model) if options.depth_colours and on_terminal else None,
    )


def _recursions(model: LoadedModel) -> int | None:
    return None if model.cfg.router.kind == "none" else model.cfg.num_recursions


def _depths(model: LoadedModel, prompt: Prompt) -> np.ndarray:
    """Recursions that each token of a prompt goes through."""
    cfg = compute_config(model.cfg, None)
    return token_depths(cfg, model.params, np.array(prompt.tokens), model.thresholds)


def _stream_answers(
    engine: Engine, prompts: list[Prompt], writer: OutputWriter, status: Status
) -> Totals:
    totals, current = Totals(), None
    try:
        with contextlib.closing(stream(engine, prompts, 2 * engine.plan.slots)) as events:
            for answer, event in events:
                if answer is not current:
                    status.stop()
                    current = answer
                    writer.begin(answer)
                totals.add(answer, event)
                if isinstance(event, Finished):
                    writer.end(answer)
                else:
                    writer.add(event)
    finally:
        if totals.tokens or totals.answers:
            print(_summary(totals, engine.model, prompts), file=sys.stderr)
    return totals


def _summary(totals: Totals, model: LoadedModel, prompts: list[Prompt]) -> str:
    line = totals.line(_recursions(model))
    sampling = [prompt.requests[0].sampling for prompt in prompts]
    seeds = {params.seed for params in sampling if params.temperature}
    return f"{line}, seed {seeds.pop()}" if len(seeds) == 1 else line
