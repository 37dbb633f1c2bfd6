"""Translates our configuration to a Hugging Face config.json or the reference's YAML."""

import dataclasses
from typing import Any

from mor_jax.config import ModelConfig, RouterConfig
from mor_jax.config.parsing import check
from mor_jax.convert.hf_config import AUTO_MAP, ROUTER, SHAPE, STRUCTURE
from mor_jax.convert.reference_config import merge_options

Plain = dict[str, Any]


def llama_config(cfg: ModelConfig) -> Plain:
    """config.json of a `LlamaForCausalLM` with `cfg.layers` layers."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **_shape(cfg),
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
    }


def mor_config(cfg: ModelConfig) -> Plain:
    """config.json of our own export, which `modeling_mor.py` reads."""
    values = dataclasses.asdict(cfg)
    values["router"] = {ROUTER.get(name, name): v for name, v in values["router"].items()}
    return {
        "architectures": ["MoRForCausalLM"],
        "model_type": "mor",
        "auto_map": dict(AUTO_MAP),
        **_shape(cfg),
        **{name: values[ours] for ours, name in STRUCTURE.items()},
        "routing": "causal",
        "thresholds": None,
    }


def _shape(cfg: ModelConfig) -> Plain:
    return {
        **{name: getattr(cfg, ours) for ours, name in SHAPE.items()},
        "hidden_act": "silu",
        "rope_theta": cfg.rope_theta,
        "rope_scaling": _rope_scaling(cfg),
        "tie_word_embeddings": cfg.tie_embeddings,
        "use_cache": True,
    }


def _rope_scaling(cfg: ModelConfig) -> Plain | None:
    scaling = cfg.rope_scaling
    if scaling.rope_type == "none":
        return None
    values: Plain = {"rope_type": scaling.rope_type, "factor": scaling.factor}
    if scaling.rope_type == "llama3":
        values |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
        }
    return values


def reference_options(cfg: ModelConfig) -> Plain:
    """The blocks `recursive`, `mor` and `kv_sharing` with which the reference builds this model.

    Raises:
        ValueError: the reference's code cannot express the model.
    """
    shared = cfg.sharing != "none"
    rule = "the reference updates keys and values only with expert-choice and middle_cycle"
    expert = cfg.router.kind == "expert" and cfg.sharing == "middle_cycle"
    check(
        cfg.kv_mode != "shared_update" or expert, "model.kv_mode", cfg.kv_mode, rule, "Use --to=hf"
    )
    rule = "the reference shares keys and values only in cycle, sequence and middle_cycle"
    known = cfg.kv_mode == "recursion" or cfg.sharing != "middle_sequence"
    check(known, "model.sharing", cfg.sharing, rule, "Use --to=hf")
    scaling = cfg.rope_scaling.rope_type
    rule = "the reference does not scale rotary positions"
    check(scaling == "none", "model.rope_scaling.rope_type", scaling, rule, "Use --to=hf")
    _check_capacities(cfg.router)
    sharing = {"num_recursion": cfg.num_recursions, "sharing": cfg.sharing} if shared else {}
    blocks = {
        "recursive": {
            "enable": shared,
            "base_depth": None,
            **(sharing or {"num_recursion": 2, "sharing": "middle_cycle"}),
            "ln_share": cfg.share_norms,
            "initialization": "random",
        },
        "kv_sharing": {
            "enable": cfg.kv_mode != "recursion",
            "base_depth": None,
            "num_recursion": None,
            "sharing": None,
            **(sharing if cfg.kv_mode != "recursion" else {}),
            "update_cache": cfg.kv_mode == "shared_update",
        },
        "mor": _mor(cfg.router, cfg.num_recursions),
    }
    # The reference's code reads every option, even those of a disabled block.
    return {**merge_options(blocks), "relaxation": {"enable": False}}


def _check_capacities(router: RouterConfig) -> None:
    exact = router.kind != "expert" or router.capacity_multiple in (None, 1)
    path, value = "model.router.capacity_multiple", router.capacity_multiple
    rule = "the reference selects int(capacity * seq_len) tokens and never rounds up"
    check(exact, path, value, rule, "Use --to=hf, or train with 1")
    path, value = "model.router.capacity_factor", router.capacity_factor
    rule = "the reference has no capacity limit for token-choice"
    unlimited = router.kind != "token" or value is None
    check(unlimited, path, value, rule, "Use --to=hf, or train with None")


def _mor(router: RouterConfig, recursions: int) -> Plain:
    if router.kind == "none":
        return {"enable": False}
    common = {
        "enable": True,
        "type": router.kind,
        "rand_router": False,
        "router_type": router.arch,
        "z_loss": router.z_loss_coeff > 0,
        "z_coeff": router.z_loss_coeff or 1e-5,
        "temp": router.temperature,
        "capacity": None,
    }
    score = None if router.activation == "none" else router.activation
    if router.kind == "expert":
        shares = router.capacities(recursions)
        return common | {
            "capacity": ",".join(str(share) for share in shares),
            "expert": {
                "cap_warmup_step": router.capacity_warmup_steps,
                "router_func": score,
                "alpha": router.alpha,
                "sampling": None if router.causal_routing == "none" else router.causal_routing,
                "include_first": True,
                "coeff": router.aux_loss_coeff,
                "gating": router.gating,
            },
        }
    return common | {
        "token": {
            "bal_warmup_step": router.balance_warmup_steps,
            "router_func": score,
            "alpha": router.alpha,
            "balancing": None if router.load_balancing == "none" else router.load_balancing,
            "coeff": router.balance_loss_coeff,
            "u": router.bias_update_rate,
            "gating": router.gating,
        },
    }
