"""Thresholds and biases that give wanted depths, and the command that makes them."""

import dataclasses
import importlib
import json

import jax.numpy as jnp
import numpy as np
import pytest
from support.seeded import random_params
from support.served_runs import of_bytes, with_router, write_run
from support.tiny import TINY, batch, train_config

from mor_jax.calibration.calibrator import CalibrationText, Calibrator
from mor_jax.inference import calibration_targets

EXPERT = TINY["expert"]


@pytest.mark.parametrize("depth", [1.0, 1.3, 2.0, 2.6, 3.0])
def test_a_mean_depth_scales_the_trained_shares(depth):
    for cfg in (EXPERT, TINY["token"]):
        shares = calibration_targets.wanted_shares(cfg, depth=depth)
        assert sum(shares) == pytest.approx(depth) and shares[0] == 1
        if max(shares[1:]) < 1 and depth > 1:
            assert shares[1] / shares[2] == pytest.approx(2)
    assert calibration_targets.wanted_shares(EXPERT) == (1.0, 2 / 3, 1 / 3)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"depth": 0.9}, r"mean_depth=0\.9: must be in 1 \.\. 3"),
        ({"depth": float("nan")}, r"mean_depth=nan: must be in 1 \.\. 3"),
        ({"depth": 2.0, "shares": (1.0, 1.0, 1.0)}, "shares are given already"),
        ({"shares": (1.0, 0.5)}, "needs one share for each of the 3 recursions.*Try 1,0.667,0.333"),
        (
            {"shares": (0.9, 0.5, 0.2)},
            r"shares\[0\]=0\.9: must be 1: this recursion was",
        ),
        ({"shares": (1.0, 1.5, 0.2)}, r"shares\[1\]=1\.5: must be in \[0, 1\]"),
        ({"shares": (1.0, 0.2, 0.5)}, "must not increase"),
    ],
)
def test_shares_out_of_reach_are_refused(asked, told):
    with pytest.raises(ValueError, match=told):
        calibration_targets.wanted_shares(EXPERT, **asked)


def test_a_threshold_lets_exactly_so_many_pass():
    logits = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    for count in (1, 2, 499, 999):
        at = np.float32(calibration_targets.threshold(logits, count))
        assert np.sum(logits >= at) == count
    assert np.sum(logits >= calibration_targets.threshold(logits, 1000)) == 1000
    assert np.sum(logits >= calibration_targets.threshold(logits, 0)) == 0
    # Of equal logits all pass, and neighbours among the numbers are told apart.
    assert calibration_targets.threshold(np.array([2.0, 1.0, 1.0, 0.0]), 2) == 1.0
    one = np.float32(1)
    assert (
        calibration_targets.threshold(np.array([np.nextafter(one, 2, dtype=one.dtype), one]), 1) > 1
    )


def test_biases_move_the_best_depth_to_the_wanted_shares():
    rng = np.random.default_rng(0)
    weights = rng.dirichlet((3.0, 1.0, 0.3), size=2000)
    for wanted in ((1.0, 0.5, 0.25), (1.0, 1.0, 0.1), (1.0, 0.9, 0.9), (1.0, 0.0, 0.0)):
        choice = np.argmax(weights + calibration_targets.depth_bias(weights, wanted), axis=1)
        found = [np.mean(choice >= r) for r in range(3)]
        np.testing.assert_allclose(found, wanted, atol=0.002)


