"""launch/generate.py and what it is made of, on the real engine with a tiny model."""

import dataclasses
import importlib
import io
import json
import os
import threading

import numpy as np
import pytest
from rich.console import Console
from support.engines import paused
from support.seeded import random_params
from support.tiny import TINY, train_config

from mor_jax.checkpoint import pretrained
from mor_jax.checkpoint.lazy_arrays import flatten, from_arrays
from mor_jax.checkpoint.run_dir import claim_workdir
from mor_jax.files import remove_drafts
from mor_jax.inference.cli.answers import stream
from mor_jax.inference.cli.prompts import PromptSettings, from_lines, from_texts, prepare
from mor_jax.inference.cli.show import output_file
from mor_jax.inference.config import plan_cache
from mor_jax.inference.engine.engine import Engine, EngineConfig
from mor_jax.inference.engine.request import Finished, Request
from mor_jax.inference.load_model import load_model
from mor_jax.runtime import exit_codes

MODEL = dataclasses.replace(TINY["expert_cycle"], vocab_size=256, num_layers=2, num_recursions=2)
WISHES = PromptSettings(max_tokens=8, seed=3)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    claim_workdir(path, train_config(model=MODEL))
    pretrained.write(
        path, MODEL, from_arrays(dict(flatten(random_params(MODEL, 1)))), {"from": "a/model"}
    )
    return path


@pytest.fixture(scope="module")
def served(workdir):
    return load_model(workdir)


@pytest.fixture(scope="module")
def engine(served):
    with Engine(served, EngineConfig(slots=2)) as engine:
        yield engine


@pytest.fixture
def run(workdir, capsys, monkeypatch):
    """`run("--prompt=a", ..., stdin=b"...")` -> exit code, standard output, standard error."""

    def call(*options, stdin=b""):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        code = importlib.import_module("mor_jax.cli.generate").main(
            [f"--workdir={workdir}", "--slots=2", *options]
        )
        told = capsys.readouterr()
        return code, told.out, told.err

    return call


def lines(*rows):
    return [json.dumps(row) for row in rows]


def test_lines_have_settings_of_their_own():
    inputs = from_lines(
        [
            '{"prompt": "a", "temperature": 0, "stop": "x", "id": {"k": 1}}',
            b"  \n",
            '{"prompt": [1, 2], "n": 2, "top_k": null, "stop": ["x", "y"]}',
            '{"messages": [{"role": "user", "content": "Hi"}]}',
        ],
        dataclasses.replace(WISHES, top_k=5),
    )
    assert [prompt_input.id for prompt_input in inputs] == [{"k": 1}, 3, 4]
    assert [prompt_input.prompt for prompt_input in inputs[:2]] == ["a", (1, 2)]
    assert [len(prompt_input.messages) for prompt_input in inputs] == [0, 0, 1]
    first, second, third = (prompt_input.settings for prompt_input in inputs)
    assert (first.temperature, first.stop, first.top_k, first.seed) == (0.0, ("x",), 5, 3)
    assert (second.n, second.top_k, second.stop) == (2, None, ("x", "y"))
    assert third == dataclasses.replace(WISHES, top_k=5)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 1='\{': is not valid JSON"),
        ("[" * 100_000, "line 1=.*is not valid JSON"),
        ('{"prompt": NaN}', "NaN is not a number"),
        (b"\xff", "line 1=.*is not valid JSON"),
        ("[1]", "must be a JSON object"),
        ("{}", "needs either 'prompt' or 'messages'"),
        ('{"prompt": "a", "messages": []}', "needs either 'prompt' or 'messages'"),
        ('{"prompt": 1}', r"line 1\.prompt=1: must be a text or a list of token ids"),
        ('{"prompt": [1, true]}', r"line 1\.prompt=.*list of token ids"),
        ('{"prompt": []}', r"line 1\.prompt=\[\]"),
        (r'{"prompt": "\ud800"}', r"line 1\.prompt=.*half of a surrogate pair"),
        ('{"prompt": "a", "temprature": 1}', r"Did you mean line 1\.temperature\?"),
        ('{"prompt": "a", "temprature": 1}', r"unknown setting; there are frequency_penalty, ign"),
        ('{"prompt": "a", "top_p": "1"}', r"line 1\.top_p='1': must be a float"),
        (
            f'{{"prompt": "a", "top_p": {10**400}}}',
            r"^line 1\.top_p=10+: must be a float of at most",
        ),
        ('{"messages": [{"role": "user"}]}', r"line 1\.messages\[0\]=.*a 'role' and a 'content'"),
        ('{"messages": []}', r"line 1\.messages=\[\]: must be a list of messages"),
        ("", "needs at least one line that is not empty"),
    ],
)
def test_lines_that_say_nothing_sensible(line, message):
    with pytest.raises(ValueError, match=message):
        from_lines([line], WISHES)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": [256]}, r"line 2\.prompt\[0\]=256: must be a whole number in 0 \.\. 255"),
        ({"prompt": "a", "temperature": -1}, r"line 2\.temperature=-1\.0: must not be negative"),
        ({"prompt": "a", "max_tokens": 64}, r"line 2\.max_tokens=64: prompt \(1 tokens\)"),
        ({"prompt": "a" * 64, "max_tokens": None}, r"line 2\.prompt='a*\.\.\.': has 64 tokens"),
        ({"prompt": "a", "n": 0}, r"line 2\.n=0: must be in 1 \.\. 10000"),
        ({"prompt": "a", "seed": 2**32}, r"line 2\.seed=4294967296: must be in"),
        ({"prompt": "a", "logprobs": 21}, r"line 2\.logprobs=21: must be in 0 \.\. 20"),
        ({"messages": [{"role": "user", "content": "a"}]}, "has no chat template"),
    ],
)
def test_requests_that_the_model_cannot_answer(served, row, message):
    with pytest.raises(ValueError, match=message):
        prepare(from_lines(lines({"prompt": "fine"}, row), WISHES), served, 64)


