"""Names that settings had before: read from records, answered where a person gives one."""

import json

import pytest

from configs import mor
from configs.from_workdir import get_config as from_workdir
from mor_jax.checkpoint import run_dir
from mor_jax.config import TrainConfig, old_names
from mor_jax.config.parsing import flatten_settings, with_settings

SETTINGS = old_names.SETTINGS


def old(values):
    """A configuration as version 0.1.0 wrote it."""
    names = {new: old for old, new in SETTINGS.items()}
    tree = {}
    for path, value in flatten_settings(values).items():
        *groups, leaf = names.get(path, path).split(".")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        node[leaf] = value
    return tree


def test_every_new_name_is_a_setting_and_no_old_one_is():
    settings = flatten_settings(TrainConfig().to_dict())
    assert set(SETTINGS.values()) <= settings.keys()
    assert not SETTINGS.keys() & settings.keys()
    assert len(set(SETTINGS.values())) == len(SETTINGS)


def test_what_was_recorded_under_old_names_is_the_same_configuration():
    cfg = TrainConfig.from_dict(mor.get_config("size=360m,routing=token").to_dict())
    before = old(run_dir.to_plain(cfg))
    assert "length" in before and "width" in before["model"]
    assert TrainConfig.from_dict(old_names.translated(before)) == cfg
    assert old_names.translated_paths(flatten_settings(before)) == flatten_settings(
        run_dir.to_plain(cfg)
    )


def test_a_name_given_twice_is_refused():
    with pytest.raises(ValueError, match=r"^model\.width=8: is the old name of model\.hidden_size"):
        old_names.translated({"model": {"width": 8, "hidden_size": 16}})


@pytest.mark.parametrize("name", SETTINGS)
def test_an_old_name_in_a_configuration_is_answered_with_the_new_one(name):
    values = run_dir.to_plain(TrainConfig())
    with pytest.raises(ValueError) as error:
        TrainConfig.from_dict(with_settings(values, {name: 1}))
    assert str(error.value) == f"{name}=1: unknown setting. It is called {SETTINGS[name]} now"


def test_an_old_directory_is_that_of_the_same_run(tmp_path):
    cfg = TrainConfig.from_dict(mor.get_config().to_dict())
    run_dir.claim_workdir(tmp_path, cfg)
    file = tmp_path / run_dir.CONFIG_FILE
    written = file.read_text()
    file.write_text(json.dumps(old(json.loads(written))))
    assert run_dir.read_config(tmp_path) == cfg
    assert TrainConfig.from_dict(from_workdir(str(tmp_path)).to_dict()) == cfg
    assert run_dir.claim_workdir(tmp_path, cfg) == []
    assert file.read_text() == written


def test_changes_are_allowed_under_new_names():
    with pytest.raises(ValueError, match=r"^allow_changes=length: unknown setting. It is called s"):
        run_dir._check_names(["length"], TrainConfig())
