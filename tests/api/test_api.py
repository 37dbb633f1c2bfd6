"""The Python interface on small runs: train, load, generate, score, depths, evaluate, export."""

import functools
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from support.served_runs import of_bytes, write_run

import mor_jax
from mor_jax.api.train import train_config
from mor_jax.config import TrainConfig
from mor_jax.inference.config import compute_config
from mor_jax.models.params import forward, unembed
from mor_jax.models.routing.router import Route
from mor_jax.types import Batch

SMALL = {
    "steps": 3,
    "batch_size": 8,
    "seq_len": 32,
    "eval.batches": 1,
    "eval.batch_size": 8,
    "eval.interval": None,
    "eval.completion_tokens": 0,
    "checkpoint.interval": None,
    "optim.warmup_steps": 1,
    "optim.decay_steps": 1,
    "model.hidden_size": 32,
    "model.intermediate_size": 48,
    "model.head_dim": 16,
    "model.num_heads": 2,
    "model.num_kv_heads": 1,
}
TEXT = "def mean(values):"


@pytest.fixture(scope="module")
def routed(tmp_path_factory):
    path = tmp_path_factory.mktemp("api") / "routed"
    write_run(path, of_bytes("expert"))
    with mor_jax.load(path) as model:
        yield path, model


def test_importing_the_package_imports_no_dependency():
    code = "import sys, mor_jax; print(sorted({'jax', 'numpy', 'flax'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_unknown_name_is_an_attribute_error_that_lists_the_known_ones():
    with pytest.raises(AttributeError, match=r"'tarin'; it has .*'train'"):
        _ = mor_jax.tarin
    assert set(mor_jax.__all__) <= set(dir(mor_jax))


def test_a_configuration_is_a_name_a_file_a_dictionary_or_typed(tmp_path):
    typed = train_config("mor:recursions=2", SMALL)
    assert (typed.steps, typed.model.num_recursions, typed.optim.warmup_steps) == (3, 2, 1)
    assert train_config(typed, {}) == typed
    assert train_config(typed.to_dict(), {}) == typed
    assert train_config(ConfigDict(typed.to_dict()), {}) == typed
    file = tmp_path / "mine.py"
    file.write_text("from mor_jax.configs import mor\n\nget_config = mor.get_config\n")
    assert train_config(f"{file}:recursions=2", SMALL) == typed


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        ({}, {}, "config={}: is empty"),
        ("morr", {}, "config='morr': .* Did you mean 'mor'?"),
        ("nothing_like_it", {}, r"Give a file or one of \['from_study'"),
        ("mor:size=tiny", {}, "size=tiny"),
        ("mor", {"optim.lrr": 1.0}, r"optim.lrr=1.0: unknown setting.*Did you mean optim.lr"),
        ("mor", {"optimm.lr": 1.0}, "optimm.lr=1.0: there is no group 'optimm'"),
        ("mor", {"steps": "3"}, "steps='3': must be an int"),
        ("mor", {"length": 32}, "length=32: .*seq_len"),
    ],
)
def test_a_wrong_configuration_is_refused_in_one_line(config, settings, message, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        mor_jax.train(config, tmp_path / "run", settings=settings)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_train_returns_the_last_evaluation_and_its_weights_can_be_used(tmp_path):
    (tmp_path / "text").mkdir()
    for number in range(40):
        (tmp_path / "text" / f"{number}.txt").write_text(f"{number} squared is {number**2}\n" * 30)
    settings = SMALL | {"data.sources": (f"text:{tmp_path}/text/*.txt",)}
    evaluated = mor_jax.train("mor:recursions=2", tmp_path / "run", settings=settings)
    assert 0 < evaluated["loss_causal"] < 6
    # A run that has ended is evaluated again, not trained.
    assert mor_jax.train("mor:recursions=2", tmp_path / "run", settings=settings) == evaluated
    found = mor_jax.evaluate(tmp_path / "run")
    assert found["loss_causal"] == pytest.approx(evaluated["loss_causal"], abs=1e-5)
    with mor_jax.load(tmp_path / "run") as model:
        assert model.cfg.num_recursions == 2
        assert len(model.generate("x", max_tokens=4, seed=1, ignore_eos=True).tokens) == 4


def test_generate_equals_the_full_forward_and_a_list_equals_single_calls(routed):
    _, model = routed
    prompts = ["def ", "class A", ""]
    many = model.generate(prompts, max_tokens=6, temperature=0, ignore_eos=True)
    for prompt, one in zip(prompts, many, strict=True):
        alone = model.generate(prompt, max_tokens=6, temperature=0, ignore_eos=True)
        np.testing.assert_array_equal(alone.tokens, one.tokens)
        assert (one.finish_reason, len(one.depths), len(one.logprobs)) == ("length", 6, 6)
        row = model.tokenizer.encode(prompt).tolist() or [model.tokenizer.eos_id]
        for token, logprob in zip(one.tokens, one.logprobs, strict=True):
            expected = _log_probabilities(model, row)[-1]
            assert token == int(np.argmax(expected))
            assert logprob == pytest.approx(expected[token], abs=1e-4)
            row.append(int(token))
    assert model.generate([]) == []


@functools.cache
def _logits_of(model):
    cfg = compute_config(model.cfg, None)

    @jax.jit
    def run(tokens):
        hidden = forward(cfg, model.params, Batch(tokens, tokens), Route(mode="causal")).hidden
        return unembed(cfg, model.params, hidden)

    return run


def _log_probabilities(model, row):
    tokens = np.zeros((1, 32), np.int32)
    tokens[0, : len(row)] = row
    logits = np.asarray(_logits_of(model)(tokens), np.float64)[0, : len(row)]
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_score_is_the_log_probability_of_each_token(routed):
    _, model = routed
    score = model.score(TEXT)
    expected = _log_probabilities(model, score.tokens.tolist())
    wanted = [expected[i, token] for i, token in enumerate(score.tokens[1:])]
    assert np.isnan(score.logprobs[0])
    np.testing.assert_allclose(score.logprobs[1:], wanted, atol=1e-5)
    assert score.total == pytest.approx(sum(wanted), abs=1e-4)
    assert score.loss == pytest.approx(-np.mean(wanted), abs=1e-5)
    assert score.perplexity == pytest.approx(np.exp(-np.mean(wanted)), rel=1e-4)
    rest = model.score(TEXT[5:], context=TEXT[:5])
    np.testing.assert_allclose(rest.logprobs, score.logprobs[5:], atol=1e-5)
    assert np.isnan(model.score("x").loss)


def test_depths_are_those_of_generation(routed):
    _, model = routed
    depths = model.depths(TEXT)
    assert "".join(depths.pieces) == TEXT and len(depths.depths) == len(TEXT)
    assert len(set(depths.depths.tolist())) > 1, "a model of one depth tests nothing"
    assert depths.mean == pytest.approx(depths.depths.mean())
    following = model.generate(TEXT, max_tokens=1, temperature=0, ignore_eos=True)
    assert following.depths[0] == depths.depths[-1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.generate("x", temprature=0), "temprature=0: unknown setting.*temperature"),
        (lambda m: m.generate("x", temperature=-1.0), "temperature=-1.0"),
        (lambda m: m.generate("x", n=2), "n=2: not a setting of Model.generate"),
        (lambda m: m.generate("x" * 100), "prompt.*has 100 tokens"),
        (lambda m: m.score(""), "text='': has no token"),
        (lambda m: m.generate("x", max_tokens=0), "^max_tokens=0"),
        (lambda m: m.score("x" * 40, context="y" * 40), "80 tokens exceed the model's context"),
        (lambda m: m.depths("x" * 100), "text='xxx.*100 tokens exceed"),
    ],
)
def test_what_does_not_fit_is_refused(call, message, routed):
    with pytest.raises(ValueError, match=message):
        call(routed[1])


