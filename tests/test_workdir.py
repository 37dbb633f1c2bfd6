"""The directory of a run: free, continued, another run's, or not ours at all."""

import dataclasses
import json

import pytest

from mor_jax.config import LogConfig, MeshConfig, ModelConfig, RouterConfig, TrainConfig
from mor_jax.workdir import check_workdir, claim_workdir

MODEL = ModelConfig(
    width=16,
    layers=8,
    sharing="middle_cycle",
    recursions=3,
    router=RouterConfig(kind="expert", capacities=(1.0, 0.5, 0.25)),
)
CFG = TrainConfig(model=MODEL, steps=1000)


def snapshot(path):
    return {p.relative_to(path): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_new_and_empty_directories_are_free_and_stay_untouched_by_the_check(tmp_path):
    assert check_workdir(tmp_path / "new", CFG) is False
    assert check_workdir(tmp_path, CFG) is False
    assert list(tmp_path.iterdir()) == []


def test_a_run_recognises_its_directory(tmp_path):
    assert claim_workdir(tmp_path / "a" / "run", CFG) is False
    assert claim_workdir(tmp_path / "a" / "run", CFG) is True
    text = (tmp_path / "a" / "run" / "config.json").read_text()
    assert TrainConfig.from_dict(json.loads(text)) == CFG


def test_what_a_continued_run_may_change_is_recorded(tmp_path):
    claim_workdir(tmp_path, CFG)
    model = dataclasses.replace(MODEL, remat="block", attention="xla")
    longer = dataclasses.replace(
        CFG, steps=2000, model=model, log=LogConfig(every=1), mesh=MeshConfig(fsdp=2)
    )
    assert claim_workdir(tmp_path, longer) is True
    assert json.loads((tmp_path / "config.json").read_text())["steps"] == 2000


def test_another_configuration_is_refused_with_every_difference(tmp_path):
    claim_workdir(tmp_path, CFG)
    before = snapshot(tmp_path)
    router = dataclasses.replace(MODEL.router, capacities=(1.0, 0.5, 0.5))
    model = dataclasses.replace(MODEL, width=32, router=router)
    other = dataclasses.replace(CFG, model=model, seed=3, steps=7000)
    with pytest.raises(ValueError) as caught:
        claim_workdir(tmp_path, other)
    message = str(caught.value)
    assert "model.width: 16 there, 32 now" in message
    assert "model.router.capacities: [1.0, 0.5, 0.25] there, [1.0, 0.5, 0.5] now" in message
    assert "seed: 0 there, 3 now" in message
    assert "steps" not in message and "--workdir" in message and "delete" in message
    assert snapshot(tmp_path) == before


def test_settings_of_another_version_are_differences(tmp_path):
    claim_workdir(tmp_path, CFG)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    del config["seed"]
    file.write_text(json.dumps(config | {"old": 1}))
    with pytest.raises(ValueError, match=r"(?s)old: 1 there, absent now.*seed: absent there, 0"):
        check_workdir(tmp_path, CFG)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("notes.txt", "mine", r"not the directory of a run \(no config.json\)"),
        ("config.json", '{"architectures": ["Llama"]}', "another program's"),
        ("config.json", "[1]", "another program's"),
        ("config.json", '{"model": ', "is damaged"),
    ],
)
def test_a_directory_of_something_else_is_refused_unharmed(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=message):
        claim_workdir(tmp_path, CFG)
    assert snapshot(tmp_path) == before


def test_a_file_is_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(ValueError, match="is a file"):
        claim_workdir(file, CFG)