def test_a_prompt_that_ends_inside_a_character_is_one_text_with_its_answer(served):
    """The answer completes it, or says what it is."""
    (prompt,) = prepare(from_lines(lines({"prompt": [100, 0xE6, 0x9D]}), WISHES), served, 64)
    assert (prompt.text, prompt.tokens) == ("d", (100, 0xE6, 0x9D))
    show = importlib.import_module("mor_jax.inference.cli.show")
    screen = show.TerminalWriter(Console(), served.tokenizer, depths=lambda _: np.array([1, 2, 1]))
    assert screen._coloured(prompt).plain == "d"


def test_answers_fit_into_a_small_cache(run, served):
    """As many tokens as it holds where nothing is asked for; more are refused in advance."""
    page = plan_cache(served, EngineConfig(max_length=32)).deepest_bytes(32)
    options = ("--prompt=ab", f"--cache={page}", "--ignore_eos", "--json")
    code, out, _ = run(*options)
    assert (code, len(json.loads(out)["tokens"])) == (exit_codes.OK, 30)
    code, out, err = run(*options, "--max_tokens=31")
    assert (code, out) == (exit_codes.REFUSED, "")
    assert err.startswith(
        "error: --max_tokens=31: prompt (2 tokens) and output may have at most 32"
    )


def test_requests_follow_the_wishes(served):
    settings = PromptSettings(n=3, seed=2**32 - 1, stop=("x",), top_p=0.5)
    (prompt,) = prepare(from_texts(["abc"], settings), served, 64)
    assert (prompt.tokens, prompt.text) == ((97, 98, 99), "abc")
    assert [r.sampling.seed for r in prompt.requests] == [2**32 - 1, 0, 1]
    assert {(r.max_tokens, r.stop, r.sampling.top_p) for r in prompt.requests} == {
        (61, ("x",), 0.5)
    }
    (empty,) = prepare(from_texts([""], WISHES), served, 64)
    assert empty.tokens == (served.tokenizer.eos_id,)
    # Drawn once for the command, so that it can be told.
    one, other = prepare(from_texts(["a", "b"], PromptSettings()), served, 64)
    assert one.requests[0].sampling.seed == other.requests[0].sampling.seed


def test_chats_go_through_the_template(served):
    source = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    chatty = dataclasses.replace(served, chat_template=source)
    inputs = from_texts(["Hi"], WISHES, chat=True, system="Be brief.")
    inputs += from_lines(lines({"messages": [{"role": "user", "content": "Hi"}]}), WISHES)
    first, second = prepare(inputs, chatty, 64)
    assert first.text == "<system>Be brief.<user>Hi<assistant>"
    assert second.tokens == tuple(b"<user>Hi<assistant>")
    refuses = dataclasses.replace(served, chat_template="{{ raise_exception('never') }}")
    with pytest.raises(ValueError, match=r"prompt 1: .*never"):
        prepare(inputs, refuses, 64)


def test_answers_come_in_order_and_are_those_of_each_request_alone(served, engine):
    rows = [{"prompt": "abc" * k, "n": 1 + k % 3, "max_tokens": 3 + 5 * k} for k in range(5)]
    prompts = prepare(from_lines(lines(*rows), WISHES), served, 64)
    seen, finished = [], []
    for answer, event in stream(engine, prompts, ahead=4):
        seen.append((answer.prompt.id, answer.index))
        finished += [answer] if isinstance(event, Finished) else []
    assert seen == sorted(seen)
    wanted = [request for prompt in prompts for request in prompt.requests]
    assert len(finished) == len(wanted) == 9
    for answer, request in zip(finished, wanted, strict=True):
        tokens, end = engine.submit(request).result()
        assert [t.id for t in answer.tokens] == [t.id for t in tokens]
        assert answer.finished.reason == end.reason


