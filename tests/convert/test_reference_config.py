"""The reference's options: each is expressed in our configuration, or refused with a reason."""

import dataclasses

import pytest

from mor_jax.config import ModelConfig, RopeScaling, RouterConfig
from mor_jax.convert.export_config import reference_options
from mor_jax.convert.reference_config import fitted_layers, merge_options, model_config

LLAMA = {
    "vocab_size": 37,
    "hidden_size": 16,
    "num_attention_heads": 4,
    "intermediate_size": 20,
    "num_hidden_layers": 8,
}
RECURSION = {"enable": True, "sharing": "middle_cycle", "num_recursion": 3}


def build(blocks=None, hf=None, **changes) -> ModelConfig:
    return model_config(LLAMA | (hf or {}), merge_options(blocks), **changes)


def routed(kind, mor=None, recursive=None, **part) -> ModelConfig:
    mor = {"enable": True, "type": kind, kind: part} | (mor or {})
    return build({"recursive": RECURSION | (recursive or {}), "mor": mor})


def test_silent_configuration_means_plain_llama():
    cfg = build()
    assert (cfg.sharing, cfg.num_recursions, cfg.kv_mode, cfg.router) == (
        "none",
        1,
        "recursion",
        RouterConfig(),
    )
    assert (cfg.head_dim, cfg.num_kv_heads, cfg.rope_theta, cfg.norm_eps) == (4, 4, 10000.0, 1e-6)
    assert cfg.dtype == "float32" and not cfg.tie_embeddings


