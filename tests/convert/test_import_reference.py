"""Checkpoints of the paper authors' code: every variant comes in whole, with its YAML."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import yaml
from support.seeded import random_params
from support.tiny import TINY

from mor_jax.checkpoint.lazy_arrays import flatten, from_arrays
from mor_jax.convert.export_config import llama_config, reference_options
from mor_jax.convert.import_reference import import_reference
from mor_jax.convert.names import HEAD, entries
from mor_jax.convert.state_dict import from_params
from mor_jax.convert.torch_writer import write_torch
from mor_jax.convert.views import as_tensors

EXPERT = TINY["expert"]


def write(folder, cfg, config=True, **options):
    """The checkpoint and the YAML of model `cfg`; returns both paths. options: of the YAML."""
    checkpoint = folder / "checkpoint-8"
    checkpoint.mkdir(exist_ok=True)
    rows = entries(cfg)
    view = as_tensors(cfg, rows, from_arrays(dict(flatten(random_params(cfg)))))
    aliases = {row.name: row.canonical for row in rows if row.is_alias}
    write_torch(checkpoint / "pytorch_model.bin", view, aliases)
    if config:
        (checkpoint / "config.json").write_text(json.dumps(llama_config(cfg)))
    settings = {
        "name": "trial",
        "tokenizer": "smollm",
        "model": "smollm",
        "model_name_or_path": "HuggingFaceTB/SmolLM-135M",
        "model_config": None,
        "learning_rate": "${lr}",
        "deepspeed": {"zero_optimization": {"stage": 2}},
        **reference_options(cfg),
    }
    file = folder / "trial.yaml"
    file.write_text(yaml.safe_dump(settings | options))
    return str(checkpoint), str(file)


@pytest.mark.parametrize("name", [n for n, c in TINY.items()])
def test_every_variant_comes_in_bit_for_bit(name, tmp_path):
    cfg = TINY[name]
    imported = import_reference(*write(tmp_path, cfg))
    same = dataclasses.replace(imported.cfg, router=cfg.router, attention=cfg.attention)
    assert same == cfg
    ours, theirs = imported.cfg.router, cfg.router
    assert ours.capacities(cfg.num_recursions) == pytest.approx(
        theirs.capacities(cfg.num_recursions)
    )
    for field in ("kind", "arch", "gating"):
        assert getattr(ours, field) == getattr(theirs, field)
    if cfg.router.kind != "none":
        assert (ours.activation, ours.alpha) == (theirs.activation, theirs.alpha)
    for path, value in flatten(random_params(cfg)):
        np.testing.assert_array_equal(imported.params.read(path), value, err_msg=path)
    assert imported.facts["name"] == "trial" and imported.facts["format"] == "torch"


def test_deepspeed_checkpoints_and_lone_files(tmp_path):
    checkpoint, file = write(tmp_path, EXPERT)
    state = {n: torch.from_numpy(a) for n, a in from_params(EXPERT, random_params(EXPERT)).items()}
    run = tmp_path / "run"
    step = run / "global_step3"
    step.mkdir(parents=True)
    (run / "latest").write_text("global_step3")
    torch.save({"module": state, "global_steps": 3}, step / "mp_rank_00_model_states.pt")
    (run / "config.json").write_text(json.dumps(llama_config(EXPERT)))
    expected = random_params(EXPERT)["shared"]["mlp"]["gate"]
    for source in (run, f"{checkpoint}/pytorch_model.bin"):
        imported = import_reference(str(source), file)
        np.testing.assert_array_equal(imported.params.read("shared.mlp.gate"), expected)


def test_the_shape_may_come_from_the_base_model_with_changes(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    # 9 layers: the first and the last, and twice 3 of the 7 between.
    told = llama_config(EXPERT) | {"num_hidden_layers": 30, "intermediate_size": 7}
    (base / "config.json").write_text(json.dumps(told))
    changes = {"num_hidden_layers": 9, "intermediate_size": EXPERT.intermediate_size}
    for name in (str(base), "base"):
        checkpoint, file = write(
            tmp_path, EXPERT, config=False, model_name_or_path=name, model_config=changes
        )
        imported = import_reference(checkpoint, file)
        assert imported.cfg.num_layers == EXPERT.num_layers == 8
        assert imported.facts["notes"] == ["9 layers became 8 to fit the sharing scheme"]


@pytest.mark.parametrize("base", [None, "no/such-model"])
def test_a_shape_that_is_nowhere_is_asked_for(base, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    checkpoint, file = write(tmp_path, EXPERT, config=False, model_name_or_path=base)
    with pytest.raises(ValueError, match=r"model_name_or_path.*Copy the base model's config\.json"):
        import_reference(checkpoint, file)


def test_attention_that_differs_between_recursions_is_refused_with_the_reason(tmp_path):
    checkpoint, file = write(tmp_path, EXPERT)
    state = torch.load(f"{checkpoint}/pytorch_model.bin", weights_only=True)
    name = "model.layers.2.block.0.self_attn.q_proj.weight"
    torch.save(state | {name: state[name] + 1}, f"{checkpoint}/pytorch_model.bin")
    imported = import_reference(checkpoint, file)
    with pytest.raises(ValueError, match="older version of the reference") as error:
        imported.params.read("shared.attention.q")
    assert name in str(error.value)


def test_the_recursive_class_keeps_an_unembedding_of_its_own(tmp_path):
    cfg = dataclasses.replace(TINY["middle_cycle"], tie_embeddings=False)
    checkpoint, file = write(tmp_path, cfg)
    told = llama_config(cfg) | {"tie_word_embeddings": True}
    (tmp_path / "checkpoint-8" / "config.json").write_text(json.dumps(told))
    imported = import_reference(checkpoint, file)
    assert not imported.cfg.tie_embeddings
    assert "are untied, though config.json says" in imported.facts["notes"][0]
    assert HEAD in {row.name for row in entries(imported.cfg) if not row.is_alias}


def test_a_yaml_of_another_model_lists_what_does_not_fit(tmp_path):
    checkpoint, _ = write(tmp_path, EXPERT)
    _, file = write(tmp_path, TINY["token"])
    write_torch(
        tmp_path / "checkpoint-8" / "pytorch_model.bin",
        as_tensors(EXPERT, entries(EXPERT), from_arrays(dict(flatten(random_params(EXPERT))))),
    )
    with pytest.raises(ValueError) as error:
        import_reference(checkpoint, file)
    assert "misshapen   model.layers.1.mor_router.router.weight (1, 32)" in str(error.value)
    assert "unexpected  model.layers.1.block.0.self_attn.q_proj.weight" in str(error.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: [", "is not a YAML file"),
        ("learning_rate: 1", "has none of the settings"),
        ("- recursive", "has none of the settings"),
        ("recursive: {enable: true, num_recursion: '${n}'}", "has unresolved references"),
        ("recursive: {enable: true}\nrelaxation: {enable: true}", "unknown block"),
        ("mor: {enable: true, rand_router: true}\nrecursive: {enable: true}", "random routing"),
    ],
)
def test_yaml_files_that_do_not_tell_are_refused(text, reason, tmp_path):
    checkpoint, file = write(tmp_path, EXPERT)
    (tmp_path / "trial.yaml").write_text(text)
    with pytest.raises(ValueError, match=reason):
        import_reference(checkpoint, file)


def test_a_missing_yaml_is_named(tmp_path):
    checkpoint, _ = write(tmp_path, EXPERT)
    with pytest.raises(ValueError, match=r"reference_config='.*none\.yaml': does not exist"):
        import_reference(checkpoint, str(tmp_path / "none.yaml"))
