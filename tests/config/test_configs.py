"""The shipped configurations: keys, choices, overrides from the command line, golden values."""

import ast
import dataclasses
import importlib
import itertools
import json
from pathlib import Path

import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags

from configs import common, mor, recursive, vanilla
from mor_jax.checkpoint.run_dir import check_workdir, claim_workdir
from mor_jax.config import TrainConfig

ROOT = Path(__file__).parents[2]
# These read what lies in a directory.
READERS = ("from_workdir", "from_study")
NAMES = sorted(
    p.stem for p in (ROOT / "configs").glob("[!_]*.py") if p.stem not in ("common", *READERS)
)
REAL_SIZES = [size for size in common.SIZES if size != "debug"]


def get(name: str, arg: str = "") -> ConfigDict:
    return importlib.import_module(f"configs.{name}").get_config(arg)


def typed(cfg: ConfigDict) -> TrainConfig:
    return TrainConfig.from_dict(cfg.to_dict())


def from_flags(*args: str) -> ConfigDict:
    """The configuration as a script with DEFINE_config_file would see it."""
    values = flags.FlagValues()
    argv = ["prog", *args]
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    values(argv)
    return values.config


def leaves(tree: dict, path: str = "") -> list[str]:
    out = []
    for key, value in tree.items():
        deeper = isinstance(value, dict)
        out += leaves(value, f"{path}{key}.") if deeper else [f"{path}{key}"]
    return sorted(out)


@pytest.mark.parametrize("name", NAMES)
def test_keys_are_those_of_the_typed_side(name):
    assert leaves(get(name).to_dict()) == leaves(TrainConfig().to_dict())


@pytest.mark.parametrize("name", NAMES)
def test_resolved_values_match_the_golden_file(name, golden):
    golden(f"configs/{name}.json", typed(get(name)).to_dict())


@pytest.mark.parametrize(
    "arg", ["size=360m", "size=360m,routing=token", "size=7b,recursions=4,kv=shared_update"]
)
def test_resolved_choices_match_the_golden_file(arg, golden):
    name = arg.replace(",", "_").replace("=", "-")
    golden(f"configs/mor_{name}.json", typed(get("mor", arg)).to_dict())


@pytest.mark.parametrize("name", NAMES)
def test_config_is_locked(name):
    cfg = get(name)
    with pytest.raises((AttributeError, KeyError)):
        cfg.model.widht = 3


@pytest.mark.parametrize("size", common.SIZES)
def test_every_size_is_valid_in_every_scheme(size):
    typed(vanilla.get_config(f"size={size}"))
    for nr, sharing in itertools.product(common.CHOICES["recursions"], common.CHOICES["sharing"]):
        cfg = typed(recursive.get_config(f"size={size},recursions={nr},sharing={sharing}"))
        assert (cfg.model.num_recursions, cfg.model.sharing) == (nr, sharing)


@pytest.mark.parametrize("routing", common.CHOICES["routing"])
@pytest.mark.parametrize("kv", common.CHOICES["kv"])
@pytest.mark.parametrize("sharing", ["cycle", "middle_cycle"])
def test_every_routed_variant_is_valid(routing, kv, sharing):
    cfg = typed(mor.get_config(f"routing={routing},kv={kv},sharing={sharing}"))
    assert (cfg.model.router.kind, cfg.model.kv_mode, cfg.model.sharing) == (routing, kv, sharing)


def test_depth_is_the_nearest_below_the_plain_one():
    """The paper's 34 layers at 360m with 4 recursions are the one exception."""
    for size, (scheme, ends) in itertools.product(REAL_SIZES, (("middle", 2), ("all", 0))):
        plain = common.LAYERS[size]["vanilla"]
        for nr, layers in common.LAYERS[size][scheme].items():
            nearest = (plain - ends) // nr * nr + ends
            expected = 34 if (size, scheme, nr) == ("360m", "middle", 4) else nearest
            assert layers == expected, (size, scheme, nr)


@pytest.mark.parametrize("size", REAL_SIZES)
def test_real_sizes_follow_the_papers_recipe(size):
    cfg = typed(mor.get_config(f"size={size}"))
    assert (cfg.batch_size, cfg.seq_len, cfg.model.vocab_size) == (1024, 2048, 49152)
    assert cfg.optim.warmup_steps == pytest.approx(0.05 * cfg.steps, abs=1)
    assert cfg.optim.decay_steps == pytest.approx(0.2 * cfg.steps, abs=1)
    assert cfg.model.num_heads * cfg.model.head_dim == cfg.model.hidden_size


@pytest.mark.parametrize(
    ("arg", "words"),
    [
        ("sizes=360m", ["'sizes'", "size, routing, kv", "Did you mean 'size'"]),
        ("size=360", ["'360'", "135m, 360m", "Did you mean '360m'"]),
        ("recursions=5", ["'5'", "2, 3, 4", "Did you mean '4'"]),
        ("routing", ["'routing'", "expert, token"]),
        ("recursions=2,recursions=3", ["'recursions=3'", "set twice"]),
        ("routing=expert,kv=share", ["kv=share", "Did you mean 'shared'"]),
    ],
)
def test_a_wrong_choice_names_itself_the_allowed_and_the_nearest(arg, words):
    with pytest.raises(ValueError) as error:
        mor.get_config(arg)
    assert all(word in str(error.value) for word in words), error.value