def test_llama_options_are_read():
    hf = {"head_dim": 6, "num_key_value_heads": 2, "rope_theta": 500, "rms_norm_eps": 1e-5}
    cfg = build(hf=hf | {"tie_word_embeddings": True})
    assert (cfg.head_dim, cfg.num_kv_heads, cfg.rope_theta, cfg.norm_eps) == (6, 2, 500.0, 1e-5)
    assert cfg.tie_embeddings
    nested = build(hf={"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}})
    assert nested.rope_theta == 7.0


@pytest.mark.parametrize(
    "hf",
    [
        {"hidden_act": "gelu"},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        {"rope_parameters": {"rope_type": "yarn"}},
    ],
)
def test_other_llamas_are_refused_by_name(hf):
    with pytest.raises(ValueError, match=f"hf_config: {next(iter(hf))}"):
        build(hf=hf)


def test_recursive_class_never_ties_but_tensors_decide():
    tied = {"tie_word_embeddings": True}
    assert not build({"recursive": RECURSION}, tied).tie_embeddings
    assert build({"recursive": RECURSION}, tied, tied=True).tie_embeddings
    mor = {"enable": True, "type": "token"}
    assert build({"recursive": RECURSION, "mor": mor}, tied).tie_embeddings


def test_expert_options():
    cfg = routed(
        "expert",
        {"capacity": "1.0,0.5,0.25", "router_type": "wide_mlp", "temp": 2.0, "z_loss": True},
        cap_warmup_step=10,
        router_func=None,
        alpha=0.7,
        sampling="aux_router",
        coeff=0.02,
        gating="additive",
    )
    assert cfg.router == RouterConfig(
        kind="expert",
        arch="mlp",
        activation="none",
        alpha=0.7,
        temperature=2.0,
        gating="additive",
        z_loss_coeff=1e-5,
        capacity=(1.0, 0.5, 0.25),
        capacity_warmup_steps=10,
        capacity_warmup_stages=10,
        causal_routing="aux_router",
        aux_loss_coeff=0.02,
        capacity_multiple=1,
    )


def test_rounded_capacities_are_not_for_the_reference():
    cfg = routed("expert", {})
    assert reference_options(cfg)["mor"]["type"] == "expert"
    rounded = with_multiple(cfg, 128)
    words = r"model\.router\.capacity_multiple=128: .*never rounds up.*--to=hf, or train with 1"
    with pytest.raises(ValueError, match=words):
        reference_options(rounded)
    # Token-choice has no capacities there.
    assert reference_options(with_multiple(routed("token", {}), 128))["mor"]["type"] == "token"


def test_what_the_reference_does_not_have_is_not_left_out():
    scaled = dataclasses.replace(
        routed("expert", {}), rope_scaling=RopeScaling(rope_type="linear", factor=2.0)
    )
    with pytest.raises(ValueError, match=r"model\.rope_scaling\.rope_type='linear': .*Use --to=hf"):
        reference_options(scaled)
    cfg = routed("token", {})
    assert reference_options(cfg)["mor"]["type"] == "token"
    router = dataclasses.replace(cfg.router, capacity_factor=1.5)
    with pytest.raises(ValueError, match=r"model\.router\.capacity_factor=1\.5: .*--to=hf"):
        reference_options(dataclasses.replace(cfg, router=router))


def with_multiple(cfg, multiple):
    router = dataclasses.replace(cfg.router, capacity_multiple=multiple)
    return dataclasses.replace(cfg, router=router)


def test_token_options():
    cfg = routed(
        "token",
        {"z_loss": False, "z_coeff": 0.5},
        recursive={"ln_share": False},
        bal_warmup_step=4,
        router_func="sigmoid",
        alpha=0.3,
        balancing="loss_free",
        coeff=0.2,
        u=0.01,
    )
    assert not cfg.share_norms
    assert cfg.router == RouterConfig(
        kind="token",
        activation="sigmoid",
        alpha=0.3,
        z_loss_coeff=0.0,
        load_balancing="loss_free",
        balance_loss_coeff=0.2,
        balance_warmup_steps=4,
        bias_update_rate=0.01,
        capacity_multiple=1,
    )


@pytest.mark.parametrize(
    ("sharing", "kind", "update", "kv"),
    [
        ("middle_cycle", "expert", True, "shared_update"),
        ("middle_cycle", "expert", False, "shared"),
        ("cycle", "expert", True, "shared"),
        ("middle_cycle", "token", True, "shared"),
        ("sequence", None, False, "shared"),
    ],
)
def test_updates_of_shared_keys_take_effect_where_the_reference_has_them(sharing, kind, update, kv):
    blocks = {
        "recursive": RECURSION | {"sharing": sharing, "num_recursion": 2},
        "kv_sharing": {"enable": True, "update_cache": update},
    }
    if kind:
        blocks["mor"] = {"enable": True, "type": kind}
    assert build(blocks).kv_mode == kv


@pytest.mark.parametrize(
    ("blocks", "reason"),
    [
        ({"mor": {"enable": True}}, "only inside a recursive model"),
        ({"kv_sharing": {"enable": True}}, "needs recursive.enable"),
        ({"recursive": RECURSION | {"sharing": "spiral"}}, "recursive.sharing='spiral'"),
        ({"recursive": RECURSION, "mor": {"enable": True, "rand_router": True}}, "random routing"),
        ({"recursive": RECURSION, "mor": {"enable": True, "router_type": "cnn"}}, "router_type"),
        (
            {"recursive": RECURSION, "mor": {"enable": True, "expert": {"include_first": False}}},
            "every recursion of our models has a router",
        ),
        (
            {"recursive": RECURSION, "mor": {"enable": True, "capacity": "1.0,0.5"}},
            "one fraction per recursion",
        ),
        (
            {"recursive": RECURSION, "kv_sharing": {"enable": True, "num_recursion": 2}},
            "must equal recursive\\.num_recursion",
        ),
        ({"recursive": RECURSION | {"sharing": "middle_sequence"}, "mor": {"enable": True}}, ""),
        ({"recursive": RECURSION | {"colour": 3}}, "recursive.colour=3: unknown option"),
        ({"lora": {"enable": True}}, "unknown block"),
    ],
)
def test_what_we_lack_is_refused_with_a_reason(blocks, reason):
    with pytest.raises(ValueError, match=reason):
        build(blocks)


def test_later_options_override_and_null_switches_off():
    merged = merge_options(
        {"kv_sharing": {"enable": True}, "seed": 3},
        {"kv_sharing": None, "mor": {"expert": {"alpha": 0.5}}},
    )
    assert merged["kv_sharing"]["enable"] is False
    assert merged["mor"]["expert"]["alpha"] == 0.5
    assert merged["mor"]["expert"]["gating"] == "weighted"


@pytest.mark.parametrize(
    ("layers", "changes", "fitted"),
    [
        (8, {}, 8),
        (9, {}, 8),
        (9, {"sharing": "cycle"}, 9),
        (30, {"base_depth": 4}, 14),
        (30, {"num_recursion": 1, "base_depth": 5}, 5),
        (30, {"num_recursion": 1}, 30),
        (7, {"enable": False}, 7),
    ],
)
def test_layer_counts_follow_the_reference(layers, changes, fitted):
    recursive = merge_options({"recursive": RECURSION | changes})["recursive"]
    assert fitted_layers(layers, recursive) == fitted


@pytest.mark.parametrize(
    ("blocks", "words"),
    [
        ({"recursive": 3}, "recursive=3: must be a group"),
        ({"mor": {"expert": "sigmoid"}}, "mor.expert='sigmoid': must be a group"),
        ({"recursive": {"num_recursion": "3"}}, "recursive.num_recursion='3': must be a whole"),
        ({"recursive": {"num_recursion": 0}}, "recursive.num_recursion=0: must be a whole number"),
        ({"recursive": {"num_recursion": None}}, "recursive.num_recursion=None: must be a whole"),
        ({"recursive": {"num_recursion": 10**9}}, "num_recursion=1000000000: must be .* to 10000"),
        ({"recursive": {"base_depth": []}}, r"recursive.base_depth=\[\]: must be a whole"),
        ({"recursive": {"sharing": 2}}, "recursive.sharing=2: must be a name"),
        ({"recursive": {"enable": "false"}}, "recursive.enable='false': must be true or false"),
        ({"mor": {"temp": {}}}, r"mor.temp=\{\}: must be a number"),
        ({"mor": {"temp": float("nan")}}, "mor.temp=nan: must be a number"),
        ({"mor": {"router_type": []}}, r"mor.router_type=\[\]: must be a name"),
        ({"mor": {"capacity": "1.0,half"}}, "mor.capacity='half': must be a number"),
        ({"mor": {"expert": {"cap_warmup_step": 0.05}}}, "cap_warmup_step=0.05: must be a whole"),
        ({"mor": {"token": {"u": None}}}, "mor.token.u=None: must be a number"),
    ],
)
def test_values_of_another_kind_are_refused_by_name(blocks, words):
    with pytest.raises(ValueError, match=words) as error:
        build(blocks)
    assert "\n" not in str(error.value)


def test_numbers_that_yaml_takes_for_texts_are_numbers():
    assert routed("expert", {"z_loss": True, "z_coeff": "1e-5"}).router.z_loss_coeff == 1e-5
