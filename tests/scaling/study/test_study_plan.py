"""Plans: what runs a study has, what they cost, what is refused; the manifest that holds them."""

import dataclasses
import json

import pytest
from support.small_study import CONFIGS, SMALL

from configs import from_study
from mor_jax.config import TrainConfig
from mor_jax.models.flops import flops
from mor_jax.scaling.study.manifest import FILE, read, write
from mor_jax.scaling.study.plan import Rules, make_plan


def plan(**changes):
    return make_plan(dataclasses.replace(SMALL, **changes), CONFIGS)


def test_every_budget_is_spent_and_cut_from_one_schedule():
    manifest = plan()
    assert len(manifest.runs) == 3 * 3 * 2
    for run in manifest.runs:
        cfg = manifest.config(run)
        assert run.flops == pytest.approx(run.budget, rel=2e-3)
        assert run.flops == flops(cfg.model, 256).training() * cfg.steps * 4 * 256
        assert cfg.optim.lr == pytest.approx(4e-3 * 32 / cfg.model.hidden_size)
        assert cfg.checkpoint.keep_steps == (cfg.steps - cfg.optim.decay_steps,)
        assert cfg.model.num_layers == 8
        if run.source is None:
            assert run.budget == 1e12 and run.source_step == 0
        else:
            source = manifest.config(manifest.run(run.source))
            assert run.source_step in source.checkpoint.keep_steps
            assert run.source_step <= cfg.steps - cfg.optim.decay_steps
            assert source.optim.warmup_steps == cfg.optim.warmup_steps
    hours = sum(run.own_steps * 1024 * run.training_flops_per_token for run in manifest.runs)
    assert sum(run.device_hours for run in manifest.runs) == pytest.approx(hours / 1e10 / 3600)


def test_the_papers_budgets_buy_its_steps():
    paper = dataclasses.replace(
        SMALL,
        architectures=("plain", "mor-2", "mor-4", "mor-3-shared"),
        sizes=("135m", "360m", "730m", "1.7b"),
        budgets=(16.5e18,),
        unit="paper",
        rules=Rules(),
        overrides={},
    )
    steps = {r.architecture: r.steps for r in make_plan(paper, CONFIGS).runs if r.size == "360m"}
    expected = {"plain": 9438, "mor-2": 12619, "mor-4": 14216, "mor-3-shared": 14672}
    assert steps == pytest.approx(expected, rel=3e-4)


def test_noise_adds_seeds_at_one_point_and_drop_leaves_one_out():
    manifest = plan(
        noise="w32@1e12", noise_seeds=3, drop=("w16@4e12",), sizes=("w16", "w32", "w64", "w80")
    )
    seeds = [
        (run.size, run.budget, run.seed) for run in manifest.runs if run.architecture == "plain"
    ]
    assert len(seeds) == len(set(seeds)) == 4 * 2 - 1 + 2
    assert {("w32", 1e12, 1), ("w32", 1e12, 2)} <= set(seeds)
    assert ("w16", 4e12, 0) not in seeds
    assert {manifest.config(run).seed for run in manifest.runs} == {0, 1, 2}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"sizes": ("w16", "w32")}, "needs 3"),
        ({"sizes": ("w48", "w64", "w80")}, "Add smaller sizes"),
        ({"sizes": ("w8", "w16", "w24"), "budgets": (4e12,)}, "Add larger sizes"),
        ({"budgets": (1e9, 1e12)}, "fewer than min_steps=100"),
        ({"architectures": ("plain", "mor-2-both")}, "unknown architecture"),
        ({"architectures": ("mine=here.py",)}, "file here.py does not exist"),
        ({"sizes": ("w16", "w30", "w64")}, "Try w32"),
        ({"sizes": ("w16", "w16", "w64")}, r"repeats \['w16'\]"),
        ({"noise": "w32@2e12"}, "is not a point of the study"),
        ({"drop": ("w32",)}, "is not a point of the study"),
        ({"overrides": {"optim.bee": 1}}, "optim.bee"),
        ({"overrides": {"batch_size": 3, "grad_accum_steps": 2}}, "grad_accum_steps"),
        ({"budgets": ()}, "is empty"),
        ({"overrides": {"steps": 5}}, "config.steps=5: .*--budgets decides it"),
        ({"overrides": {"optim.lr": 0.1}}, "--lr decides it"),
        ({"overrides": {"model.hidden_size": 8}}, "--sizes decides it"),
        ({"overrides": {"batch_size": "four"}}, "wrong type"),
        ({"architectures": (f"mine={CONFIGS / 'common.py'}",)}, "is not a configuration file"),
        ({"noise": "w32@1e12", "noise_seeds": 1}, "noise_seeds=1: must be more"),
        ({"noise": "w32@1e12", "noise_seeds": 10**11}, "noise_seeds=10+: must be at most 1000"),
        ({"seeds": 10**11}, "^seeds=10+: must be in 1 .. 1000"),
        ({"sizes": ("w016", "w32", "w64")}, "Try w16"),
        ({"sizes": ("w16", "w32", "w99999999999")}, "at most 100,000"),
        ({"speed": 0.0}, "speed=0"),
    ],
)
def test_misfits_are_named(changes, told):
    with pytest.raises(ValueError, match=told):
        plan(**changes)


def test_a_study_can_grow_but_not_change(tmp_path):
    study = tmp_path / "small"
    assert write(study, plan())
    assert not write(study, plan())
    assert not write(study, plan(budgets=(1e12, 4e12, 8e12), sizes=("w16", "w32", "w64", "w80")))
    assert len(read(study).runs) == 3 * 4 * 3
    with pytest.raises(ValueError, match=r"another study.*optim\.lr was 0\.008, now 0\.016"):
        write(study, plan(rules=Rules(lr=8e-3, lr_width=32, lr_power=1.0)))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="is not a study directory"):
        write(tmp_path / "other", plan())


def test_an_edited_manifest_is_refused(tmp_path):
    write(tmp_path / "small", plan())
    file = tmp_path / "small" / FILE
    values = json.loads(file.read_text())
    values["runs"][0]["settings"]["optim.lr"] = 1.0
    file.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="was edited"):
        read(tmp_path / "small")
    with pytest.raises(ValueError, match="was edited"):
        from_study.get_config(f"{tmp_path}/small/{values['runs'][0]['name']}")
    file.write_text(file.read_text()[:100])
    with pytest.raises(ValueError, match=r"damaged.*Plan it again"):
        read(tmp_path / "small")
    write(tmp_path / "small", plan())
    assert read(tmp_path / "small") == plan()
    file.unlink()
    (tmp_path / "small" / "results.jsonl").touch()
    assert write(tmp_path / "small", plan())
    with pytest.raises(ValueError, match=r"is not a study directory: it has no manifest\.json"):
        read(tmp_path / "nothing")


def test_training_reads_the_planned_settings(tmp_path):
    study = tmp_path / "small"
    write(study, plan())
    manifest = read(study)
    for run in manifest.runs[::5]:
        values = from_study.get_config(f"{study}/{run.name}").to_dict()
        cfg = TrainConfig.from_dict(values)
        assert cfg == manifest.config(run)
        # Wherever it is made: the plan counted exact capacities.
        assert cfg.model.router.capacity_multiple == (
            None if cfg.model.router.kind == "none" else 1
        )
    for bad, message in (
        (f"{study}/nothing", "has no run"),
        ("nowhere/run", r"manifest\.json does not exist"),
    ):
        with pytest.raises(ValueError, match=message):
            from_study.get_config(bad)
