"""What a checkpoint says about its data, under the settings of the start that goes on from it."""

import dataclasses
import json

import numpy as np
import pytest
from etils import epath
from support.tiny import train_config

from mor_jax import data
from mor_jax.checkpoint import manifest
from mor_jax.checkpoint.run_dir import to_plain
from mor_jax.training.data_position import check_state, newest, resumed_position


@pytest.fixture
def cfg(tmp_path):
    text = "\n".join(json.dumps({"text": f"{i} " * 30}) for i in range(20))
    (tmp_path / "a.jsonl").write_text(text)
    corpus = dataclasses.replace(
        train_config("plain").data, sources=(f"jsonl:{tmp_path}/a.jsonl",), validation_fraction=0.2
    )
    return train_config("plain", data=corpus)


def begun(cfg):
    """Beginning of the data and its hash, as a start has them."""
    tokenizer = data.load_tokenizer("bytes")
    place = data.position_of(cfg.data, tokenizer, length=cfg.seq_len, seed=cfg.seed)
    return place, data.fingerprint(cfg.data, tokenizer)


def facts_of(cfg, rows, **extra):
    return {"step": 5, "position": rows, "config": to_plain(cfg), "extra": extra}


def test_the_checkpoint_decides_not_the_start_before(cfg):
    place, fingerprint = begun(cfg)
    # Twenty steps of eight rows; the start with four was killed before it saved.
    facts = facts_of(dataclasses.replace(cfg, batch_size=8), 160, data=place.notes())
    other = dataclasses.replace(cfg, batch_size=4)
    assert resumed_position(facts, other, place, fingerprint).row == 160


def test_data_that_changed_is_refused_with_old_notes_too(cfg):
    place, fingerprint = begun(cfg)
    old = facts_of(cfg, 12, fingerprint=fingerprint)
    assert resumed_position(old, cfg, place, fingerprint) == dataclasses.replace(place, row=12)
    faster = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, num_workers=3, prefetch=7))
    assert resumed_position(old, faster, place, fingerprint).row == 12
    with pytest.raises(ValueError, match=r"the data changed since step 5 was saved.*position 12"):
        resumed_position(old, cfg, place, "another")
    # Under settings that were changed knowingly that hash says nothing: the sources do.
    mixed = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, weights=(3.0,)))
    assert resumed_position(old, mixed, place, "another").row == 12


def test_places_counted_in_batches_become_rows(cfg, tmp_path, monkeypatch):
    place, fingerprint = begun(cfg)
    step = tmp_path / "checkpoints" / "00000005"
    (step / "arrays").mkdir(parents=True)
    was = dataclasses.replace(cfg, batch_size=8)
    facts = facts_of(was, 20, fingerprint=fingerprint, jumps=[[3, 5]], bad=[18, 19], other=[1])

    with monkeypatch.context() as patch:
        patch.setattr(manifest, "FORMAT", 1)
        manifest.write(epath.Path(step), facts, epath.Path(step) / "arrays")
    found = manifest.read(epath.Path(step))
    assert found["position"] == 160 and found["config"]["batch_size"] == 8
    extra = {"fingerprint": fingerprint, "jumps": [[24, 40]], "bad": [144, 152], "other": [1]}
    assert found["extra"] == extra
    assert resumed_position(found, cfg, place, fingerprint).row == 160
    assert newest(epath.Path(tmp_path)) == found
    longer = dataclasses.replace(cfg, seq_len=32)
    with pytest.raises(ValueError, match=r"^seq_len=32: 160 sequences of"):
        resumed_position(found, longer, *begun(longer))
    # One that is damaged is passed over; whoever restores says so.
    (step / "manifest.json").write_text("{}")
    assert newest(epath.Path(tmp_path)) is None


def test_a_model_that_a_checkpoint_does_not_hold_is_refused_in_one_line(cfg, tmp_path):
    state = {"params": {"a": np.zeros((2, 3)), "b": np.zeros(4)}, "step": np.int32(5)}
    facts = facts_of(cfg, 20) | {"arrays": manifest.describe(state)}
    step = epath.Path(tmp_path) / "checkpoints" / "00000005"
    (step / "arrays").mkdir(parents=True)
    manifest.write(step, facts, step / "arrays")
    found = newest(epath.Path(tmp_path))
    check_state(found, cfg, state)
    other = {"params": {"a": np.zeros((2, 5)), "c": np.zeros(4)}, "step": np.int32(5)}
    told = r"^params\.a='float64\[2, 5\]': the checkpoint of step 5 holds float64\[2, 3\] there.*"
    with pytest.raises(
        ValueError, match=rf"{told}\(3 arrays differ\)\. Give the settings"
    ) as error:
        check_state(found, cfg, other)
    assert "\n" not in str(error.value)
    assert newest(epath.Path(tmp_path / "none")) is None
    short = dataclasses.replace(cfg, steps=3)
    with pytest.raises(ValueError, match=r"^steps=3: the run has finished step 5\. Give 5 or more"):
        check_state(found, short, state)
