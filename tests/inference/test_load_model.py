"""A run becomes a model to serve: what is read, what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.seeded import random_params
from support.served_runs import of_bytes, with_router, write_run
from tokenizers import Tokenizer, models, pre_tokenizers

from mor_jax.checkpoint.load_weights import load_run
from mor_jax.inference.calibration_file import Calibration, fingerprint, path_of, save
from mor_jax.inference.load_model import load_model

MODEL = of_bytes("expert_cycle")


def calibration(workdir, **changes):
    """A calibration of the run, saved under the name `made`."""
    facts = {
        "weights": fingerprint(load_run(workdir)),
        "step": 0,
        "recursions": 3,
        "thresholds": (0.0, 0.25, -0.5),
        "wanted": (1.0, 0.5, 0.25),
        "shares": (1.0, 0.52, 0.24),
        "loss": 2.5,
        "text": "some",
        "tokens": 1000,
    }
    made = Calibration(**(facts | changes))
    save(path_of(workdir, "made"), made)
    return made


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("served") / "small"
    write_run(workdir, MODEL)
    return workdir


def test_a_run_as_it_is(run):
    served = load_model(run)
    assert (served.name, served.cfg, served.thresholds) == ("small", MODEL, None)
    assert served.shares == (1.0, 2 / 3, 1 / 3)
    assert (served.eos_ids, served.chat_template, served.special_tokens) == ({0}, None, {})
    jax.tree.map(np.testing.assert_array_equal, served.params, random_params(MODEL, 1))
    assert abs(served.created - (run / "initial" / "manifest.json").stat().st_mtime) < 1


def test_calibrations_and_recursions_change_what_is_served(run):
    made = calibration(run)
    served = load_model(run, calibration="made")
    assert (served.thresholds, served.shares) == (made.thresholds, made.shares)
    fewer = load_model(run, calibration=str(path_of(run, "made")), recursions=2)
    assert (fewer.thresholds, fewer.shares) == ((0.0, 0.25), (1.0, 0.52))
    assert (fewer.cfg.num_recursions, fewer.cfg.num_layers) == (2, 4)
    assert load_model(run, recursions=4).shares == (1.0, 2 / 3, 1 / 3, 1 / 3)
    with pytest.raises(ValueError, match="recursions=4: the calibration is for 3 recursions"):
        load_model(run, calibration="made", recursions=4)


def test_token_choice_carries_its_calibration_among_its_parameters(tmp_path):
    for name, learned in (("token", 0.0), ("token_loss_free", None)):
        model, workdir = of_bytes(name), tmp_path / name
        params = random_params(model, 1)
        write_run(workdir, model, params=params)
        calibration(workdir, thresholds=None, depth_bias=(0.3, 0.0, -0.3))
        served = load_model(workdir, calibration="made")
        before = params["router"]["bias"] if learned is None else learned
        wanted = before + jnp.asarray((0.3, 0.0, -0.3))
        np.testing.assert_allclose(served.params["router"]["bias"], wanted, rtol=1e-6)
        assert served.cfg.router.load_balancing == "loss_free" and served.thresholds is None


def test_calibrations_that_do_not_fit_are_refused(run, tmp_path):
    def refused(match, name="made"):
        with pytest.raises(ValueError, match=match):
            load_model(run, calibration=name)

    calibration(run)
    refused(r"calibration='fast': there is no .*fast\.json; .* has \['made'\]", "fast")
    calibration(run, thresholds=(0.0, 0.1))
    refused(r"made\.json: thresholds=\(0\.0, 0\.1\): needs one finite number for each of 3")
    calibration(run, thresholds=(0.0, float("nan"), 0.1))
    refused(r"made\.json: thresholds\[1\]=nan: must be a number, not NaN")
    calibration(run, thresholds=None, depth_bias=(0.0, 0.0, 0.0))
    refused(r"made\.json: thresholds=\(\): needs one finite number")
    calibration(run, weights="0123", step=200)
    refused(r"was made for other weights \(step 200\) than .*small.*Calibrate these")
    for text in ("{", "[]", '{"weights": "a"}', '{"of": 1}'):
        path_of(run, "made").write_text(text)
        refused(r"made\.json")
    write_run(tmp_path / "other", MODEL, seed=2)
    calibration(tmp_path / "other")
    refused("was made for other weights", str(path_of(tmp_path / "other", "made")))


def test_routers_that_never_learned_the_choice_need_a_calibration(tmp_path):
    model = with_router(MODEL, causal_routing="none")
    write_run(tmp_path / "run", model)
    with pytest.raises(
        ValueError, match=r"model\.router\.causal_routing='none': no causal routing.*--calibr"
    ):
        load_model(tmp_path / "run")
    calibration(tmp_path / "run")
    assert load_model(tmp_path / "run", calibration="made").thresholds == (0.0, 0.25, -0.5)
    # Where every recursion takes every token there is no choice to learn.
    write_run(tmp_path / "whole", with_router(model, capacity=(1.0, 1.0, 1.0)))
    assert load_model(tmp_path / "whole").shares == (1.0, 1.0, 1.0)


def test_parameters_that_are_not_finite_are_named(tmp_path):
    params = jax.tree.map(lambda x: x, random_params(MODEL, 1))
    weight = params["router"]["main"]["weight"]
    params["router"]["main"]["weight"] = weight.at[1, :3].set(jnp.array([jnp.nan, jnp.inf, 0]))
    write_run(tmp_path / "run", MODEL, params=params)
    match = r"router\.main\.weight='float32\[3, 32\]': holds 2 values of 96 that are not finite"
    with pytest.raises(ValueError, match=match):
        load_model(tmp_path / "run")


@pytest.fixture
def tokenizer(tmp_path):
    """A directory with a small tokenizer: 5 tokens, the last two special."""
    made = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2, "</s>": 3, "<end>": 4}, "a"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    directory = tmp_path / "tokenizer"
    directory.mkdir()
    made.save(str(directory / "tokenizer.json"))
    return directory


def put(directory, name, **values):
    (directory / name).write_text(json.dumps(values))


def test_the_conventions_of_a_tokenizer(tokenizer, tmp_path):
    write_run(tmp_path / "run", MODEL, tokenizer=str(tokenizer))
    load = load_model
    assert load(tmp_path / "run").eos_ids == {3}
    put(tokenizer, "generation_config.json", eos_token_id=[4, 3, 5000, None, True])
    eos, template = {"content": "<end>", "lstrip": False}, "{{ bos_token }}{{ messages }}"
    config = {"eos_token": eos, "bos_token": "</s>", "pad_token": None}
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": template}]
    put(tokenizer, "tokenizer_config.json", **config, chat_template=named)
    served = load(tmp_path / "run")
    assert served.eos_ids == {3, 4} and served.chat_template == template
    assert served.special_tokens == {"eos_token": "<end>", "bos_token": "</s>"}
    (tokenizer / "chat_template.jinja").write_text("ü{{ messages }}", encoding="utf-8")
    assert load(tmp_path / "run").chat_template == "ü{{ messages }}"
    (tokenizer / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"data\.tokenizer=.*generation_config\.json': is damaged"):
        load(tmp_path / "run")


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tokenizer, tmp_path):
    model = of_bytes("plain")
    model = type(model)(**{**vars(model), "vocab_size": 4})
    write_run(tmp_path / "run", model, tokenizer=str(tokenizer))
    with pytest.raises(ValueError, match=r"model\.vocab_size=4: must be at least 5"):
        load_model(tmp_path / "run")