def test_closing_the_stream_cancels_what_runs(served, engine, monkeypatch):
    prompts = prepare(from_texts(["a", "b", "c"], PromptSettings(ignore_eos=True)), served, 64)
    before = engine.statistics().cancelled
    # So many steps give the first token of an answer, not the last.
    with paused(engine, monkeypatch, 30):
        events = stream(engine, prompts, ahead=3)
        next(events)
        events.close()
    # Served only after those before it have gone.
    engine.submit(Request(prompt=(1,), max_tokens=1)).result()
    assert engine.statistics().cancelled >= before + 2
    assert engine.statistics().running == 0


def test_the_command_prints_texts_that_a_seed_repeats(run):
    options = ("--prompt=def ", "--max_tokens=12", "--n=2", "--seed=5", "--ignore_eos")
    code, out, err = run(*options, "--prompt=-", stdin=b"def \n")
    assert code == exit_codes.OK
    titles = [f"==> {p}, answer {a} <==" for p in (1, 2) for a in (1, 2)]
    parts = out.split("==> ")[1:]
    assert [f"==> {part.splitlines()[0]}" for part in parts] == titles
    bodies = [part.split(" <==\n", 1)[1] for part in parts]
    # The same prompt twice, two seeds each.
    assert bodies[:2] == bodies[2:] and bodies[0] != bodies[1]
    assert err.startswith("48 tokens in 4 answers, first token after ")
    assert "tokens/s, mean depth " in err and err.endswith(" of 2, seed 5\n")
    code, alone, _ = run("--prompt=def ", "--max_tokens=12", "--seed=6", "--ignore_eos", "--echo")
    assert alone == f"def {bodies[1]}"


def test_files_of_json_lines(run, tmp_path):
    source, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    rows = [
        {"prompt": "abc", "id": "first", "logprobs": 2},
        {"prompt": [100, 101], "n": 2, "temperature": 0.5, "max_tokens": 4},
        {"prompt": "x", "temperature": 0, "max_tokens": 30, "ignore_eos": True},
    ]
    source.write_text("\n".join(lines(*rows)))
    options = (f"--jsonl={source}", f"--output={output}", "--max_tokens=6", "--seed=1")
    assert run(*options)[:2] == (exit_codes.OK, "")
    told = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(row["id"], row["index"]) for row in told] == [("first", 0), (2, 0), (2, 1), (3, 0)]
    assert [row["seed"] for row in told] == [1, 1, 2, 1]
    first, last = told[0], told[3]
    assert len(first["logprobs"]) == len(first["top"]) == len(first["tokens"])
    for logprob, token, top in zip(first["logprobs"], first["tokens"], first["top"], strict=True):
        assert [entry["logprob"] for entry in top] == sorted(e["logprob"] for e in top)[::-1]
        assert logprob <= top[0]["logprob"]
        likeliest = {entry["id"]: entry["logprob"] for entry in top}
        assert len(likeliest) == 2 and likeliest.get(token, logprob) == logprob
    assert "logprobs" not in last and len(last["tokens"]) == len(last["depths"]) == 30
    assert set(last["depths"]) <= {1, 2} and last["reason"] == "length"
    # Written once, then refused; the same again on the standard output.
    code, _, err = run(*options)
    assert code == exit_codes.REFUSED and "exists already. Add --overwrite" in err
    _, out, _ = run("--jsonl=-", *options[2:], stdin=source.read_bytes())
    again = [json.loads(line) for line in out.splitlines()]
    assert [row["tokens"] for row in again] == [row["tokens"] for row in told]
    last["text"].encode()
    assert sorted(tmp_path.iterdir()) == sorted([source, output])


