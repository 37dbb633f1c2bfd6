"""The models of the evidence: those of the main table and those of the ablations."""

import dataclasses
from typing import Any

WIDTH = "w48"

_ROUTER = "model.router."


@dataclasses.dataclass(frozen=True)
class Variant:
    """file, choices: the shipped configuration. settings: what is set in it beside."""

    name: str
    file: str
    choices: str = ""
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)


MAIN = (
    Variant("plain", "vanilla"),
    Variant("recursive-3", "recursive", "recursions=3"),
    Variant("mor-2", "mor", "recursions=2"),
    Variant("mor-3", "mor", "recursions=3"),
    Variant("mor-3-shared", "mor", "recursions=3,kv=shared"),
    Variant("token-3", "mor", "recursions=3,routing=token"),
)
"""In the order of the table; the first is what the others are compared with."""


def _router(name: str, **settings: Any) -> Variant:
    changed = {f"{_ROUTER}{key}": value for key, value in settings.items()}
    return Variant(name, "mor", "recursions=2", changed)


ABLATIONS: dict[str, tuple[Variant, ...]] = {
    "sharing scheme, two recursions without routing": (
        Variant("middle-cycle", "recursive", "recursions=2"),
        Variant("middle-sequence", "recursive", "recursions=2,sharing=middle_sequence"),
        Variant("cycle", "recursive", "recursions=2,sharing=cycle"),
        Variant("sequence", "recursive", "recursions=2,sharing=sequence"),
    ),
    "router's activation, mor-2": (
        Variant("mor-2", "mor", "recursions=2"),
        _router("tanh", activation="tanh"),
        _router("no-activation", activation="none"),
        _router("mlp-router", arch="mlp"),
    ),
    "how the router learns to be causal, mor-2": (
        Variant("mor-2", "mor", "recursions=2"),
        _router("aux-router", causal_routing="aux_router"),
        _router("no-aux", causal_routing="none"),
    ),
    "capacity, mor-2": (
        Variant("mor-2", "mor", "recursions=2"),
        _router("capacity-warm-up", capacity_warmup_steps=None),
    ),
}
"""Group -> variants; `mor-2` stands for the run of the main table."""

CAUSES = {
    "mor-2": "sigmoid, linear, auxiliary loss, fixed capacity (the default)",
    "middle-cycle": "own first and last layer, block repeated (the default)",
    "middle-sequence": "own first and last layer, each layer repeated",
    "cycle": "whole block repeated",
    "sequence": "each layer repeated",
    "tanh": "tanh",
    "no-activation": "no activation",
    "mlp-router": "two-layer router",
    "aux-router": "auxiliary router",
    "no-aux": "nothing: only the training rule",
    "capacity-warm-up": "from all tokens down to the capacity in the first tenth",
}
"""What a row of an ablation says."""

__all__ = ["ABLATIONS", "CAUSES", "MAIN", "WIDTH", "Variant"]
