"""The one map between the reference's state-dict names and the paths of our parameter tree.

A row says: this tensor of the state dict is that array of the tree (at that place of a stack),
with its axes arranged so. Both directions, the aliases of shared weights, Hugging Face names of
plain models and the shapes a checkpoint must have all follow from the same rows.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

from mor_jax.config import ModelConfig

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

# Name inside a layer -> path inside a stack, and the torch layout (out x in) -> ours. Letters as
# in mor_jax.types; e is the hidden width of a router MLP.
ATTENTION = {
    "self_attn.q_proj.weight": ("attention.q", "(h k) d -> d h k"),
    "self_attn.k_proj.weight": ("attention.k", "(g k) d -> d g k"),
    "self_attn.v_proj.weight": ("attention.v", "(g k) d -> d g k"),
    "self_attn.o_proj.weight": ("attention.o", "d (h k) -> h k d"),
}
MLP = {
    "mlp.gate_proj.weight": ("mlp.gate", "f d -> d f"),
    "mlp.up_proj.weight": ("mlp.up", "f d -> d f"),
    "mlp.down_proj.weight": ("mlp.down", "d f -> f d"),
}
NORMS = {
    "input_layernorm.weight": ("norm1.scale", "d -> d"),
    "post_attention_layernorm.weight": ("norm2.scale", "d -> d"),
}
# Routers by kind and architecture. Expert-choice has one per recursion, stacked by us.
ROUTERS = {
    ("expert", "linear"): {"router.weight": ("weight", "1 d -> d")},
    ("expert", "mlp"): {
        "router.0.weight": ("hidden", "e d -> d e"),
        "router.2.weight": ("out", "1 e -> e"),
    },
    ("token", "linear"): {"router.weight": ("weight", "r d -> r d")},
    ("token", "mlp"): {
        "router.0.weight": ("hidden", "e d -> d e"),
        "router.2.weight": ("out", "r e -> e r"),
    },
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a state dict.

    path, index: the array of our tree and the place on its leading (stacked) axes.
    pattern: einops pattern from the torch layout to that place.
    canonical: the name under which the same weights appear first; `name` itself if not shared.
    """

    name: str
    path: str
    index: tuple[int, ...]
    pattern: str
    canonical: str

    @property
    def is_alias(self) -> bool:
        """Whether the tensor repeats weights that another name holds."""
        return self.canonical != self.name


def entries(cfg: ModelConfig) -> tuple[Entry, ...]:
    """Every tensor of the state dict of a model, aliases included, in the model's order."""
    rows = [Entry(EMBEDDING, "embed.weight", (), "v d -> v d", EMBEDDING)]
    for layer in _layers(cfg):
        rows.extend(_layer_entries(cfg, layer))
    rows.extend(_router_entries(cfg))
    rows.append(Entry("model.norm.weight", "norm.scale", (), "d -> d", "model.norm.weight"))
    if cfg.tie_embeddings:
        rows.append(Entry(HEAD, "embed.weight", (), "v d -> v d", EMBEDDING))
    else:
        rows.append(Entry(HEAD, "head.weight", (), "v d -> v d", HEAD))
    return tuple(rows)


@dataclasses.dataclass(frozen=True)
class _Layer:
    # An effective layer: its prefix, that of its slot in recursion 0, and its place.
    prefix: str
    first: str
    stack: str
    slot: int
    recursion: int | None


def _layers(cfg: ModelConfig) -> Iterator[_Layer]:
    if cfg.sharing == "none":
        for i in range(cfg.layers):
            yield _Layer(f"model.layers.{i}.", f"model.layers.{i}.", "layers", i, None)
        return
    if cfg.is_middle:
        yield _Layer("model.layers.0.", "model.layers.0.", "first", 0, None)
    for r in range(cfg.recursions):
        for s in range(cfg.shared_layers):
            yield _Layer(_shared_name(cfg, s, r), _shared_name(cfg, s, 0), "shared", s, r)
    if cfg.is_middle:
        inner = {"none": cfg.layers - 2, "expert": cfg.recursions, "token": 1}
        prefix = f"model.layers.{1 + inner[cfg.router.kind]}."
        yield _Layer(prefix, prefix, "last", 0, None)


def _shared_name(cfg: ModelConfig, slot: int, recursion: int) -> str:
    before = int(cfg.is_middle)
    if cfg.router.kind == "expert":
        return f"model.layers.{before + recursion}.block.{slot}."
    if cfg.router.kind == "token":
        return f"{_token_stage(cfg)}block_list.{recursion}.{slot}."
    if cfg.is_sequence:
        return f"model.layers.{before + slot * cfg.recursions + recursion}."
    return f"model.layers.{before + recursion * cfg.shared_layers + slot}."


def _token_stage(cfg: ModelConfig) -> str:
    return "model.layers.1." if cfg.is_middle else "model.layers."


def _layer_entries(cfg: ModelConfig, layer: _Layer) -> Iterator[Entry]:
    for suffix, (path, pattern) in (ATTENTION | MLP | NORMS).items():
        index, canonical = (layer.slot,), layer.first + suffix
        if suffix in NORMS and layer.recursion is not None and not cfg.share_norms:
            index, canonical = (layer.slot, layer.recursion), layer.prefix + suffix
        yield Entry(layer.prefix + suffix, f"{layer.stack}.{path}", index, pattern, canonical)


def _router_entries(cfg: ModelConfig) -> Iterator[Entry]:
    router, before = cfg.router, int(cfg.is_middle)
    if router.kind == "none":
        return
    networks = {"mor_router": "main"}
    places = [(_token_stage(cfg), ())]
    if router.kind == "expert":
        places = [(f"model.layers.{before + r}.", (r,)) for r in range(cfg.recursions)]
        if router.aux == "aux_router":
            networks["mlp_router"] = "aux"
    for prefix, index in places:
        for network, ours in networks.items():
            for suffix, (leaf, pattern) in ROUTERS[router.kind, router.arch].items():
                name = f"{prefix}{network}.{suffix}"
                yield Entry(name, f"router.{ours}.{leaf}", index, pattern, name)
    if router.kind == "token" and router.balancing == "loss_free":
        name = f"{_token_stage(cfg)}router_bias"
        yield Entry(name, "router.bias", (), "r -> r", name)


def sizes(cfg: ModelConfig) -> dict[str, int]:
    """What the letters of the patterns stand for."""
    return {
        "v": cfg.vocab_size,
        "d": cfg.width,
        "h": cfg.heads,
        "g": cfg.kv_heads,
        "k": cfg.head_dim,
        "f": cfg.mlp_width,
        "e": 2 * cfg.width,
        "r": cfg.recursions,
    }


def reference_shape(cfg: ModelConfig, entry: Entry) -> tuple[int, ...]:
    """Shape of the tensor in the state dict (torch layout)."""
    letters = sizes(cfg) | {"1": 1}
    axes = re.findall(r"\(([^)]*)\)|(\S+)", entry.pattern.split("->")[0])
    return tuple(math.prod(letters[x] for x in (group or axis).split()) for group, axis in axes)
