"""The one mapping between tensor names in foreign checkpoints and paths of our parameter tree.

An entry maps one tensor of a state dict to an array of the tree (or to an index of a stacked
array) and gives the order of its axes. Both directions of the conversion, the aliases of shared
weights and the expected shapes follow from the entries. Three tables, which differ only in names:
the reference's (`entries`), our own Hugging Face export (`mor_entries`) and a vanilla Llama
(`llama_entries`).
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence

from mor_jax.config import ModelConfig
from mor_jax.config.parsing import check

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
# Routers by kind and architecture. Expert-choice has one per recursion; our tree stacks them.
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
class TensorName:
    """One tensor of a state dict.

    path, index: the array of our tree and the index on its leading (stacked) axes.
    pattern: einops pattern from the torch layout to ours.
    canonical: the first name of the same weights; `name` itself if they are not shared.
    """

    name: str
    path: str
    index: tuple[int, ...]
    pattern: str
    canonical: str

    @classmethod
    def own(cls, name: str, path: str, index: tuple[int, ...], pattern: str) -> "TensorName":
        """A tensor that is not an alias."""
        return cls(name, path, index, pattern, name)

    @property
    def is_alias(self) -> bool:
        """Whether the tensor repeats the weights of an earlier name."""
        return self.canonical != self.name


def entries(cfg: ModelConfig) -> tuple[TensorName, ...]:
    """Every tensor of the state dict of a model, aliases included, in the model's order."""
    rows = []
    for layer in _layers(cfg):
        rows.extend(_layer_entries(cfg, layer))
    return _with_ends(cfg, [*rows, *_router_entries(cfg)])


def mor_entries(cfg: ModelConfig) -> tuple[TensorName, ...]:
    """The tensors of our own Hugging Face export: each weight once, named by its stack and slot.

    A tied unembedding is listed as an alias: files may contain it or leave it out.
    """
    rows = []
    for stack, slot in _slots(cfg):
        inside = f"{slot}." if stack in ("layers", "shared") else ""
        prefix = f"model.{stack}.{inside}"
        unshared_norms = stack == "shared" and not cfg.share_norms
        for suffix, (path, pattern) in (ATTENTION | MLP | NORMS).items():
            for r in range(cfg.num_recursions) if unshared_norms and suffix in NORMS else [None]:
                name = suffix if r is None else suffix.replace(".weight", f".{r}.weight")
                index = (slot,) if r is None else (slot, r)
                rows.append(TensorName.own(prefix + name, f"{stack}.{path}", index, pattern))
    return _with_ends(cfg, [*rows, *_mor_routers(cfg)])


def llama_entries(cfg: ModelConfig) -> tuple[TensorName, ...]:
    """The tensors of the equivalent vanilla Llama, with recursions unrolled.

    Shared weights are repeated for each layer that uses them; only a tied unembedding is an alias.

    Raises:
        ValueError: the model routes tokens or shares keys and values, which a Llama cannot express.
    """
    rule = "tokens exit at different depths, but every layer of a Llama runs for every token"
    fix = "Use --to=hf, whose modeling_mor.py supports routing"
    check(cfg.router.kind == "none", "model.router.kind", cfg.router.kind, rule, fix)
    rule = "later recursions attend to keys and values of the first, which a Llama cannot express"
    check(cfg.kv_mode == "recursion", "model.kv_mode", cfg.kv_mode, rule, "Use --to=hf")
    rows = []
    for layer in _layers(cfg):
        for row in _layer_entries(cfg, layer):
            rows.append(TensorName.own(row.name, row.path, row.index, row.pattern))
    return _with_ends(cfg, rows)


def _with_ends(cfg: ModelConfig, rows: list[TensorName]) -> tuple[TensorName, ...]:
    first = TensorName.own(EMBEDDING, "embed.weight", (), "v d -> v d")
    norm = TensorName.own("model.norm.weight", "norm.scale", (), "d -> d")
    head = TensorName.own(HEAD, "head.weight", (), "v d -> v d")
    if cfg.tie_embeddings:
        head = TensorName(HEAD, "embed.weight", (), "v d -> v d", EMBEDDING)
    return (first, *rows, norm, head)


def _slots(cfg: ModelConfig) -> Iterator[tuple[str, int]]:
    # Every stored layer: its stack and its index in it.
    if cfg.is_middle:
        yield "first", 0
    for slot in range(cfg.shared_layers):
        yield "layers" if cfg.sharing == "none" else "shared", slot
    if cfg.is_middle:
        yield "last", 0


@dataclasses.dataclass(frozen=True)
class _Layer:
    # An effective layer: its name prefix, that of its slot in recursion 0, and where it is stored.
    prefix: str
    first: str
    stack: str
    slot: int
    recursion: int | None


def _layers(cfg: ModelConfig) -> Iterator[_Layer]:
    if cfg.sharing == "none":
        for i in range(cfg.num_layers):
            yield _Layer(f"model.layers.{i}.", f"model.layers.{i}.", "layers", i, None)
        return
    if cfg.is_middle:
        yield _Layer("model.layers.0.", "model.layers.0.", "first", 0, None)
    for r in range(cfg.num_recursions):
        for s in range(cfg.shared_layers):
            yield _Layer(_shared_name(cfg, s, r), _shared_name(cfg, s, 0), "shared", s, r)
    if cfg.is_middle:
        inner = {"none": cfg.num_layers - 2, "expert": cfg.num_recursions, "token": 1}
        prefix = f"model.layers.{1 + inner[cfg.router.kind]}."
        yield _Layer(prefix, prefix, "last", 0, None)


