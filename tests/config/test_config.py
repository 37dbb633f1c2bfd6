"""The typed configuration: parsing, derived values, and messages that state facts.

Every message must name the setting's path, its value, the rule and a fix.
"""

import dataclasses

import pytest
from support.tiny import TINY, train_config

from mor_jax.config import ModelConfig, RouterConfig, TrainConfig
from mor_jax.config.parsing import check, fail, parse

EXPERT = {
    "sharing": "middle_cycle",
    "num_recursions": 3,
    "num_layers": 8,
    "router": {"kind": "expert"},
}
TOKEN_ROUTER = {"kind": "token", "activation": "softmax"}


def nested(path: str, value: object) -> dict:
    """{"a": {"b": value}} of "a.b"."""
    for name in reversed(path.split(".")):
        value = {name: value}
    return value


def merge(base: dict, changes: dict) -> dict:
    out = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = merge(out[key], value) if both else value
    return out


# (settings, path in the message, value in the message, words of the rule, words of the fix)
WRONG = [
    # Parsing: names, types, choices.
    (nested("optim.lrr", 1.0), "optim.lrr", "1.0", "unknown setting", "optim.lr?"),
    (nested("model.router.alhpa", 1), "model.router.alhpa", "1", "unknown", "model.router.alpha?"),
    (nested("step", 3), "step", "3", "unknown setting", "steps"),
    (nested("model.sharing", "cylce"), "model.sharing", "'cylce'", "one of", "'cycle'"),
    (nested("model.dtype", "fp32"), "model.dtype", "'fp32'", "one of", "float32"),
    (nested("steps", 1.5), "steps", "1.5", "int", "float"),
    (nested("steps", True), "steps", "True", "int", "bool"),
    (nested("steps", None), "steps", "None", "int", "NoneType"),
    (nested("optim.lr", "1e-3"), "optim.lr", "'1e-3'", "float", "str"),
    (nested("optim.lr", float("nan")), "optim.lr", "nan", "number", "NaN"),
    (nested("optim", 3), "optim", "3", "group of settings", "members"),
    (nested("data.sources", "stdlib"), "data.sources", "'stdlib'", "list", "(1.0, 0.5)"),
    (nested("data.weights", [1.0, "a"]), "data.weights[1]", "'a'", "float", "str"),
    # The run.
    (nested("steps", 0), "steps", "0", "greater than 0", "positive"),
    (nested("seq_len", 1), "seq_len", "1", "between 2 and", "model.max_seq_len"),
    (nested("seq_len", 4096), "seq_len", "4096", "model.max_seq_len=2048", "Lower seq_len"),
    (nested("grad_accum_steps", 3), "grad_accum_steps", "3", "divide batch_size=8", "1 or 2"),
    (nested("loss_chunk_size", 0), "loss_chunk_size", "0", "greater than 0", "positive"),
    (nested("seed", -1), "seed", "-1", "negative", "0"),
    # The model.
    (nested("model.hidden_size", 0), "model.hidden_size", "0", "greater than 0", "positive"),
    (nested("model.num_kv_heads", 3), "model.num_kv_heads", "3", "divide num_heads=8", "Try 2"),
    (nested("model.head_dim", 33), "model.head_dim", "33", "even", "64"),
    (
        nested("model.num_recursions", 2),
        "model.num_recursions",
        "2",
        "sharing='none'",
        "middle_cycle",
    ),
    (nested("model.router.kind", "expert"), "model.router.kind", "'expert'", "shared", "sharing="),
    (nested("model.kv_mode", "shared"), "model.kv_mode", "'shared'", "shared block", "'recursion'"),
    (
        {"model": merge(EXPERT, {"num_layers": 9})},
        "model.num_layers",
        "9",
        "2 + a multiple of 3",
        "8 and 11",
    ),
    (
        {"model": {"sharing": "cycle", "num_recursions": 3, "num_layers": 8}},
        "model.num_layers",
        "8",
        "0 + a multiple of 3",
        "6 and 9",
    ),
    (
        {"model": merge(EXPERT, {"sharing": "middle_sequence"})},
        "model.sharing",
        "'middle_sequence'",
        "whole block",
        "'middle_cycle'",
    ),
    (
        {"model": merge(EXPERT, {"kv_mode": "shared_update", "router": {"kind": "none"}})},
        "model.kv_mode",
        "'shared_update'",
        "nothing is shared",
        "'shared'",
    ),
    # The router.
    *(
        ({"model": merge(EXPERT, {"router": {key: value}})}, f"model.router.{key}{at}", *words)
        for key, value, at, *words in [
            ("activation", "softmax", "", "'softmax'", "expert-choice", "'sigmoid'"),
            ("alpha", 0.0, "", "0.0", "greater than 0", "positive"),
            ("temperature", -1.0, "", "-1.0", "greater than 0", "positive"),
            ("aux_loss_coeff", -0.1, "", "-0.1", "negative", "0"),
            ("capacity", (1.0, 0.5), "", "(1.0, 0.5)", "per recursion (3)", "0.667, 0.333"),
            ("capacity", (1.5, 1.0, 0.5), "[0]", "1.5", "(0, 1]", "0.5"),
            ("capacity", (1.0, 0.0, 0.0), "[1]", "0.0", "(0, 1]", "0.5"),
            ("capacity", (0.5, 1.0, 0.2), "", "(0.5, 1.0", "increase", "(1.0, 0.5, 0.2)"),
        ]
    ),
    (
        {"model": merge(EXPERT, {"router": {"kind": "token", "activation": "tanh"}})},
        "model.router.activation",
        "'tanh'",
        "token-choice",
        "'softmax'",
    ),
    (
        {"model": merge(EXPERT, {"router": {**TOKEN_ROUTER, "capacity_factor": 0.0}})},
        "model.router.capacity_factor",
        "0.0",
        "greater than 0",
        "positive",
    ),
    # Optimiser, data, evaluation, checkpoints, log, mesh.
    (
        nested("model.rope_scaling", {"rope_type": "linear", "factor": 0.5}),
        "model.rope_scaling.factor",
        "0.5",
        "at least 1",
        "8.0",
    ),
    (
        nested("model.rope_scaling", {"rope_type": "llama3", "low_freq_factor": 4.0}),
        "model.rope_scaling.high_freq_factor",
        "4.0",
        "greater than low_freq_factor=4.0",
        "4.0",
    ),
    (nested("optim.lr", 0.0), "optim.lr", "0.0", "greater than 0", "positive"),
    (nested("optim.b2", 1.0), "optim.b2", "1.0", "[0, 1)", "0.9"),
    (nested("steps", 200), "optim.warmup_steps", "100", "(300) must fit", "decay_steps=40"),
    (nested("data.sources", ()), "data.sources", "()", "empty", "stdlib"),
    (nested("data.weights", (1.0, 1.0)), "data.weights", "(1.0, 1.0)", "per source (1)", "None"),
    (
        nested("data.validation_fraction", 0.9),
        "data.validation_fraction",
        "0.9",
        "(0, 0.5]",
        "0.01",
    ),
    (nested("data.num_workers", -1), "data.num_workers", "-1", "negative", "0"),
    (nested("eval.interval", 0), "eval.interval", "0", "greater than 0", "positive"),
    (nested("checkpoint.keep_period", 0), "checkpoint.keep_period", "0", "greater", "positive"),
    (
        nested("checkpoint.max_to_keep", 0),
        "checkpoint.max_to_keep",
        "0",
        "greater than 0",
        "positive",
    ),
    (nested("log.interval", 0), "log.interval", "0", "greater than 0", "positive"),
    (nested("mesh.fsdp", None), "mesh.fsdp", "None", "at most one", "1"),
    (nested("mesh.tensor", 0), "mesh.tensor", "0", "positive", "1"),
]