def test_a_config_without_choices_says_so():
    with pytest.raises(ValueError, match="takes none"):
        get("quickstart", "size=135m")


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("optim.lr=1e-3", "optim.lr", 1e-3),
        ("optim.lr=1", "optim.lr", 1.0),
        ("model.router.alpha=0.2", "model.router.alpha", 0.2),
        ("model.router.capacity=(1.0,0.5,0.25)", "model.router.capacity", (1.0, 0.5, 0.25)),
        ("model.router.capacity=1.0,0.5,0.25", "model.router.capacity", (1.0, 0.5, 0.25)),
        ("model.router.capacity_factor=1.5", "model.router.capacity_factor", 1.5),
        ("eval.interval=50", "eval.interval", 50),
        ("eval.interval=None", "eval.interval", None),
        ("checkpoint.keep_period=10", "checkpoint.keep_period", 10),
        ("data.weights=(2,)", "data.weights", (2.0,)),
        ("data.sources=text:corpus/*.txt", "data.sources", ("text:corpus/*.txt",)),
        ("log.wandb_project=mor", "log.wandb_project", "mor"),
        ("log.tensorboard=true", "log.tensorboard", True),
        ("mesh.data=None", "mesh.data", None),
        ("mesh.fsdp=2", "mesh.fsdp", 2),
        ("loss_chunk_size=None", "loss_chunk_size", None),
    ],
)
def test_override_from_the_command_line(override, path, value):
    config = f"--config={ROOT / 'configs/mor.py'}:recursions=3"
    got = typed(from_flags(config, f"--config.{override}"))
    for name in path.split("."):
        got = getattr(got, name)
    assert got == value
    assert type(got) is type(value)


def test_two_sources_with_weights_from_the_command_line():
    cfg = typed(
        from_flags(
            f"--config={ROOT / 'configs/vanilla.py'}",
            "--config.data.sources=('stdlib','text:docs/*.md')",
            "--config.data.weights=(0.75,0.25)",
        )
    )
    assert cfg.data.sources == ("stdlib", "text:docs/*.md")
    assert cfg.data.weights == (0.75, 0.25)


def test_an_unknown_override_names_the_nearest():
    with pytest.raises(AttributeError, match='Did you mean "lr"'):
        from_flags(f"--config={ROOT / 'configs/mor.py'}", "--config.optim.lrr=1")


@pytest.mark.parametrize("name", NAMES)
def test_a_run_is_its_own_configuration(name, tmp_path):
    cfg = typed(get(name))
    router = dataclasses.replace(cfg.model.router, capacity=(1.0,) * cfg.model.num_recursions)
    model = dataclasses.replace(cfg.model, router=router)
    given = dataclasses.replace(cfg, model=model, loss_chunk_size=None, steps=77777)
    claim_workdir(tmp_path, given)
    config = f"--config={ROOT / 'configs/from_workdir.py'}:{tmp_path}"
    assert typed(from_flags(config)) == given
    changes = ("loss_chunk_size=64", "eval.interval=None", "eval.batches=3", "mesh.data=2")
    got = typed(from_flags(config, *(f"--config.{change}" for change in changes)))
    assert (got.loss_chunk_size, got.eval.interval, got.eval.batches, got.mesh.data) == (
        64,
        None,
        3,
        2,
    )
    with pytest.raises(AttributeError, match='Did you mean "lr"'):
        from_flags(config, "--config.optim.lrr=1")


def test_settings_that_an_older_run_did_not_have_keep_their_defaults(tmp_path):
    cfg = typed(get("mor"))
    claim_workdir(tmp_path, cfg)
    file = tmp_path / "config.json"
    settings = json.loads(file.read_text())
    del settings["model"]["rope_scaling"]
    file.write_text(json.dumps(settings))
    assert typed(get("from_workdir", str(tmp_path))) == cfg
    assert check_workdir(tmp_path, cfg) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"config\.json does not exist\. Write --config="),
        ('{"model": ', "is damaged"),
        ('{"architectures": ["LlamaForCausalLM"]}', "is not of a run"),
        ("[1]", "is not of a run"),
    ],
)
def test_a_directory_without_a_run_is_no_configuration(content, message, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        get("from_workdir", str(tmp_path))


def test_a_configuration_from_nowhere_is_refused():
    with pytest.raises(ValueError, match=r"config argument '': config\.json does not exist"):
        get("from_workdir")


def test_configs_import_nothing_but_ml_collections():
    for path in (ROOT / "configs").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module]
            else:
                continue
            allowed = {"ml_collections", "difflib", "json", "pathlib", "types", "typing"}
            if path.stem == "from_study":
                # A study may lie in an object store, and its seal has to be the planner's.
                allowed |= {"etils", "mor_jax"}
            if names in (["mor_jax.configs"], ["mor_jax.configs.common"]):
                continue
            if path.stem == "from_workdir" and names == ["mor_jax.config.old_names"]:
                # An earlier version may have written the directory.
                continue
            others = [n for n in names if not f"{n}.".startswith("mor_jax.configs.")]
            assert {n.split(".")[0] for n in others} <= allowed, (path, names)


def test_a_typed_config_survives_a_round_trip():
    cfg = typed(mor.get_config("routing=token"))
    assert TrainConfig.from_dict(cfg.to_dict()) == cfg
