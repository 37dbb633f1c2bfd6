"""lm-evaluation-harness on a tiny run: log-likelihoods, answers, tasks of one's own, bad input."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from support.seeded import random_params
from support.tiny import TINY, train_config

from mor_jax.checkpoint import pretrained
from mor_jax.checkpoint.lazy_arrays import flatten, from_arrays
from mor_jax.checkpoint.run_dir import claim_workdir
from mor_jax.config import DataConfig
from mor_jax.evaluation.lm_eval import command, generation, tasks
from mor_jax.evaluation.lm_eval.model import MorLM
from mor_jax.evaluation.lm_eval.scoring import Scorer
from mor_jax.models.params import forward, unembed
from mor_jax.training.evaluator import CAUSAL
from mor_jax.types import Batch

MODEL = dataclasses.replace(TINY["expert_cycle"], vocab_size=256, num_layers=2, num_recursions=2)
PARAMS = random_params(MODEL, 2)
LONGEST = MODEL.max_seq_len


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    claim_workdir(workdir, train_config(model=MODEL, data=DataConfig(sources=("stdlib",))))
    pretrained.write(workdir, MODEL, from_arrays(dict(flatten(PARAMS))), {"from": "a/model"})
    return workdir


@pytest.fixture(scope="module")
def model(run):
    return MorLM(str(run), batch_size=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tasks of three kinds, one of which has no data."""
    path = tmp_path_factory.mktemp("tasks")
    rows = [
        {"q": f"{i} and" * 9, "choices": ["1", "2", f"{i} more"], "right": i % 3} for i in range(4)
    ]
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    head = "dataset_path: json\ntest_split: test\ndataset_kwargs:\n  data_files:\n    test: "
    kinds = {
        "tiny_choice": ("rows", "output_type: multiple_choice", "doc_to_choice: '{{choices}}'"),
        "tiny_pages": ("rows", "output_type: loglikelihood_rolling", "doc_to_choice: null"),
        "tiny_lacking": ("none", "output_type: multiple_choice", "doc_to_choice: '{{choices}}'"),
    }
    for name, (data, *more) in kinds.items():
        metric = "bits_per_byte" if name == "tiny_pages" else "acc"
        target = "'{{q}} {{choices}}'" if name == "tiny_pages" else "'{{right}}'"
        lines = [f"task: {name}", f"{head}{path / data}.jsonl", *more, "doc_to_text: '{{q}}'"]
        lines += [f"doc_to_target: {target}", f"metric_list:\n  - metric: {metric}"]
        (path / f"{name}.yaml").write_text("\n".join(lines) + "\n")
    return path


def asked(*pairs):
    return [Instance("loglikelihood", {}, pair, 0) for pair in pairs]


@jax.jit
def log_p(row):
    hidden = forward(MODEL, PARAMS, Batch(row, row), CAUSAL).hidden
    return jax.nn.log_softmax(unembed(MODEL, PARAMS, hidden))


def filled(row):
    return jnp.asarray([[*row, *[0] * (LONGEST - len(row))]], jnp.int32)


def naive(context, continuation):
    """Of one row alone, which is filled up behind: under causal routing that changes nothing."""
    *row, _ = tokens = [*context, *continuation][-LONGEST - 1 :]
    rows = np.asarray(log_p(filled(row)))[0, : len(row)][-len(continuation) :]
    last = tokens[-len(continuation) :]
    return rows[np.arange(len(last)), last].sum(), bool((rows.argmax(-1) == last).all())


def test_scores_are_those_of_each_row_alone_whatever_the_batch():
    """Short and long continuations, contexts that are cut, many last tokens of the same row."""
    rng = np.random.default_rng(0)
    lengths = [(49, 3), (50, 1), (17, 34), (55, 30), (200, 64), (200, 2), (52, 9), (61, 4), (63, 1)]
    pairs = [tuple(rng.integers(1, 256, n).tolist() for n in both) for both in lengths]
    context = pairs[0][0]
    best = int(np.asarray(log_p(filled(context)))[0, len(context) - 1].argmax())
    # More than one row takes, the best one among them: greedy decoding gives it.
    pairs += [(context, [last]) for last in (*range(8), best)]
    pairs.append((context, [best, 7]))
    wanted = [naive(*pair) for pair in pairs]
    assert wanted[-2][1] and sum(greedy for _, greedy in wanted) == 1
    found = {}
    for size in (8, None):
        found[size] = dict(Scorer(MODEL, PARAMS, None, LONGEST, size).scores(pairs))
        for number, (value, greedy) in enumerate(wanted):
            assert found[size][number][0] == pytest.approx(value, abs=1e-4)
            assert found[size][number][1] == greedy
    for number in range(len(pairs)):
        assert found[8][number][0] == pytest.approx(found[None][number][0], abs=1e-5)