def _shared_name(cfg: ModelConfig, slot: int, recursion: int) -> str:
    before = int(cfg.is_middle)
    if cfg.router.kind == "expert":
        return f"model.layers.{before + recursion}.block.{slot}."
    if cfg.router.kind == "token":
        return f"{_token_stage(cfg)}block_list.{recursion}.{slot}."
    if cfg.is_sequence:
        return f"model.layers.{before + slot * cfg.num_recursions + recursion}."
    return f"model.layers.{before + recursion * cfg.shared_layers + slot}."


def _token_stage(cfg: ModelConfig) -> str:
    return "model.layers.1." if cfg.is_middle else "model.layers."


def _layer_entries(cfg: ModelConfig, layer: _Layer) -> Iterator[TensorName]:
    for suffix, (path, pattern) in (ATTENTION | MLP | NORMS).items():
        index, canonical = (layer.slot,), layer.first + suffix
        if suffix in NORMS and layer.recursion is not None and not cfg.share_norms:
            index, canonical = (layer.slot, layer.recursion), layer.prefix + suffix
        yield TensorName(layer.prefix + suffix, f"{layer.stack}.{path}", index, pattern, canonical)


def _router_entries(cfg: ModelConfig) -> Iterator[TensorName]:
    router, before = cfg.router, int(cfg.is_middle)
    if router.kind == "none":
        return
    networks = {"mor_router": "main"}
    places = [(_token_stage(cfg), ())]
    if router.kind == "expert":
        places = [(f"model.layers.{before + r}.", (r,)) for r in range(cfg.num_recursions)]
        if router.causal_routing == "aux_router":
            networks["mlp_router"] = "aux"
    for prefix, index in places:
        for network, ours in networks.items():
            for suffix, (leaf, pattern) in ROUTERS[router.kind, router.arch].items():
                name = f"{prefix}{network}.{suffix}"
                yield TensorName(name, f"router.{ours}.{leaf}", index, pattern, name)
    if router.kind == "token" and router.load_balancing == "loss_free":
        name = f"{_token_stage(cfg)}router_bias"
        yield TensorName(name, "router.bias", (), "r -> r", name)


def _mor_routers(cfg: ModelConfig) -> Iterator[TensorName]:
    router = cfg.router
    if router.kind == "none":
        return
    rows = ROUTERS[router.kind, router.arch].items()
    if router.kind == "token":
        for suffix, (leaf, pattern) in rows:
            yield TensorName.own(f"model.router.{suffix}", f"router.main.{leaf}", (), pattern)
        if router.load_balancing == "loss_free":
            yield TensorName.own("model.router_bias", "router.bias", (), "r -> r")
        return
    networks = {"routers": "main"} | (
        {"aux_routers": "aux"} if router.causal_routing == "aux_router" else {}
    )
    for network, ours in networks.items():
        for r in range(cfg.num_recursions):
            for suffix, (leaf, pattern) in rows:
                name = f"model.{network}.{r}.{suffix}"
                yield TensorName.own(name, f"router.{ours}.{leaf}", (r,), pattern)


def sizes(cfg: ModelConfig) -> dict[str, int]:
    """Sizes of the dimension letters used in the patterns."""
    return {
        "v": cfg.vocab_size,
        "d": cfg.hidden_size,
        "h": cfg.num_heads,
        "g": cfg.num_kv_heads,
        "k": cfg.head_dim,
        "f": cfg.intermediate_size,
        "e": 2 * cfg.hidden_size,
        "r": cfg.num_recursions,
    }


def torch_shape(cfg: ModelConfig, entry: TensorName) -> tuple[int, ...]:
    """Shape of the tensor in the state dict (torch layout)."""
    return _shape(cfg, entry.pattern.split("->")[0])


def place_shape(cfg: ModelConfig, entry: TensorName) -> tuple[int, ...]:
    """Shape of the tensor in our array, without the leading axes of a stack."""
    return _shape(cfg, entry.pattern.split("->")[1])


def _shape(cfg: ModelConfig, side: str) -> tuple[int, ...]:
    letters = sizes(cfg) | {"1": 1}
    axes = re.findall(r"\(([^)]*)\)|(\S+)", side)
    return tuple(math.prod(letters[x] for x in (group or axis).split()) for group, axis in axes)


def array_shapes(cfg: ModelConfig, table: Sequence[TensorName]) -> dict[str, tuple[int, ...]]:
    """Shape of every array of our tree, by path, in the order of `table`."""
    places: dict[str, list[tuple[int, ...]]] = {}
    inner: dict[str, tuple[int, ...]] = {}
    for entry in table:
        places.setdefault(entry.path, []).append(entry.index)
        inner[entry.path] = place_shape(cfg, entry)
    return {
        path: tuple(1 + max(at) for at in zip(*indices, strict=True)) + inner[path]
        for path, indices in places.items()
    }