def test_what_is_wrong_is_said_before_anything_is_written(run, tmp_path):
    output = f"--output={tmp_path / 'answers.jsonl'}"
    for options, message in (
        ((), "--prompt='': is missing, and so is --jsonl"),
        (("--prompt=a", "--jsonl=b"), "--jsonl='b': cannot be combined with --prompt"),
        (("--prompt=a", "--output="), "--output='': is empty"),
        (("--jsonl=no/such/file",), "jsonl='no/such/file': cannot be read"),
        (("--jsonl=-",), "--jsonl='-': needs at least one line"),
        (("--prompt=a", "--top_p=2"), "error: --top_p=2.0: must be in (0, 1]"),
        (("--prompt=a", "--n=0"), "error: --n=0: must be in 1 .. 10000"),
        (("--prompt=a", "--max_tokens=64"), "error: --max_tokens=64: prompt (1 tokens) and"),
        (("--prompt=a", "--temperature=nan"), "error: --temperature=nan: must be finite"),
        (("--prompt=a", "--stop="), "error: --stop='': must not be empty"),
        (("--prompt=a", "--cache=lots"), "error: --cache='lots'"),
        (("--prompt=a", "--cache=1"), "error: --cache=1: must hold a sequence's first pages"),
        (("--prompt=a", "--slots=0"), "error: --slots=0: must be greater than 0"),
        (
            ("--prompt=a", "--recursions=9", "--workdir=no/such/run"),
            "is not the directory of a run",
        ),
        (("--prompt=a", "--chat"), "has no chat template"),
        (("--prompt=a", "--system=b"), "system='b': needs --chat"),
        (("--jsonl=-", "--chat"), "applies to --prompt only"),
        (("--prompt=a", "--output=no/such/place.jsonl"), "cannot be written (No such file"),
        (("--prompt=a", "--output=/dev/null", "--overwrite"), "exists and is not a file"),
    ):
        code, out, err = run(output, *options)
        assert (code, out) == (exit_codes.REFUSED, "") and message in err, options
        assert not list(tmp_path.iterdir())


def test_a_file_is_whole_or_as_before_and_nothing_beside_it_is_touched(tmp_path):
    for name in ("a.jsonl", "a.jsonl.draft"):
        (tmp_path / name).write_text("mine")
    with (
        pytest.raises(ValueError, match="exists already"),
        output_file(tmp_path / "a.jsonl", False),
    ):
        pass
    with pytest.raises(KeyError), output_file(tmp_path / "a.jsonl", True) as file:
        file.write("half")
        raise KeyError
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "a.jsonl": "mine",
        "a.jsonl.draft": "mine",
    }
    with output_file(tmp_path / "a.jsonl", True) as file:
        file.write("whole")
    assert (tmp_path / "a.jsonl").read_text() == "whole"
    assert (tmp_path / "a.jsonl.draft").read_text() == "mine" and len(os.listdir(tmp_path)) == 2
    # As for a process that a signal ends inside of the block.
    with pytest.raises(FileNotFoundError), output_file(tmp_path / "b.jsonl", True):
        assert len(os.listdir(tmp_path)) == 3
        remove_drafts()
        assert len(os.listdir(tmp_path)) == 2


class Interrupted(io.StringIO):
    """A terminal at which somebody presses Ctrl-C once a few tokens are printed."""

    def write(self, text: str) -> int:
        if len(self.getvalue()) > 20:
            raise KeyboardInterrupt
        return super().write(text)


def test_ctrl_c_cancels_and_leaves_nothing_behind(workdir, tmp_path, capsys):
    generate = importlib.import_module("mor_jax.inference.cli.generate")
    options = generate.GenerateOptions(
        workdir=str(workdir),
        prompts=("a",),
        settings=PromptSettings(n=4, ignore_eos=True),
        slots=2,
        stream=True,
    )

    def threads():
        return [thread.name for thread in threading.enumerate()].count("engine")

    before = threads()
    with pytest.raises(KeyboardInterrupt):
        generate.generate(options, bytes, Console(file=Interrupted()))
    assert threads() == before
    assert "tokens" in capsys.readouterr().err


def test_a_terminal_shows_depths_as_colours(served, engine):
    show = importlib.import_module("mor_jax.inference.cli.show")
    settings = dataclasses.replace(WISHES, logprobs=1)
    (prompt,) = prepare(from_texts(["ab"], settings), served, 64)

    def shown(terminal, **options):
        file = io.StringIO()
        console = Console(file=file, force_terminal=terminal, color_system="truecolor", width=200)
        screen = show.TerminalWriter(console, served.tokenizer, echo=True, **options)
        for answer, event in stream(engine, [prompt], 1):
            if len(answer.tokens) == 1 and not isinstance(event, Finished):
                screen.begin(answer)
            screen.end(answer) if isinstance(event, Finished) else screen.add(event)
        return file.getvalue(), answer

    text, answer = shown(True, depths=lambda prompt: np.array([1, 2]))
    red, green, blue = (int(show.colour(1)[i : i + 2], 16) for i in (1, 3, 5))
    # The prompt's second token was predicted at depth 1, its first by nobody.
    assert text.startswith(f"a\x1b[30;48;2;{red};{green};{blue}mb\x1b[0m")
    bare, same = shown(False, streaming=False)
    assert bare.startswith(f"ab{same.text}\n") and "\x1b" not in bare
    assert [t.id for t in same.tokens] == [t.id for t in answer.tokens]
    table = bare.removeprefix(f"ab{same.text}\n").strip().splitlines()
    assert table[0].split() == ["token", "logprob", "depth", "likeliest"]
    assert [float(row.split()[-4 if len(row.split()) > 4 else 1]) for row in table[1:2]]
    assert len(table) == 1 + len(same.tokens)