def test_texts_become_tokens_as_lm_eval_does_it(model, caplog):
    """Spaces at the end of a context go on; an empty one is an end of text; long ones are cut."""
    found = model.loglikelihood(asked(("ab ", "c"), ("", "xyz"), ("q" * 80, "rs")), True)
    code = lambda text: list(text.encode())  # noqa: E731
    pairs = [(code("ab"), code(" c")), ([0], code("xyz")), (code("q" * 80), code("rs"))]
    for (value, greedy), pair in zip(found, pairs, strict=True):
        assert (pytest.approx(value, abs=1e-4), greedy) == naive(*pair)
    assert model.truncated == 1
    with pytest.raises(ValueError, match=r"continuation='z+': has 65 tokens, the model supports"):
        model.loglikelihood(asked(("a", "z" * 65)), True)
    for context, continuation in (("", ""), ("a", ""), ("", "\0")):
        with pytest.raises(ValueError, match=r"continuation='.*': is empty: nothing to score"):
            model.loglikelihood(asked((context, continuation)), True)
    # Blanks of a context go to the continuation; the end of a text stands before it then.
    (blank, empty) = model.loglikelihood(asked((" ", "c"), ("", " c")), True)
    assert blank == empty and model.loglikelihood([], True) == model.generate_until([], True) == []
    # Each token once, the first after an end of text, those of the last window after all there is.
    text = "".join(chr(65 + i % 50) for i in range(100))
    (rolling,) = model.loglikelihood_rolling(asked((text,)), True)
    windows = [([0], code(text[:64])), (code(text[35:64]), code(text[64:]))]
    assert rolling == pytest.approx(sum(naive(*pair)[0] for pair in windows), abs=1e-3)


def test_a_beginning_of_text_that_is_scored_is_said(model, monkeypatch, caplog):
    rolling = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in ("xyz", "", "xy")]
    plain = model.loglikelihood_rolling(rolling, True)
    assert not caplog.messages and plain[1] == 0
    bos = model.prefix_token_id
    monkeypatch.setattr(model, "tok_encode", lambda text: [bos, *text.encode()])
    found = model.loglikelihood_rolling(rolling, True)
    assert found[0] == pytest.approx(naive([bos], [bos, *b"xyz"])[0], abs=1e-4)
    [said] = caplog.messages
    assert said.startswith("3 of 3 documents begin with ") and "add_bos_token=False" in said


def test_answers_are_greedy_and_end_before_their_stop_text(model):
    row = list(b"Once upon")
    for _ in range(12):
        row.append(int(np.asarray(log_p(filled(row)))[0, len(row) - 1, 1:].argmax()) + 1)
    whole = model.served.tokenizer.decode(row[9:])
    settings = {"until": [], "max_gen_toks": 12, "do_sample": False}
    asks = [
        Instance("generate_until", {}, ("Once upon", {**settings, "until": until}), 0)
        for until in ([], [whole[2]], ["never"])
    ]
    assert model.generate_until(asks, True) == [whole, whole.split(whole[2])[0], whole]


