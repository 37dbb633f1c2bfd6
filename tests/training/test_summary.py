"""The summary of a run: every number, labelled, in a terminal and in a file."""

import dataclasses
import io

import pytest
from rich.console import Console

from mor_jax.training.summary import RunSummary, show

SUMMARY = RunSummary(
    name="expert-choice, 3 recursions",
    steps=300,
    seconds=95.0,
    unique_parameters=3_456_789,
    effective_parameters=8_123_456,
    flops_per_token=2.1e7,
    plain_flops_per_token=3.3e7,
    loss_causal=2.1072,
    loss_topk=2.0571,
    loss_bigram=2.4501,
    recursions=3,
    mean_depth=2.01,
    tokens_per_second=12345.0,
    mfu=0.123,
    prompt="def ",
    completion="run(self):\n\treturn 1",
    loss_picture="runs/a/loss.png",
    depth_picture="runs/a/depth.png",
)


def printed(summary, terminal, width=100):
    file = io.StringIO()
    show(summary, Console(file=file, force_terminal=terminal, width=width, color_system=None))
    return file.getvalue()


def row(text, label):
    (line,) = [line for line in text.splitlines() if line.strip().startswith(label)]
    return line


@pytest.mark.parametrize("terminal", [True, False])
def test_every_value_is_printed_beside_its_label(terminal):
    text = printed(SUMMARY, terminal)
    assert row(text, "parameters stored").split()[-3:] == ["3.46M", "8.12M", "0.43"]
    assert row(text, "training FLOPs per token").split()[-3:] == ["21M", "33M", "0.64"]
    assert "2.1072" in row(text, "causal routing") and "uses no later token" in text
    assert "2.0571" in row(text, "top-k routing") and "compares all tokens" in text
    assert "+0.0501" in row(text, "difference")
    assert "2.4501" in row(text, "bigram model")
    assert "+0.3429" in row(text, "improvement over it")
    assert "2.01 of 3 recursions (67%)" in row(text, "mean depth")
    assert row(text, "300 steps") == "300 steps in 1m35s, 12.3k tokens/s, MFU 12.3%"
    assert "def run(self):" in text and "return 1" in text
    assert row(text, "loss curves").endswith("runs/a/loss.png")
    assert row(text, "depth of tokens").endswith("runs/a/depth.png")


def test_a_file_gets_plain_aligned_lines():
    text = printed(SUMMARY, terminal=False, width=20)
    assert "\x1b" not in text and "─" not in text
    columns = {row(text, label).index(value) for label, value in [
        ("causal routing", "2.1072"), ("bigram model", "2.4501"), ("difference", "+0.0501")
    ]}  # fmt: skip
    assert len(columns) == 1


def test_a_narrow_terminal_is_never_overrun_by_the_tables():
    lines = printed(SUMMARY, terminal=True, width=60).splitlines()
    tables = [line for line in lines if line.startswith(" ")]
    assert len(tables) > 10 and max(map(len, tables)) <= 60


def test_a_plain_model_has_one_loss_and_no_depth():
    plain = dataclasses.replace(
        SUMMARY,
        loss_topk=None,
        mean_depth=None,
        recursions=1,
        loss_bigram=None,
        completion="",
        depth_picture=None,
        mfu=None,
    )
    text = printed(plain, terminal=False)
    assert "2.1072" in row(text, "this model")
    for word in ("top-k", "difference", "bigram", "depth of", "mean depth", "completion", "MFU"):
        assert word not in text


def test_a_continued_run_tells_how_much_of_it_is_new():
    text = printed(dataclasses.replace(SUMMARY, steps=300, first_step=200), terminal=False)
    assert "300 steps, 100 of them in this call in " in text


def test_skipped_steps_are_told():
    text = printed(dataclasses.replace(SUMMARY, skipped_steps=2), terminal=False)
    assert "2 skipped (loss or gradient not finite)" in text


def test_where_the_run_started_is_told():
    text = printed(dataclasses.replace(SUMMARY, started_from="imported weights of a"), False)
    assert row(text, "300 steps").endswith(", started from imported weights of a")


def test_what_the_model_wrote_cannot_command_the_terminal():
    wild = dataclasses.replace(SUMMARY, completion="[bold]x\x1b[31m\x07\r[/bold]", name="[red]n")
    text = printed(wild, terminal=False)
    assert "\x1b" not in text and "\x07" not in text and "\r" not in text
    assert "[bold]x\ufffd[31m\ufffd\ufffd[/bold]" in text and "[red]n" in text