@pytest.mark.parametrize(
    ("values", "path", "value", "rule", "fix"), WRONG, ids=[f"{w[1]}={w[2]}" for w in WRONG]
)
def test_message_names_path_value_rule_and_fix(values, path, value, rule, fix):
    with pytest.raises(ValueError) as error:
        TrainConfig.from_dict(values)
    message = str(error.value)
    # The root's own settings are reported with or without the prefix "config.".
    start = f"{path}={value}"
    assert message.removeprefix("config.").startswith(start), message
    rest = message.split(": ", 1)[1]
    assert rule in rest, message
    assert fix in rest[rest.index(rule) :], message


def test_every_router_name_that_is_wrong_lists_the_right_ones():
    with pytest.raises(ValueError) as error:
        TrainConfig.from_dict(nested("model.router.capacities_", 0.5))
    for field in dataclasses.fields(RouterConfig):
        assert field.name in str(error.value)


def test_defaults_are_valid_and_survive_a_round_trip():
    cfg = TrainConfig.from_dict({})
    assert cfg == TrainConfig()
    assert TrainConfig.from_dict(cfg.to_dict()) == cfg


@pytest.mark.parametrize("name", TINY)
def test_tiny_configs_are_valid_and_survive_a_round_trip(name):
    cfg = train_config(name)
    assert TrainConfig.from_dict(cfg.to_dict()) == cfg


def test_parsing_turns_lists_into_tuples_and_whole_numbers_into_floats():
    cfg = TrainConfig.from_dict(
        {"model": merge(EXPERT, {"router": {"capacity": [1, 0.5, 0.25]}}), "optim": {"lr": 1}}
    )
    assert cfg.model.router.capacity == (1.0, 0.5, 0.25)
    assert isinstance(cfg.model.router.capacity[0], float)
    assert isinstance(cfg.optim.lr, float)


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().steps = 3


@pytest.mark.parametrize(
    ("name", "shared", "unique"),
    [
        ("plain", 4, 4),
        ("cycle", 2, 2),
        ("sequence", 2, 2),
        ("middle_cycle", 2, 4),
        ("expert", 2, 4),
        ("expert_cycle", 2, 2),
    ],
)
def test_stored_layers(name, shared, unique):
    assert (TINY[name].shared_layers, TINY[name].unique_layers) == (shared, unique)


def test_shares_of_tokens_kept():
    assert RouterConfig(kind="expert").capacities(4) == (1.0, 0.75, 0.5, 0.25)
    assert RouterConfig(kind="expert", capacity=(1.0, 0.2)).capacities(2) == (1.0, 0.2)
    assert RouterConfig(kind="token").capacities(3) == (1.0, 1.0, 1.0)


def test_unused_router_settings_are_not_checked():
    unused = RouterConfig(kind="none", alpha=-1.0)
    ModelConfig(router=unused).validate()
    routed = dataclasses.replace(unused, kind="expert")
    with pytest.raises(ValueError, match=r"router\.alpha=-1\.0"):
        ModelConfig(num_layers=6, num_recursions=3, sharing="cycle", router=routed).validate()


def test_fail_and_check_state_path_value_rule_and_fix():
    expected = r"^a\.b=2: must be 1\. Try 1$"
    with pytest.raises(ValueError, match=expected):
        fail("a.b", 2, "must be 1", "Try 1")
    with pytest.raises(ValueError, match=expected):
        check(False, "a.b", 2, "must be 1", "Try 1")
    check(True, "a.b", 1, "must be 1", "Try 1")


def test_parse_reports_the_path_that_it_was_given():
    with pytest.raises(ValueError, match=r"^inner\.alpha='x'"):
        parse(RouterConfig, {"alpha": "x"}, "inner.")