def test_a_closed_model_can_be_used_again_and_from_several_threads(routed):
    _, model = routed
    one = model.generate("a", max_tokens=5, seed=3, ignore_eos=True)
    model.close()
    found = {}

    def work(number):
        found[number] = model.generate("a", max_tokens=5, seed=3, ignore_eos=True).text

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(3), one.text)


def test_a_vanilla_model_has_no_depths(tmp_path):
    write_run(tmp_path / "run", of_bytes("plain"))
    with mor_jax.load(tmp_path / "run") as model:
        with pytest.raises(ValueError, match=r"router.kind='none': every token"):
            model.depths("x")
        assert model.generate("x", max_tokens=2, seed=1, ignore_eos=True).depths.tolist() == [0, 0]


@pytest.mark.parametrize("name", ["expert", "token", "plain"])
def test_an_export_is_loaded_and_evaluated_like_its_run(name, tmp_path):
    write_run(tmp_path / "run", of_bytes(name))
    written = mor_jax.export(tmp_path / "run", tmp_path / "export")
    assert {"config.json", "model.safetensors"} <= set(written.files)
    with mor_jax.load(tmp_path / "run") as a, mor_jax.load(written.output) as b:
        np.testing.assert_allclose(a.score(TEXT).logprobs, b.score(TEXT).logprobs, atol=1e-6)
        wish = {"max_tokens": 6, "seed": 5, "ignore_eos": True}
        assert a.generate(TEXT, **wish).text == b.generate(TEXT, **wish).text
    with pytest.raises(ValueError, match="output="):
        mor_jax.export(tmp_path / "run", tmp_path / "export")


def test_a_source_that_does_not_exist_is_named(tmp_path):
    for call in (mor_jax.load, mor_jax.evaluate):
        with pytest.raises(ValueError, match=r"source='.*nothing': does not exist"):
            call(tmp_path / "nothing")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match="neither a directory nor a GGUF file"):
        mor_jax.load(tmp_path / "notes.txt")


WRONG_TYPES = """
import sys, mor_jax
model = mor_jax.load(sys.argv[1])
for call in (
    lambda: mor_jax.load(None),
    lambda: mor_jax.evaluate(3),
    lambda: mor_jax.train("mor", ""),
    lambda: mor_jax.export(sys.argv[1], ""),
    lambda: model.generate(["a", 3]),
    lambda: model.generate(b"a"),
    lambda: model.score(None),
    lambda: model.depths(3),
):
    try:
        print("accepted", call())
    except ValueError as error:
        print(error)
"""


def test_a_wrong_type_is_named(routed):
    """In a process of its own: here the types of all arguments are checked before."""
    command = [sys.executable, "-c", WRONG_TYPES, str(routed[0])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    values = [line.split(": must be ")[0] for line in done.stdout.splitlines()]
    wanted = ["source=None", "source=3", "workdir=''", "output=''"]
    assert values == [*wanted, "prompt=3", "prompt=b'a'", "text=None", "text=3"]


def test_typed_configurations_are_accepted_as_they_are():
    cfg = train_config("vanilla", {})
    assert isinstance(cfg, TrainConfig)
    assert train_config(cfg, {"seed": 7}).seed == 7