@pytest.mark.parametrize("name", ["expert_kv", "expert_aux_router", "token_loss_free"])
def test_the_shares_are_those_wanted_on_the_text_itself(name):
    cfg = train_config(name)
    rows = batch(cfg.model, 8, 64)
    # Two documents and padding at the end of each row.
    segments = jnp.broadcast_to(jnp.repeat(jnp.array([1, 2, 0]), jnp.array([30, 20, 14])), (8, 64))
    rows = dataclasses.replace(rows, segments=segments)
    cfg = dataclasses.replace(cfg, seq_len=64)
    calibrator = Calibrator(
        cfg, random_params(cfg.model, 3), CalibrationText("it", (rows,), (rows,))
    )
    for wanted in ((1.0, 0.8, 0.3), (1.0, 1.0, 1.0), (1.0, 0.5, 0.0)):
        point = calibrator.calibrated("wanted", wanted)
        np.testing.assert_allclose(point.shares, wanted, atol=0.0051)
        assert point.depth == pytest.approx(sum(point.shares))
    assert calibrator.calibrated("all", (1.0, 1.0, 1.0)).work == pytest.approx(1.0)
    trained = calibrator.calibrated("trained", (1.0, 2 / 3, 1 / 3))
    assert trained.work < 1 and np.isfinite(trained.loss)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A routed run with a little text to calibrate on."""
    folder = tmp_path_factory.mktemp("calibration")
    for i in range(60):
        (folder / f"{i}.txt").write_text(f"Text {i}: " + " ".join(str(i * k) for k in range(40)))
    write_run(folder / "run", of_bytes("expert_cycle"), sources=(f"text:{folder}/*.txt",))
    return folder / "run"


@pytest.fixture
def command(capsys):
    """Runs one of the commands: exit status, its output, its errors."""

    def run(name, *arguments):
        status = importlib.import_module(f"mor_jax.cli.{name}").main(list(arguments))
        told = capsys.readouterr()
        return status, told.out, told.err

    return run


def test_the_command_writes_what_evaluation_then_finds(run, command):
    here = f"--workdir={run}"
    shares = "--shares=1,0.5,0.25"
    status, out, _ = command("calibrate", here, "--name=fast", shares, "--curve", "--points=2")
    assert status == 0
    names = [line[:16].strip() for line in out.splitlines()[4:10]]
    marked = {"this calibration", "trained shares", "uncalibrated", "training rule"}
    assert set(names) == {"all recursions", "depth 1.00"} | marked
    folder = run / "calibrations"
    made = json.loads((folder / "fast.json").read_text())
    assert made["wanted"] == [1.0, 0.5, 0.25] and made["step"] == 0
    np.testing.assert_allclose(made["shares"], made["wanted"], atol=0.1)
    points = [json.loads(line) for line in (folder / "fast.curve.jsonl").read_text().splitlines()]
    assert [point["depth"] for point in points] == sorted(p["depth"] for p in points)[::-1]
    assert {point["name"] for point in points} == set(names)
    assert (folder / "fast.curve.png").read_bytes().startswith(b"\x89PNG")
    _, out, _ = command("evaluate", here, "--calibration=fast", "--json", "--batch_size=8")
    found = json.loads(out)
    assert found["depth_causal"] == pytest.approx(1.75, abs=0.1)
    assert (found["calibration"], found["recursions"]) == ("fast", 3)
    _, out, _ = command("evaluate", here, "--recursions=2", "--batches=1", "--batch_size=8")
    assert out.startswith(f"{run}, imported weights of a/model, 2 recursions instead of 3\n")
    # Without a curve, that of an older one of the name goes.
    _, out, _ = command("calibrate", here, "--name=fast", "--mean_depth=1.5", "--json")
    assert sum(json.loads(out)["wanted"]) == pytest.approx(1.5)
    assert [path.name for path in folder.iterdir()] == ["fast.json"]


def test_what_cannot_be_calibrated_leaves_nothing_behind(run, command, tmp_path):
    def refused(workdir, *arguments):
        status, _, error = command("calibrate", f"--workdir={workdir}", "--name=no", *arguments)
        assert status != 0 and not (workdir / "calibrations" / "no.json").exists()
        return error

    assert refused(run, "--shares=1,x") == (
        "error: --shares='1,x': must be numbers like 1,0.5,0.25. Try --mean_depth=1.5\n"
    )
    assert "shares=(1.0, 0.5): needs one share" in refused(run, "--shares=1,0.5")
    for points in (1, 0, -1, 1001):
        told = refused(run, "--curve", f"--points={points}")
        assert told.startswith(f"error: --points={points}: a curve needs at least 2 points, and at")
    assert refused(run, "--points=5").startswith("error: --points=5: is of a curve. Add --curve")
    assert refused(run, "--batches=0").startswith("error: --batches=0: must be greater than 0")
    assert refused(run, "--mean_depth=nan").startswith("error: --mean_depth=nan: must be in 1")
    assert "recursions=0: must be at least 1" in refused(run, "--recursions=0")
    (tmp_path / "few.txt").write_text("too short")
    assert "has 10 tokens, but one sequence" in refused(run, f"--source=text:{tmp_path}/few.txt")
    (run / "file").touch()
    wrong = command("calibrate", f"--workdir={run}", f"--name={run}/file/x.json")
    assert wrong[0] != 0 and "cannot be written" in wrong[2]
    (tmp_path / "mine.json").write_text('{"a": 1}')
    for name, why in (("mine.json", "is no calibration"), ("few.txt", "must end with .json")):
        before = (tmp_path / name).read_text()
        wrong = command("calibrate", f"--workdir={run}", f"--name={tmp_path}/{name}")
        assert wrong[0] != 0 and why in wrong[2] and (tmp_path / name).read_text() == before
    (tmp_path / "mine.curve.png").write_text("mine")
    (tmp_path / "mine.json").unlink()
    wrong = command("calibrate", f"--workdir={run}", f"--name={tmp_path}/mine.json")
    assert wrong[0] != 0 and "['mine.curve.png'] would be replaced" in wrong[2]
    assert (tmp_path / "mine.curve.png").read_text() == "mine"
    for name, model in (
        ("plain", of_bytes("plain")),
        ("whole", with_router(of_bytes("expert_cycle"), capacity=(1.0, 1.0, 1.0))),
    ):
        write_run(tmp_path / name, model)
        assert "has nothing to calibrate" in refused(tmp_path / name)
