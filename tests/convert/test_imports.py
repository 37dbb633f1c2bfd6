"""Imports make directories of runs, whole or not at all."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from support.run_directories import model, trained

from configs import from_workdir
from mor_jax.checkpoint import pretrained
from mor_jax.checkpoint.lazy_arrays import flatten
from mor_jax.config import TrainConfig
from mor_jax.convert import imports
from mor_jax.convert.exports import ExportOptions, export
from mor_jax.convert.imports import ImportOptions, import_run
from mor_jax.convert.run_source import open_run
from mor_jax.data import load_tokenizer


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """An export of a plain model, and its parameters."""
    folder = tmp_path_factory.mktemp("plain")
    params = trained(folder / "run", "plain")
    return export(open_run(folder / "run"), "llama", ExportOptions(output=folder / "out")), params


def test_an_import_is_a_run_with_the_weights_and_the_tokenizer(plain, tmp_path):
    done, params = plain
    made = import_run("hf", str(done.output), ImportOptions(workdir=tmp_path / "run"))
    assert made.stored == done.stored and made.cfg.model.hidden_size == model("plain").hidden_size
    run = open_run(tmp_path / "run")
    assert run.step == 0 and run.source["from"] == f"{done.output} (hf)"
    for path, value in flatten(params):
        np.testing.assert_array_equal(run.params.read(path), value)
    text = "naïve\n"
    assert run.tokenizer.encode(text).tolist() == load_tokenizer("bytes").encode(text).tolist()
    cfg = TrainConfig.from_dict(from_workdir.get_config(str(tmp_path / "run")).to_dict())
    assert cfg == made.cfg == run.cfg


def test_what_is_there_stays_unless_it_may_be_replaced(plain, tmp_path):
    done, _ = plain
    options = ImportOptions(workdir=tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("")
    # --overwrite would be refused there, so nobody is told to give it.
    with pytest.raises(ValueError, match=r"not empty\. Choose another directory$"):
        import_run("hf", str(done.output), options)
    options = dataclasses.replace(options, replace=True)
    with pytest.raises(ValueError, match=r"^workdir=.*has no conversion\.json"):
        import_run("hf", str(done.output), options)
    (tmp_path / "run" / "config.json").unlink()
    for _ in range(2):
        import_run("hf", str(done.output), options)
    assert (tmp_path / "run" / "config.json").read_text() and pretrained.present(tmp_path / "run")
    (tmp_path / "run" / "notes.md").write_text("mine")
    with pytest.raises(ValueError, match=r"notes\.md \(added\)"):
        import_run("hf", str(done.output), options)
    assert (tmp_path / "run" / "notes.md").read_text() == "mine"
    with pytest.raises(ValueError, match="which is a source"):
        import_run("hf", str(done.output), dataclasses.replace(options, workdir=done.output))


def test_a_failure_in_the_middle_leaves_nothing(plain, tmp_path, monkeypatch):
    def full(path, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(imports.Path, "write_bytes", full)
    with pytest.raises(ValueError, match=r"writing failed.*No space left"):
        import_run("hf", str(plain[0].output), ImportOptions(workdir=tmp_path / "run"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tokenizer", [None, "bytes"])
def test_weights_without_a_tokenizer(plain, tmp_path, tokenizer):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(plain[0].output / name, bare)
    options = ImportOptions(workdir=tmp_path / "run", tokenizer=tokenizer)
    made = import_run("hf", str(bare), options)
    assert any("no tokenizer" in note for note in made.notes) == (tokenizer is None)
    run = open_run(tmp_path / "run")
    assert (run.tokenizer is None) == (tokenizer is None)
    files = export(run, "hf", ExportOptions(output=tmp_path / "out")).files
    assert ("tokenizer.json" in files) == (tokenizer is not None)
    assert f"from {bare} (hf), not trained further" in (tmp_path / "out/README.md").read_text()


def test_a_run_that_was_moved_keeps_its_tokenizer(plain, tmp_path):
    import_run("hf", str(plain[0].output), ImportOptions(workdir=tmp_path / "run"))
    settings = tmp_path / "run" / "tokenizer" / "generation_config.json"
    settings.write_text('{"temperature": 0.5}')
    (tmp_path / "run").rename(tmp_path / "moved")
    done = export(open_run(tmp_path / "moved"), "hf", ExportOptions(output=tmp_path / "out"))
    assert "tokenizer.json" in done.files
    settings = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert settings["temperature"] == 0.5 and settings["eos_token_id"] == 0
    shutil.rmtree(tmp_path / "moved" / "tokenizer")
    with pytest.raises(ValueError, match=r"does not exist any more.*Restore it"):
        open_run(tmp_path / "moved")


def test_a_tokenizer_that_does_not_fit(plain, tmp_path):
    other = tmp_path / "tokenizer"
    other.mkdir()
    shutil.copy(plain[0].output / "tokenizer_config.json", other)
    contents = json.loads((plain[0].output / "tokenizer.json").read_text())
    contents["model"]["vocab"]["extra"] = 300
    (other / "tokenizer.json").write_text(json.dumps(contents))
    options = ImportOptions(workdir=tmp_path / "run", tokenizer=str(other))
    with pytest.raises(ValueError, match=r"vocab_size=256.*at least 301"):
        import_run("hf", str(plain[0].output), options)
    assert not (tmp_path / "run").exists()


def test_upcycling_on_the_way_in(plain, tmp_path):
    wish = "recursions=2,sharing=middle_cycle,init=lower,routing=expert"
    options = ImportOptions(workdir=tmp_path / "run", upcycle=wish)
    made = import_run("hf", str(plain[0].output), options)
    assert made.cfg.model.router.kind == "expert" and made.cfg.model.num_layers == 4
    assert any("new expert-choice routers" in note for note in made.notes)
    run = open_run(tmp_path / "run")
    gate = plain[1]["layers"]["mlp"]["gate"]
    np.testing.assert_array_equal(run.params.read("shared.mlp.gate"), gate[1:2])
    options = dataclasses.replace(options, workdir=tmp_path / "no", upcycle="recursions=7")
    with pytest.raises(ValueError, match="layers"):
        import_run("hf", str(plain[0].output), options)
    assert not (tmp_path / "no").exists()


def test_a_configuration_of_the_reference_belongs_to_its_checkpoints(plain, tmp_path):
    options = ImportOptions(workdir=tmp_path / "run", config="some.yaml")
    with pytest.raises(ValueError, match=r"reference_config='some\.yaml'"):
        import_run("hf", str(plain[0].output), options)
    bare = tmp_path / "bare"
    bare.mkdir()
    with pytest.raises(ValueError, match="0 YAML files"):
        import_run("reference", str(bare), ImportOptions(workdir=tmp_path / "run"))