def test_settings_of_generation_by_their_names_there():
    wanted = partial(generation.generation_request, max_tokens=256, max_length=512)
    greedy = wanted({"until": "x", "do_sample": False, "temperature": 0.7, "num_beams": 1})
    assert (greedy.stop, greedy.max_tokens, greedy.sampling.temperature) == (("x",), 256, 0.0)
    drawn = wanted({"temperature": 0.7, "top_k": 0, "top_p": 0.9, "max_new_tokens": 9})
    assert (drawn.sampling.temperature, drawn.sampling.top_p, drawn.max_tokens) == (0.7, 0.9, 9)
    with pytest.raises(ValueError, match=r"gen_kwargs\.num_beams=4: is not supported; supported"):
        wanted({"num_beams": 4})
    written = wanted({"max_gen_toks": "9", "temperature": "0.7", "seed": 3, "top_k": 5.0})
    assert (written.max_tokens, written.sampling.temperature) == (9, 0.7)
    assert (written.sampling.seed, written.sampling.top_k) == (3, 5)
    for settings, told in (
        ({"max_gen_toks": 512}, "max_gen_toks=512: must be between 1 and 511"),
        ({"max_new_tokens": 0}, "max_new_tokens=0: must be between 1 and 511"),
        ({"max_gen_toks": "x"}, "max_gen_toks='x': must be a whole number"),
        ({"max_gen_toks": 2.5}, r"max_gen_toks=2\.5: must be a whole number"),
        ({"temperature": "hot"}, "temperature='hot': must be a number"),
        ({"temperature": float("inf")}, "temperature=inf: must be a number"),
        ({"top_p": []}, r"top_p=\[\]: must be a number"),
        ({"seed": 0.5}, r"seed=0\.5: must be a whole number"),
        ({"until": 3}, "until=3: must be a text or a list of texts"),
        ({"until": ["a", None]}, "until=.*: must be a text or a list of texts"),
    ):
        with pytest.raises(ValueError, match=rf"^gen_kwargs\.{told}"):
            wanted(settings)


def test_tasks_of_ones_own_run_with_lm_evals_options(run, folder, model, tmp_path):
    options = [f"--include_path={folder}", "--limit=3", "--log_samples"]
    names = ["tiny_choice,tiny_pages"]
    harness = command.prepare(names, [*options, f"--output_path={tmp_path}"], "8")
    found = harness({"path": str(run)})
    assert found["n-samples"]["tiny_choice"] == {"original": 4, "effective": 3}
    assert 0 <= found["results"]["tiny_choice"]["acc,none"] <= 1
    assert found["config"]["routing"] == "expert, causal"
    [samples] = tmp_path.rglob("samples_tiny_choice*.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    value = float(rows[2]["resps"][1][0][0])
    [(wanted, _)] = model.loglikelihood(asked(("2 and" * 9, " 2")), True)
    assert value == pytest.approx(wanted, abs=1e-5)
    table = command.lines(found)
    assert any("tiny_pages" in line and "bits_per_byte" in line for line in table)


def test_what_cannot_be_asked_is_named(run, folder):
    own = TaskManager(include_path=str(folder), include_defaults=False)
    with pytest.raises(ValueError, match=r"tasks='tiny_chois': is not a task.*mean tiny_choice\?"):
        tasks.matching("tiny_chois", own)
    with pytest.raises(ValueError, match=r"tasks=\['tiny_lacking'\]: cannot be loaded, so nothing"):
        tasks.loaded(["tiny_choice", "tiny_lacking"], own)
    assert tasks.expanded(["paper,piqa"])[:3] == ["lambada_openai", "hellaswag", "piqa"]
    configured = partial(command.configured, ["tiny_choice"], batch_size=None)
    with pytest.raises(ValueError, match="model='hf': cannot be set: the model is the run"):
        configured(["--model=hf"])
    with pytest.raises(ValueError, match=r"model_args\.pretrained='x': unknown setting"):
        configured(["--model_args", "pretrained=x"])
    with pytest.raises(ValueError, match=r"gen_kwargs\.num_beams=2"):
        configured(["--gen_kwargs", "num_beams=2"])
    with pytest.raises(ValueError, match=r"batch_size='0': must be a positive number or 'auto'"):
        command.configured(["tiny_choice"], [], "0")
    with pytest.raises(ValueError, match=r"model_args\.max_length=65: must be in 2 \.\. 64"):
        MorLM(str(run), max_length=65)
    with pytest.raises(ValueError, match="has no chat template"):
        MorLM(str(run)).chat_template(True)


def test_messages_become_prompts_by_the_template(model, monkeypatch):
    template = (
        "{{ raise_exception('no system') if messages[0].role == 'system' }}"
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
        "{{ '<bot>' if add_generation_prompt }}"
    )
    served = dataclasses.replace(model.served, chat_template=template)
    monkeypatch.setattr(model, "served", served)
    monkeypatch.setattr(model, "_chat", None)
    user, begun = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well,"}
    assert model.chat_template(True) == template
    assert model.apply_chat_template([user]) == "<user>Hi</s><bot>"
    assert model.apply_chat_template([{"role": "system", "content": "Be"}, user]).startswith(
        "<user>"
    )
    said = model.apply_chat_template([user, begun], add_generation_prompt=False)
    assert said == "<user>Hi</s><assistant>Well,"
