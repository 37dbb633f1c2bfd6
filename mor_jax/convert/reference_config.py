"""The reference's configuration -> `ModelConfig`.

The reference describes a model by a Hugging Face Llama configuration and three blocks of options:
`recursive`, `mor` and `kv_sharing`. Every option is either expressed in our configuration or
rejected with an explanation; none is ignored.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mor_jax.config import Attention, KVMode, ModelConfig, RouterConfig, Sharing
from mor_jax.config.parsing import check, fail
from mor_jax.convert.hf_config import llama_config
from mor_jax.convert.reference_kinds import capacity_fractions, check_group, check_option

Options = dict[str, Any]

# The reference's defaults.
DEFAULTS: Options = {
    "recursive": {
        "enable": False,
        "base_depth": None,
        "num_recursion": 2,
        "sharing": "cycle",
        "ln_share": True,
        "initialization": "stepwise",
    },
    "mor": {
        "enable": False,
        "type": "expert",
        "capacity": None,
        "rand_router": False,
        "router_type": "linear",
        "z_loss": False,
        "z_coeff": 1e-5,
        "temp": 1.0,
        "expert": {
            "cap_warmup_step": 0,
            "router_func": "sigmoid",
            "alpha": 0.1,
            "sampling": "aux_loss",
            "include_first": True,
            "coeff": 0.001,
            "gating": "weighted",
        },
        "token": {
            "bal_warmup_step": 0,
            "router_func": "softmax",
            "alpha": 1.0,
            "balancing": "loss",
            "coeff": 0.1,
            "u": 0.001,
            "gating": "weighted",
        },
    },
    "kv_sharing": {
        "enable": False,
        "base_depth": None,
        "num_recursion": None,
        "sharing": None,
        "update_cache": False,
    },
}


def merge_options(*layers: Mapping[str, Any] | None) -> Options:
    """The reference's defaults, overridden by each of `layers` in turn (None: no change).

    A block that is None is disabled. Settings outside the three blocks belong to the reference's
    data and trainer and do not affect the model.

    Raises:
        ValueError: an unknown option that is enabled.
    """
    merged = DEFAULTS
    for layer in layers:
        for block, values in (layer or {}).items():
            if block in DEFAULTS:
                check_group(block, values)
                values = {"enable": False} if values is None else values
                merged = merged | {block: _merge(merged[block], values, block)}
            elif isinstance(values, Mapping) and values.get("enable"):
                rule = f"unknown block; known are {sorted(DEFAULTS)}"
                fail(block, dict(values), rule, "Disable it in the reference")
    return merged


def _merge(base: Options, values: Mapping[str, Any], path: str) -> Options:
    merged = dict(base)
    for key, value in values.items():
        where = f"{path}.{key}"
        if isinstance(base.get(key), dict):
            check_group(where, value)
            merged[key] = _merge(base[key], value or {}, where)
        elif key in base:
            check_option(where, value)
            merged[key] = value
        elif value:
            rule = f"unknown option of the reference; known are {sorted(base)}"
            fail(where, value, rule, "Leave it out if it has no effect on the model")
    return merged


def model_config(
    hf: Mapping[str, Any],
    options: Options,
    *,
    layers: int | None = None,
    tied: bool | None = None,
    attention: Attention = "auto",
) -> ModelConfig:
    """Configuration of the model that the reference builds; float32, validated.

    hf: the Llama configuration. options: from `merge_options`. layers: effective layers after the
    reference fitted them to the sharing scheme; None: fit them the same way. tied: whether
    embedding and unembedding are shared; None: as in `hf`, except that the reference's recursive
    class never ties them.

    Raises:
        ValueError: an unsupported option, or values that do not fit together.
    """
    recursive, mor = options["recursive"], options["mor"]
    shared = bool(recursive["enable"])
    if tied is None:
        never = shared and not mor["enable"]
        tied = bool(hf.get("tie_word_embeddings", False)) and not never
    vanilla = llama_config(hf, "hf_config", tied=tied)
    rule = "the reference's models do not scale rotary positions"
    scaling = vanilla.rope_scaling.rope_type
    check(scaling == "none", "hf_config: rope_scaling", scaling, rule, "Use rope_theta alone")
    cfg = dataclasses.replace(
        vanilla,
        num_layers=layers or fitted_layers(vanilla.num_layers, recursive),
        sharing=_sharing(recursive),
        num_recursions=recursive["num_recursion"] if shared else 1,
        share_norms=bool(recursive["ln_share"]) if shared else True,
        kv_mode=_kv_mode(options),
        router=_router(options),
        attention=attention,
    )
    cfg.validate()
    return cfg


def fitted_layers(layers: int, recursive: Options) -> int:
    """Effective layers of the recursive model that the reference makes from `layers` layers.

    A multiple of the number of recursions (plus first and last): as many as fit, or `base_depth`
    per recursion. With one recursion, `base_depth` layers in total.
    """
    if not recursive["enable"]:
        return layers
    depth, nr = recursive["base_depth"], recursive["num_recursion"]
    if nr == 1:
        return depth or layers
    ends = 2 if recursive["sharing"].startswith("middle") else 0
    return ends + nr * (depth or (layers - ends) // nr)


def _sharing(recursive: Options) -> Sharing:
    if not recursive["enable"]:
        return "none"
    allowed = ("cycle", "sequence", "middle_cycle", "middle_sequence")
    return _choice(recursive["sharing"], allowed, "recursive.sharing")


def _kv_mode(options: Options) -> KVMode:
    kv, recursive, mor = options["kv_sharing"], options["recursive"], options["mor"]
    if not kv["enable"]:
        return "recursion"
    rule = "sharing keys and values needs recursive.enable=true"
    check(bool(recursive["enable"]), "kv_sharing.enable", True, rule, "Enable recursion")
    for name in ("sharing", "num_recursion"):
        rule = f"must equal recursive.{name}, {recursive[name]!r}"
        ok = kv[name] in (None, recursive[name])
        check(ok, f"kv_sharing.{name}", kv[name], rule, "Leave it out")
    # For other models the reference accepts update_cache without any effect.
    expert = mor["enable"] and mor["type"] == "expert"
    takes_effect = expert and recursive["sharing"] == "middle_cycle"
    return "shared_update" if kv["update_cache"] and takes_effect else "shared"


def _router(options: Options) -> RouterConfig:
    mor = options["mor"]
    if not mor["enable"]:
        return RouterConfig()
    rule = "the reference routes only inside a recursive model"
    check(bool(options["recursive"]["enable"]), "mor.enable", True, rule, "Enable recursion")
    rule = "random routing has no learned scores, and its choices cannot be reproduced"
    check(not mor["rand_router"], "mor.rand_router", True, rule, "Use a learned router")
    archs = {"linear": "linear", "mlp": "mlp", "wide_mlp": "mlp"}
    kind = mor["type"]
    check(kind in ("expert", "token"), "mor.type", kind, "unknown router", "Use expert or token")
    rule = f"must be one of {sorted(archs)}"
    check(mor["router_type"] in archs, "mor.router_type", mor["router_type"], rule, "Use linear")
    base = RouterConfig(
        kind=kind,
        arch=archs[mor["router_type"]],
        temperature=float(mor["temp"]),
        z_loss_coeff=float(mor["z_coeff"]) if mor["z_loss"] else 0.0,
        gating=_choice(mor[kind]["gating"], ("weighted", "additive"), f"mor.{kind}.gating"),
        alpha=float(mor[kind]["alpha"]),
        # The reference never rounds capacities, on any hardware.
        capacity_multiple=1,
    )
    return _expert(base, mor) if kind == "expert" else _token(base, mor["token"])


def _expert(base: RouterConfig, mor: Options) -> RouterConfig:
    part = mor["expert"]
    rule = "every recursion of our models has a router; the reference can omit the first"
    check(part["include_first"] is not False, "mor.expert.include_first", False, rule, "Use true")
    rule = "must be a number of steps; the reference takes the default from its trainer"
    warmup = part["cap_warmup_step"]
    check(warmup is not None, "mor.expert.cap_warmup_step", warmup, rule, "Write the number out")
    capacity = mor["capacity"]
    fractions = None if capacity is None else capacity_fractions("mor.capacity", capacity)
    activation = "none" if part["router_func"] is None else part["router_func"]
    sampling = "none" if part["sampling"] is None else part["sampling"]
    return dataclasses.replace(
        base,
        activation=_choice(activation, ("sigmoid", "tanh", "none"), "mor.expert.router_func"),
        capacity=fractions,
        capacity_warmup_steps=int(warmup),
        # One stage per forward pass: the reference changes its capacity at every pass.
        capacity_warmup_stages=max(int(warmup), 1),
        causal_routing=_choice(sampling, ("aux_loss", "aux_router", "none"), "mor.expert.sampling"),
        aux_loss_coeff=float(part["coeff"]),
    )


def _token(base: RouterConfig, part: Options) -> RouterConfig:
    balancing = "none" if part["balancing"] is None else part["balancing"]
    return dataclasses.replace(
        base,
        # The reference treats every value but "sigmoid" as softmax.
        activation="sigmoid" if part["router_func"] == "sigmoid" else "softmax",
        load_balancing=_choice(balancing, ("loss", "loss_free", "none"), "mor.token.balancing"),
        balance_loss_coeff=float(part["coeff"]),
        balance_warmup_steps=int(part["bal_warmup_step"] or 0),
        bias_update_rate=float(part["u"]),
        capacity_factor=None,
    )


def _choice(value: str, allowed: tuple[str, ...], path: str) -> Any:
    check(value in allowed, path, value, f"must be one of {allowed}", f"Use {allowed[0]!r}")
    return value
