"""Parity with recorded cases: they pass, and what is wrong or unsupported fails and says why."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from mor_jax.convert.parity.compare import Report, add_tensors, by_magnitude, of_loss, of_selection
from mor_jax.convert.parity.run import main, run_all, run_file

CASES = Path(__file__).parents[2] / "goldens" / "parity"
NAMES = sorted(path.stem for path in CASES.glob("*.json"))
SMALL = "vanilla_untied"


@pytest.mark.parametrize("name", NAMES)
def test_recorded_case_passes(name):
    report = run_file(CASES / f"{name}.json", "auto")
    assert report.passed, report.line()


def test_groups_that_a_case_reports():
    report = run_file(CASES / "mot_mc_nr3_lossfree.json", "auto")
    assert report.passed, report.line()
    assert report.worst.keys() == {"outputs", "selections", "losses", "gradients"}


def copy_case(folder, name=SMALL, spec=None, **arrays):
    """The recorded case with changed entries of its JSON and NPZ; None removes an array."""
    with np.load(CASES / f"{name}.npz") as archive:
        values = dict(archive) | arrays
    np.savez(folder / f"{name}.npz", **{k: v for k, v in values.items() if v is not None})
    text = json.loads((CASES / f"{name}.json").read_text()) | (spec or {})
    (folder / f"{name}.json").write_text(json.dumps(text))
    return folder / f"{name}.json"


def arrays_of(name=SMALL):
    with np.load(CASES / f"{name}.npz") as archive:
        return dict(archive)


def test_command_counts_and_exits_with_failure_on_a_corrupted_case(tmp_path, capsys):
    shutil.copy(CASES / "init_strategies.json", tmp_path)
    params = arrays_of()["params_flat"]
    params[-1] += 1e-3
    copy_case(tmp_path, params_flat=params)
    assert main(["--cases", str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("ok   init_strategies")
    assert lines[1].startswith("FAIL vanilla_untied") and "outputs" in lines[1]
    assert lines[-1] == "1 passed, 1 failed"


def test_command_succeeds_when_all_that_was_asked_for_pass(tmp_path, capsys):
    copy_case(tmp_path)
    (tmp_path / "broken.json").write_text("{}")
    options = ["--attention", "xla", "--only", "van*"]
    assert main(["--cases", str(tmp_path), *options]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "1 passed, 0 failed"


@pytest.mark.parametrize(
    ("key", "group"),
    [
        ("eval.layer1.out", "outputs"),
        ("eval.loss_mean", "losses"),
        ("train.total_loss", "losses"),
        ("grads_flat", "gradients"),
    ],
)
def test_small_deviations_are_noticed(tmp_path, key, group):
    value = arrays_of()[key]
    report = run_file(copy_case(tmp_path, **{key: value * np.float32(1.001)}), "auto")
    assert [line.split()[0] for line in report.failures] == [group], report.line()


def test_one_other_selected_token_is_noticed(tmp_path):
    name, key = "mot_cyc_nr2_shim", "eval.layer0.top_expert_indices"
    value = arrays_of(name)[key]
    value[1, 3] = 1 - value[1, 3]
    report = run_file(copy_case(tmp_path, name, **{key: value}), "auto")
    assert report.failures == [f"selections 1.0e+00 > 0 at {key}"]


def test_trajectory_with_another_weight_decay_is_noticed(tmp_path):
    name = "trainer_mot_lossfree"
    hp = json.loads((CASES / f"{name}.json").read_text())["hp"]
    report = run_file(copy_case(tmp_path, name, {"hp": hp | {"wd": 0.0}}), "auto")
    assert not report.passed and "trajectory" in report.line()


def test_row_of_the_layer_table_that_differs_is_noticed(tmp_path):
    table = json.loads((CASES / "init_strategies.json").read_text())
    key = "middle_cycle|L7|nr3|average"
    table[key]["src"][2] += 1
    (tmp_path / "init_strategies.json").write_text(json.dumps(table))
    report = run_file(tmp_path / "init_strategies.json", "auto")
    assert f"{key}.src" in report.line() and not report.passed


def test_padding_of_plain_models_is_not_compared(tmp_path):
    arrays = arrays_of()
    mask = arrays["attention_mask"].copy()
    mask[:, 20:] = 0
    for key, value in arrays.items():
        if key.startswith("eval.") and value.ndim == 3:
            value[:, 20:] = 7.0
    for key in ("train.loss", "train.total_loss", "eval.loss_mean", "grads_flat"):
        arrays[key] = None
    report = run_file(copy_case(tmp_path, **arrays | {"attention_mask": mask}), "auto")
    assert report.passed, report.line()


@pytest.mark.parametrize(
    ("name", "spec", "arrays", "reason"),
    [
        ("moe_kv_mc_nr3_upd", {}, {"attention_mask": np.zeros((3, 24))}, "never selects it"),
        (SMALL, {"resolved": {"mor": {"enable": True}}}, {}, "only inside a recursive model"),
        (SMALL, {}, {"eval.entropy": np.zeros(3)}, "eval.entropy=(3,): unknown array"),
        (SMALL, {}, {"params_flat": np.zeros(5)}, "must have the 6480 values"),
        (SMALL, {}, {"params_flat": None}, "needs input_ids, and params_flat"),
        (SMALL, {"hf_config": {"hidden_size": 8}}, {}, "lacks these sizes of the model"),
        ("trainer_mot_lossfree", {"decay_names": []}, {}, "decays other parameters"),
        ("trainer_mot_lossfree", {"steps": 9}, {}, "micro-batch 10 needs 3 sequences"),
        ("trainer_mot_lossfree", {"steps": 0}, {}, "json: steps=0: must be a whole number, at"),
        ("trainer_mot_lossfree", {"batch": 0}, {}, "json: batch=0: must be a whole number, at"),
        ("trainer_mot_lossfree", {"grad_accum": 1.5}, {}, "json: grad_accum=1.5: is required"),
        ("trainer_mot_lossfree", {"hp": {}}, {}, "hp.lr=None: is missing"),
        ("trainer_mot_lossfree", {"hp": 3}, {}, "json: hp=3: is required, as a JSON object"),
        (SMALL, {"training_step": -3}, {}, "json: training_step=-3: must be a whole number"),
        (SMALL, {"training_step": "x"}, {}, "json: training_step='x': must be a whole number"),
        (SMALL, {"param_layout": 3}, {}, "json: param_layout=3: is required, as a JSON array"),
        (SMALL, {}, {"input_ids": np.full((3, 24), 99)}, "(99, 99): tokens must be 0 to"),
        (SMALL, {}, {"input_ids": np.full((3, 24), -1)}, "(-1, -1): tokens must be 0 to"),
        (SMALL, {}, {"input_ids": np.zeros(24, int)}, "must be sequences of whole numbers"),
        (SMALL, {}, {"input_ids": np.zeros((3, 24))}, "must be sequences of whole numbers"),
    ],
)
def test_what_cannot_be_compared_fails_with_a_reason(tmp_path, name, spec, arrays, reason):
    report = run_file(copy_case(tmp_path, name, spec, **arrays), "auto")
    assert not report.passed and reason in report.line() and "\n" not in report.line()


@pytest.mark.parametrize(
    ("text", "reason"),
    [("{", "json:1='...': is not JSON"), ("{\n\n[", "json:3="), ("[]", "must be a JSON object")],
)
def test_a_damaged_description_is_named_with_its_line(tmp_path, text, reason):
    path = copy_case(tmp_path)
    path.write_text(text)
    assert reason in run_file(path, "auto").line()


def test_lone_files_and_empty_folders_are_no_success(tmp_path):
    with pytest.raises(ValueError, match="contains no cases"):
        run_all(tmp_path)
    path = copy_case(tmp_path)
    path.unlink()
    lines = []
    assert not run_all(tmp_path, show=lines.append)[0].passed
    assert "the file is missing" in lines[0]


def test_errors_are_relative_in_the_way_of_each_kind():
    big, off = np.array([100.0, 1e-3]), np.array([100.0, 2e-3])
    assert by_magnitude(off, big) == pytest.approx(1e-5)
    assert by_magnitude(big[:1], big) == np.inf
    assert by_magnitude(np.zeros(2), np.zeros(2)) == 0 and by_magnitude(off, 0 * big) == np.inf
    assert of_loss(np.float32(1e-3), np.float32(0.0)) == pytest.approx(1e-2)
    assert of_selection(np.array([1, 2, 3]), np.array([1, 3, 2])) == 2


def test_not_a_number_never_passes():
    report = Report("case")
    report.add("losses", "loss", float("nan"))
    assert not report.passed and "inf" in report.line()
    assert not Report("empty").passed and "no arrays to compare with" in Report("empty").line()


def test_faint_gradients_are_measured_against_the_largest():
    report = Report("case")
    theirs = {"strong": np.array([1.0]), "faint": np.array([1e-9])}
    add_tensors(report, "gradients", {"strong": np.array([1.0]), "faint": np.zeros(1)}, theirs)
    assert report.worst["gradients"] == (pytest.approx(1e-5), "faint")
