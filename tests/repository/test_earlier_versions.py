"""What version 0.1.0 wrote still loads; tests/goldens/earlier/README.md says how it was made.

Names of settings, of metrics and of fields were others then. What is expected here are values:
where a name changes, the file in goldens stays and the code below takes the new name.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from configs import from_study, from_workdir
from mor_jax.checkpoint.run_dir import differences, read_config
from mor_jax.cli import convert, evaluate, generate, isoflop, prepare_data
from mor_jax.config.train import TrainConfig
from mor_jax.data.shards.reader import open_shards
from mor_jax.data.tokenizers.load import load_tokenizer
from mor_jax.observability import metrics
from mor_jax.scaling.fit.fit import FitOptions, fit
from mor_jax.scaling.report.report import write_report
from mor_jax.scaling.runs.points import read_points
from mor_jax.scaling.study.manifest import read as read_study
from mor_jax.training.trainer import fit as train

EARLIER = Path(__file__).parent.parent / "goldens" / "earlier"

# Today's name of a metric -> its name then.
TRAINING = {
    "loss": "loss",
    "ce": "ce",
    "logit_z": "logit_z",
    "accuracy": "accuracy",
    "grad_norm": "grad_norm",
    "lr": "lr",
    "depth_share": "depth_share",
    "router_accuracy": "router_accuracy",
    "router_bce": "router_bce",
    "router_z": "router_z",
    "position": "position",
}
EVALUATION = {
    "eval/loss_causal": "eval/loss_causal",
    "eval/loss_topk": "eval/loss_topk",
    "eval/depth_causal": "eval/depth_causal",
    "eval/depth_share_topk": "eval/depth_share_topk",
}
EVALUATED = {name: name for name in ("loss_causal", "loss_topk", "leak", "targets", "bytes")}


@pytest.fixture
def earlier(tmp_path, monkeypatch):
    """A copy of all that is there, and the working directory."""
    shutil.copytree(EARLIER, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config_of(module, argument):
    return TrainConfig.from_dict(module.get_config(argument).to_dict())


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def assert_same(found, then, names):
    for now, old in names.items():
        np.testing.assert_allclose(found[now], then[old], rtol=2e-5, atol=2e-6, err_msg=now)


def assert_same_files(found, then):
    """The files of one folder are, to the byte, those of another."""
    names = sorted(path.name for path in Path(then).iterdir())
    assert sorted(path.name for path in Path(found).iterdir()) == names and names
    for name in names:
        assert (Path(found) / name).read_bytes() == (Path(then) / name).read_bytes(), name


def test_settings_keep_their_values(earlier):
    cfg = read_config("run")
    assert config_of(from_workdir, "run") == cfg
    model, router = cfg.model, cfg.model.router
    assert (cfg.seq_len, cfg.grad_accum_steps, cfg.loss_chunk_size) == (16, 2, 8)
    assert (model.hidden_size, model.num_layers, model.intermediate_size) == (8, 4, 16)
    assert (model.num_heads, model.num_kv_heads, model.head_dim) == (2, 1, 4)
    assert (router.activation, router.causal_routing, cfg.optim.aux_router_lr_ratio) == (
        "tanh",
        "aux_router",
        3.0,
    )
    assert (cfg.data.validation_fraction, cfg.data.document_mask) == (0.3, True)
    assert (cfg.hosts.heartbeat_timeout, cfg.checkpoint.keep_steps) == (31, (4,))


def test_a_run_goes_on_as_it_would_have_then(earlier):
    cfg = config_of(from_workdir, "run")
    without_sample = dataclasses.replace(cfg.eval, completion_tokens=0)
    train(dataclasses.replace(cfg, steps=6, eval=without_sample), "run")
    expected = lines("run_steps_5_6.jsonl")
    found = metrics.read("run/metrics.jsonl")
    # What was logged before stands as it was written.
    assert (
        (earlier / "run/metrics.jsonl")
        .read_text()
        .startswith((EARLIER / "run/metrics.jsonl").read_text())
    )
    found = found[-3:]
    assert [record["step"] for record in found] == [record["step"] for record in expected]
    for record, then in zip(found[:2], expected[:2], strict=True):
        assert_same(record, then, TRAINING)
    assert_same(found[2], expected[2], EVALUATION)


def test_a_run_is_evaluated_and_generates(earlier, capsys):
    assert evaluate.main(["--workdir=run", "--batches=1", "--json"]) == 0
    [then] = lines("run/evaluations.jsonl")
    assert_same(json.loads(capsys.readouterr().out), then["text"], EVALUATED)
    # The same question was answered then, so nothing is left to do.
    assert evaluate.main(["--workdir=run", "--batches=1", "--watch", "--json"]) == 0
    assert capsys.readouterr().out == ""
    assert lines("run/evaluations.jsonl") == [then]
    settings = ["--prompt=Day", "--max_tokens=4", "--ignore_eos", "--seed=1", "--output=answers"]
    assert generate.main(["--workdir=run", "--calibration=fast", *settings]) == 0
    assert len(lines("answers")) == 1


def test_exports_are_written_and_read_as_then(earlier):
    to = ["export", "--to=hf", "--output=again"]
    assert convert.main([*to, "--workdir=run"]) == 0
    weights = Path("export/model.safetensors").read_bytes()
    assert Path("again/model.safetensors").read_bytes() == weights
    assert convert.main([*to, "--workdir=imported", "--overwrite"]) == 0
    assert Path("again/model.safetensors").read_bytes() == weights
    arrays = "initial/arrays"
    for origin, source in (("hf", "export"), ("reference", "reference"), ("hf", "again")):
        target = f"new-{origin}-{source}"
        given = [f"--from={origin}", f"--source={source}", f"--workdir={target}"]
        assert convert.main(["import", *given, "--tokenizer=bytes"]) == 0
        assert_same_files(f"{target}/{arrays}", f"imported/{arrays}")
        assert read_config(target).model.router.activation == "tanh"
    assert read_config("new-hf-export") == read_config("imported")
    # Files of an export that was sent on without its code get it again.
    assert convert.main(["refresh", "--path=export"]) == 0


def test_a_study_is_read_fitted_and_reported(earlier, capsys):
    study = read_study("study")
    for name in ("mor-2-w16-1e12-s0", "plain-w64-4e12-s0"):
        planned = study.config(study.run(name))
        assert planned.data.validation_fraction == 0.02 and planned.batch_size == 4
        assert f"w{planned.model.hidden_size}" == study.run(name).size
        assert config_of(from_study, f"study/{name}") == planned
        assert differences(read_config(f"study/runs/{name}"), planned) == []
    # Results of these two are only in their directories.
    assert isoflop.main(["status", "--study=study"]) == 0
    points = read_points("study")
    names = [field.name for field in dataclasses.fields(points[0])]
    then = {record["run"]: record for record in lines("study_results.jsonl")}
    assert len(points) == len(then) == 18
    for point in points:
        record = [None if name == "seconds" else getattr(point, name) for name in names]
        assert record == list(then[point.run].values())
    fitted = fit(points, FitOptions(resamples=100, law_resamples=0))
    laws = {law.architecture: law for law in fitted.view("causal", "unique").laws}
    for architecture, best in (("plain", 98_800), ("mor-2", 61_900)):
        assert laws[architecture].a == pytest.approx(0.4, abs=5e-4)
        assert laws[architecture].parameters_at == pytest.approx(best, rel=1e-3)
    pages = write_report(fitted, points, study.to_dict(), epath.Path("study/report"))
    assert pages and all(page.exists() for page in pages)
    # The command that planned it finds it planned.
    capsys.readouterr()
    assert isoflop.main(study.reproduce[0].split()[2:]) == 0
    assert "planned before: study" in capsys.readouterr().out


def test_shards_are_read_and_continued(earlier):
    streams = open_shards("shards:shards", load_tokenizer("bytes"))
    # A run that was trained on them notes these hashes.
    assert [(len(stream), stream.fingerprint) for stream in streams.values()] == [
        (1587, "435e21873c7e8c1f3cbd3741e47b97a6"),
        (854, "d5870a2071d59e065a4fb6d335331040"),
    ]
    flags = ["--source=jsonl:text/documents.jsonl", "--validation-fraction=0.3", "--output=shards"]
    before = {path: path.stat().st_mtime_ns for path in Path("shards").glob("*.array_record")}
    assert prepare_data.main(flags) == 0
    assert before == {path: path.stat().st_mtime_ns for path in before}
