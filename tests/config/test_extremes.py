"""The extremes of every number among the settings: taken, or refused in one line, at once."""

import jax
import pytest
from support.tiny import train_config
from test_config import EXPERT, TOKEN_ROUTER, merge

from mor_jax.config import TrainConfig
from mor_jax.config.model import ModelConfig
from mor_jax.config.parsing import LARGEST, flatten_settings, with_settings
from mor_jax.distributed import mesh as sharding
from mor_jax.models.params import abstract_params, logical_axes
from mor_jax.training.compiled_step import abstract_state
from mor_jax.training.memory_check import check_memory

EXPERT_RUN = TrainConfig.from_dict({"model": EXPERT}).to_dict()
TOKEN_RUN = TrainConfig.from_dict({"model": merge(EXPERT, {"router": TOKEN_ROUTER})}).to_dict()

WHOLE = (-(2**31), -1, 0, LARGEST, LARGEST + 1, 10**20)
REAL = (-1e308, -1.0, 0.0, 5e-324, 3.3e38, 1e39, float("inf"), float("nan"))

# Settings that are None by default, and lists.
OTHERS = {
    "data.weights": [(value,) for value in REAL],
    "model.router.capacity": [(1.0, 0.5, value) for value in REAL],
    "model.router.capacity_factor": REAL,
    "profile.steps": [(value, value) for value in WHOLE],
    "checkpoint.keep_steps": [(value,) for value in WHOLE],
}


def cases(run, group=""):
    for path, value in flatten_settings(run).items():
        if not path.startswith(group):
            continue
        if isinstance(value, (bool, str)) or path == "data.sources":
            continue
        given = REAL if isinstance(value, float) else WHOLE
        literal = path in ("sharding.all_gather_shared", "log.wandb_project")
        for extreme in () if literal else OTHERS.get(path, given):
            yield path, extreme


def refusal(run, path, value):
    """The words with which a value is refused; None where it is taken."""
    try:
        TrainConfig.from_dict(with_settings(run, {path: value}))
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("run", "group", "settings"),
    [(EXPERT_RUN, "", 60), (TOKEN_RUN, "model.router", 10)],
    ids=["expert", "token"],
)
def test_every_extreme_is_taken_or_refused_in_one_line(run, group, settings):
    made = list(cases(run, group))
    assert len({path for path, _ in made}) >= settings
    for path, value in made:
        told = refusal(run, path, value)
        if told is None:
            for number in value if isinstance(value, tuple) else (value,):
                if path in ("optim.clip_norm", "eval.batches", "eval.batch_size") and number > 0:
                    # No limit, or all that there is.
                    continue
                most = 2**32 if path.endswith("seed") else LARGEST
                assert abs(number) <= (3.4e38 if isinstance(number, float) else most), path
        else:
            # Some are told by the setting that they do not fit to.
            assert "\n" not in told and path.rpartition(".")[2] in told, (path, value, told)
            assert ". " in told and (":" in told), told


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("steps", 99999999999, "steps=99999999999: must be at most 2147483647, 32 bits"),
        ("steps", 2147483649, "steps=2147483649: must be at most 2147483647, 32 bits"),
        ("batch_size", 99999999999, "batch_size=99999999999: must be at most 2147483647"),
        ("seed", 99999999999999999999, "seed=9+: must be at most 4294967295, 32 bits, unsigned"),
        # Taken for the seed 0 by the generator of random numbers.
        ("seed", 2**32, "seed=4294967296: must be at most 4294967295"),
        ("data.seed", 2**32, "data.seed=4294967296: must be at most 4294967295"),
        (
            "data.num_workers",
            10**6,
            "data.num_workers=1000000: must be at most 1024: each is a process",
        ),
        ("data.prefetch", 10**6, "data.prefetch=1000000: must be at most 65536: each prefetched"),
        ("optim.lr", 1e-45, "optim.lr=1e-45: must have a magnitude between 1.2e-38 and 3.4e.38"),
        ("optim.eps", float("inf"), "optim.eps=inf: must have a magnitude between"),
        ("optim.clip_norm", float("-inf"), "optim.clip_norm=-inf: must have a magnitude between"),
        ("checkpoint.keep_steps", (0,), r"checkpoint.keep_steps\[0\]=0: must be at least 1"),
    ],
)
def test_messages_name_value_rule_and_fix(path, value, message):
    run = with_settings(
        EXPERT_RUN, {"steps": 200, "optim.warmup_steps": 20, "optim.decay_steps": 60}
    )
    told = refusal(run, path, value)
    with pytest.raises(ValueError, match=message):
        raise ValueError(told)
    assert told.count(". ") >= 1 and "\n" not in told


def test_a_checkpoint_beyond_the_last_step_is_refused_where_a_run_starts():
    cfg = TrainConfig.from_dict(with_settings(EXPERT_RUN, {"checkpoint.keep_steps": (50, 1001)}))
    with pytest.raises(
        ValueError, match=r"^checkpoint.keep_steps\[1\]=1001: must be a step of .*1000\."
    ):
        cfg.validate_start()
    TrainConfig.from_dict(
        with_settings(EXPERT_RUN, {"checkpoint.keep_steps": (50, 1000)})
    ).validate_start()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("batch_size", LARGEST - 7, r"^batch_size=2147483640: needs [\d,.]+ GB of memory or more"),
        # No more rows are read than there are.
        ("eval.batch_size", LARGEST - 7, None),
        ("eval.batches", 10**20, None),
        ("model.hidden_size", 2**20, r"^model='[\d,]+ parameters': needs .* Use a smaller model"),
        ("model.vocab_size", LARGEST - 7, r"^model='[\d,]+ parameters': needs"),
        ("model.intermediate_size", LARGEST - 7, r"^model='[\d,]+ parameters': needs"),
        ("model.num_layers", 2**30, r"^model='[\d,]+ parameters': needs"),
        ("steps", LARGEST, None),
    ],
)
def test_what_cannot_fit_is_refused_before_it_is_compiled(path, value, message):
    run = with_settings(train_config("plain").to_dict(), {path: value})
    cfg = TrainConfig.from_dict(run)
    mesh = sharding.make_mesh(cfg.mesh)
    shapes = abstract_params(cfg.model)
    placement = sharding.param_shardings(mesh, logical_axes(cfg.model), shapes)
    state = abstract_state(cfg, mesh, placement)
    if message is None:
        check_memory(cfg, mesh, state, free=2**30)
        return
    with pytest.raises(ValueError, match=message) as error:
        check_memory(cfg, mesh, state, free=64 * 2**30)
    assert "\n" not in str(error.value)


def test_a_state_that_is_cut_is_counted_in_its_parts():
    # On accelerators every device has memory of its own; here all share the host's.
    cfg = TrainConfig(model=ModelConfig(hidden_size=512, num_layers=2, num_heads=8, num_kv_heads=8))
    mesh = sharding.make_mesh(cfg.mesh, jax.devices()[:1])
    placement = sharding.param_shardings(mesh, logical_axes(cfg.model), abstract_params(cfg.model))
    state = abstract_state(cfg, mesh, placement)
    with pytest.raises(ValueError, match="parameters"):
        check_memory(cfg, mesh, state, free=10**6)
    check_memory(cfg, mesh, state, free=10**10)
