"""Mixture-of-Recursions in PyTorch: plain Llama, recursive, and routed models of mor_jax.

One file that needs torch and transformers (4.56 or newer) and nothing else. It computes what
mor_jax computes, in float32 up to rounding.

A recursive model runs one shared block `num_recursions` times. With a router, each recursion is
entered by some tokens only:

- expert-choice: every recursion has a router that scores its candidates. A chosen token becomes
  x + score * block(x) (gating "weighted") or x + block(x) ("additive"); the others stay as they
  are and leave.
- token-choice: one router gives each token its depth, from the state before the first recursion.

`routing="causal"`, the default, decides each token from its own score, so that no later token can
change it; it is the one for scoring and generating text. `routing="topk"` is the rule of training:
the best `capacities[r]` of a row's tokens go on, which looks at the whole row. Padding is never
chosen, attended to or counted, but the room of a recursion is a share of the padded row's length,
as in training: pad as little as possible, or score rows of one length, where that matters.

Fine-tuning under `routing="topk"` adds the losses of the routers to the loss, with the weights of
the configuration; what depends on the step number (warm-up of capacities and of balancing, the
moves of the `loss_free` bias) is left as training ended it.
"""

import dataclasses
import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import Cache, GenerationMixin, PreTrainedModel
from transformers.configuration_utils import PretrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

# Of this file, raised when exports gain by a newer one; `launch/convert.py refresh` renews theirs.
FILE_VERSION = 3

Keep = Callable[[Tensor], None]
"""Takes the residual stream after a layer, where a caller asked for it."""

# Names under which releases of transformers hand a cache over: the second one from 5.24 on.
CACHE_NAMES = ("past_key_values", "cache")
# Keywords that ask for what the models do anyway.
GRANTED = {"output_attentions": False, "output_router_logits": False, "is_causal": True}
SHARING = ("none", "cycle", "sequence", "middle_cycle", "middle_sequence")
ROUTINGS = ("causal", "topk")
# Settings of the router that a config.json may leave out.
ROUTER = {
    "kind": "none",
    "arch": "linear",
    "score": "sigmoid",
    "alpha": 0.1,
    "temperature": 1.0,
    "gating": "weighted",
    "z_coeff": 0.0,
    "capacities": None,
    "aux": "aux_loss",
    "aux_coeff": 0.001,
    "balancing": "loss",
    "balance_coeff": 0.1,
    "capacity_factor": None,
    "capacity_multiple": None,
}


class MoRConfig(PretrainedConfig):
    """Shape and routing of a model.

    num_hidden_layers: effective layers, as many as a plain model of the same depth would hold.
    sharing: "none", or how the shared block stands for them; the middle variants keep the first
        and the last layer apart. num_recursions: how often the block runs. share_norms: whether
        all recursions use one pair of norms per layer.
    kv_mode: "recursion": the tokens of a recursion attend to each other. "shared": later
        recursions attend to the keys and values of the first. "shared_update": those of the
        tokens that go on are computed afresh.
    router: its settings by name (`ROUTER` has those that matter here). routing: "causal" or
        "topk", where a call does not say. thresholds: logit that a token must reach at each
        recursion under causal routing of expert-choice; None: 0.
    rope_scaling: None, {"rope_type": "linear", "factor"} or {"rope_type": "llama3", "factor",
        "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}.
    """

    model_type = "mor"
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        *CACHE_NAMES,
        "hidden_states",
        "depths",
        "router_loss",
    ]
    # Newer releases have a property of this name that rewrites it; here it is a plain value.
    rope_scaling = None

    def __init__(
        self,
        vocab_size: int = 256,
        hidden_size: int = 256,
        intermediate_size: int = 704,
        num_hidden_layers: int = 8,
        num_attention_heads: int = 8,
        num_key_value_heads: int = 4,
        head_dim: int = 32,
        max_position_embeddings: int = 2048,
        rms_norm_eps: float = 1e-5,
        rope_theta: float = 10000.0,
        rope_scaling: dict[str, Any] | None = None,
        initializer_range: float = 0.02,
        hidden_act: str = "silu",
        sharing: str = "none",
        num_recursions: int = 1,
        share_norms: bool = True,
        kv_mode: str = "recursion",
        router: dict[str, Any] | None = None,
        routing: str = "causal",
        thresholds: list[float] | None = None,
        use_cache: bool = True,
        tie_word_embeddings: bool = True,
        **kwargs,
    ):
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.intermediate_size, self.num_hidden_layers = intermediate_size, num_hidden_layers
        self.num_attention_heads, self.num_key_value_heads = (
            num_attention_heads,
            num_key_value_heads,
        )
        self.head_dim, self.max_position_embeddings = head_dim, max_position_embeddings
        self.rms_norm_eps, self.initializer_range = rms_norm_eps, initializer_range
        self.rope_theta, self.rope_scaling = rope_theta, rope_scaling
        self.hidden_act, self.use_cache = hidden_act, use_cache
        self.sharing, self.num_recursions = sharing, num_recursions
        self.share_norms, self.kv_mode = share_norms, kv_mode
        self.router = {**ROUTER, **(router or {})}
        self.routing, self.thresholds = routing, thresholds
        self._check()
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    @property
    def is_middle(self) -> bool:
        """Whether the first and the last layer stand outside the shared block."""
        return self.sharing.startswith("middle")

    @property
    def shared_layers(self) -> int:
        """Layers held by the shared block."""
        return (self.num_hidden_layers - 2 * self.is_middle) // self.num_recursions

    @property
    def shares(self) -> tuple[float, ...]:
        """Share of a row's tokens that each recursion of expert-choice keeps."""
        nr = self.num_recursions
        return tuple(self.router["capacities"] or ((nr - r) / nr for r in range(nr)))

    def _check(self) -> None:
        _choose_from("sharing", self.sharing, SHARING)
        _choose_from("routing", self.routing, ROUTINGS)
        _choose_from("kv_mode", self.kv_mode, ("recursion", "shared", "shared_update"))
        _choose_from("router['kind']", self.router["kind"], ("none", "expert", "token"))
        _choose_from("hidden_act", self.hidden_act, ("silu",))
        if self.rope_scaling is not None:
            kind = self.rope_scaling.get("rope_type")
            _choose_from("rope_scaling['rope_type']", kind, ("linear", "llama3"))
        layers, nr = self.num_hidden_layers - 2 * self.is_middle, self.num_recursions
        if layers <= 0 or layers % nr or (self.sharing == "none" and nr != 1):
            raise ValueError(
                f"num_hidden_layers={self.num_hidden_layers}: sharing={self.sharing!r} with "
                f"num_recursions={nr} needs {2 * self.is_middle} + a multiple of {nr} layers"
            )
        if self.thresholds is not None and len(self.thresholds) != nr:
            raise ValueError(f"thresholds={self.thresholds}: needs one for each of {nr} recursions")


def _choose_from(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}={value!r}: must be one of {known}")


def cache_field(output: type) -> str:
    """The name that this release of transformers has for the cache in an output of a model."""
    fields = [field.name for field in dataclasses.fields(output)]
    found = [name for name in fields if name in CACHE_NAMES]
    if len(found) != 1:
        raise ImportError(
            f"transformers {transformers.__version__}: {output.__name__} has the fields {fields}, "
            f"and this file looks for one of {CACHE_NAMES}. Renew it with a newer mor_jax "
            "(launch/convert.py refresh), or install transformers 5.24"
        )
    return found[0]


CACHE = cache_field(BaseModelOutputWithPast)
# Older releases read crop(0) as "keep no token", later ones as "remove no token".
CROP_KEEPS = "max_length" in inspect.signature(Cache.crop).parameters


class MoRCache(Cache):
    """Keys and values of the tokens that the model has seen.

    Layers that every token passes keep a slot for each, padding included. Recursions that some
    tokens enter keep only those, each row packed to the left, in order.

    entries: keys and values (b, heads, slots, head_dim) by layer and recursion.
    length: tokens of a row so far, padding included.
    real: (b, length), False at padding; None: there is none.
    entered: (b, length) by recursion: which tokens went into it; only packed recursions.
    """

    # transformers derives these from a list of layers, which is empty here, and then "all of them"
    # is true: it would, among others, take the cache for one that knows of no length.
    is_compileable = False
    is_croppable = True
    is_linear: ClassVar[list[bool]] = [False]
    is_sliding: ClassVar[list[bool]] = [False]
    is_dummy: ClassVar[list[bool]] = [False]

    def __init__(self):
        super().__init__(layers=[])
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self.entries: dict[str, tuple[Tensor, Tensor]] = {}
        self.entered: dict[int, Tensor] = {}
        self.length = 0
        self.real: Tensor | None = None

    def __len__(self) -> int:
        return len(self.entries)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of a row so far, padding included."""
        return self.length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: it grows as needed."""
        return -1

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """-1: it grows as needed."""
        return -1

    def extend(self, name: str, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values of a layer that every token passes, after adding new ones."""
        if name in self.entries:
            old = self.entries[name]
            keys, values = torch.cat([old[0], keys], 2), torch.cat([old[1], values], 2)
        self.entries[name] = (keys, values)
        return keys, values

    def pack(self, name: str, start: Tensor, size: int, keys: Tensor, values: Tensor):
        """The same for a recursion that some tokens enter.

        start: (b,) slots taken so far. size: slots that the longest row needs now. Of the new
        ones, fillers stand last: they land beyond the row's end and are overwritten later.
        """
        old = self.entries.get(name, (keys[:, :, :0], values[:, :, :0]))
        place = start[:, None] + torch.arange(keys.shape[2], device=keys.device)
        new = tuple(
            _put_slots(a, b, place)[:, :, :size] for a, b in zip(old, (keys, values), strict=True)
        )
        self.entries[name] = new
        return new

    def crop(self, max_length: int) -> None:
        """Keeps the first `max_length` tokens of each row; a negative number drops as many.

        0 means what it means to the release of transformers: keep nothing, or drop nothing.
        """
        keeps = max_length > 0 or (max_length == 0 and CROP_KEEPS)
        keep = max_length if keeps else self.length + max_length
        if keep >= self.length:
            return
        self.length = keep
        self.real = None if self.real is None else self.real[:, :keep]
        self.entered = {r: entered[:, :keep] for r, entered in self.entered.items()}
        for name, (keys, values) in self.entries.items():
            entered = self.entered.get(_recursion_of(name))
            size = keep if entered is None else int(entered.sum(1).max())
            self.entries[name] = (keys[:, :, :size], values[:, :, :size])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row beam_idx[i] was."""
        self._each(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times, one after the other."""
        self._each(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these rows."""
        self._each(lambda x: x[indices])

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        self.entries = {name: (change(k), change(v)) for name, (k, v) in self.entries.items()}
        self.entered = {r: change(entered) for r, entered in self.entered.items()}
        self.real = None if self.real is None else change(self.real)


def _shared_name(recursion: int, slot: int) -> str:
    return f"{recursion}.{slot}"


def _recursion_of(name: str) -> int | None:
    # None for the layers that no recursion runs.
    recursion = name.split(".")[0]
    return int(recursion) if recursion.isdigit() else None


def _put_slots(old: Tensor, new: Tensor, place: Tensor) -> Tensor:
    room = torch.cat([old, torch.zeros_like(new)], 2)
    index = place[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3])
    return room.scatter(2, index, new)


class Scope(NamedTuple):
    """The tokens that a layer is run on, as attention sees them.

    cos, sin: tables of the rotary embedding, (b or 1, c, head_dim / 2), float32.
    mask: (b or 1, 1, c, keys), True where a query sees a key; None: plain causal order, or one
        query that sees every key.
    store: takes the layer's name, keys and values to the cache and returns all of them; None:
        there is no cache.
    """

    cos: Tensor
    sin: Tensor
    mask: Tensor | None
    store: Callable[[str, Tensor, Tensor], tuple[Tensor, Tensor]] | None = None


@dataclasses.dataclass
class Row:
    """The new tokens of all rows. past: tokens before them. real: (b, l), False at padding.

    keys: (b, past + l), the same of all tokens so far; None: no padding. scope: of the whole row.
    """

    scope: Scope
    cache: MoRCache | None
    past: int
    real: Tensor | None
    keys: Tensor | None


@dataclasses.dataclass
class Level:
    """The tokens that enter one recursion.

    chosen: (b, l); None: all, and there is no padding. index: (b, c) places in the row, ascending;
    None: the recursion runs on the whole row. valid: False marks filler slots, which stand last
    and whose results are thrown away; None: there are none.
    """

    chosen: Tensor | None
    index: Tensor | None = None
    valid: Tensor | None = None

    @classmethod
    def of(cls, chosen: Tensor) -> "Level":
        """A level with as many slots as the row with the most chosen tokens needs."""
        counts = chosen.sum(1)
        slots = int(counts.max())
        index = torch.argsort((~chosen).int(), dim=1, stable=True)[:, :slots]
        if slots == int(counts.min()):
            return cls(chosen, index)
        return cls(chosen, index, torch.arange(slots, device=chosen.device) < counts[:, None])

    @property
    def is_empty(self) -> bool:
        """Whether no token enters at all."""
        return self.index is not None and self.index.shape[1] == 0

    def take(self, x: Tensor) -> Tensor:
        """(b, l, d) -> (b, c, d)"""
        return x if self.index is None else x.gather(1, self._places(x))

    def put(self, x: Tensor, here: Tensor, new: Tensor) -> Tensor:
        """The whole row with the level's tokens `here` replaced by `new`."""
        if self.index is None:
            return new
        if self.valid is not None:
            new = torch.where(self.valid[..., None], new, here)
        return x.scatter(1, self._places(x), new)

    def _places(self, x: Tensor) -> Tensor:
        return self.index[..., None].expand(-1, -1, x.shape[-1])


def rotary(config: MoRConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines (b, l, head_dim / 2) of `positions` (b, l), float32."""
    dim = config.head_dim
    exponent = torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim
    frequency = config.rope_theta**-exponent
    scaling = config.rope_scaling
    if scaling is not None and scaling["rope_type"] == "linear":
        frequency = frequency / scaling["factor"]
    elif scaling is not None:
        # Llama 3.1: slow frequencies are divided, fast ones stay, those between are mixed.
        turns = frequency * (scaling["original_max_position_embeddings"] / (2 * math.pi))
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
        frequency = (1.0 - kept) * (frequency / scaling["factor"]) + kept * frequency
    angle = positions[..., None].float() * frequency
    return angle.cos(), angle.sin()


def rotate(x: Tensor, scope: Scope) -> Tensor:
    """Turns channel pairs (i, i + k/2) of heads (b, h, c, k), in float32."""
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = scope.cos[:, None], scope.sin[:, None]
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.to(x.dtype)


class MoRRMSNorm(nn.Module):
    """Root-mean-square normalisation in float32, cast back before the scale."""

    def __init__(self, config: MoRConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.eps = config.rms_norm_eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalises the last axis."""
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


class MoRAttention(nn.Module):
    """Grouped-query attention without biases."""

    def __init__(self, config: MoRConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.groups = config.num_attention_heads // config.num_key_value_heads
        heads = config.num_attention_heads * config.head_dim
        kv_heads = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, heads, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads, bias=False)
        self.o_proj = nn.Linear(heads, config.hidden_size, bias=False)

    def keys_values(self, x: Tensor, scope: Scope) -> tuple[Tensor, Tensor]:
        """Keys (after the rotary embedding) and values of normalised tokens, (b, g, c, k)."""
        return rotate(self._heads(self.k_proj(x)), scope), self._heads(self.v_proj(x))

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, scope: Scope) -> Tensor:
        """Attends from normalised tokens (b, c, d) to keys and values (b, g, n, k)."""
        q = rotate(self._heads(self.q_proj(x)), scope)
        if self.groups > 1:
            keys, values = (t.repeat_interleave(self.groups, dim=1) for t in (keys, values))
        causal = scope.mask is None and q.shape[2] > 1
        out = F.scaled_dot_product_attention(
            q, keys, values, attn_mask=scope.mask, is_causal=causal
        )
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class MoRMLP(nn.Module):
    """Gated MLP: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: MoRConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps each token on its own."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MoRLayer(GradientCheckpointingLayer):
    """h = x + attention(norm(x)); y = h + mlp(norm(h)).

    separate_norms: one pair of norms for each recursion. update: keys and values that are handed
    in are joined by the layer's own.
    """

    def __init__(self, config: MoRConfig, separate_norms: bool = False, update: bool = False):
        super().__init__()
        self.self_attn = MoRAttention(config)
        self.mlp = MoRMLP(config)
        self.input_layernorm = _norms(config, separate_norms)
        self.post_attention_layernorm = _norms(config, separate_norms)
        self.update = update

    def forward(
        self,
        x: Tensor,
        keys: Tensor | None,
        values: Tensor | None,
        scope: Scope,
        name: str,
        recursion: int = 0,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The tokens (b, c, d) after the layer, and all keys and values of its own, if it has any.

        keys, values: of another recursion, to attend to. name: the layer's entry in the cache.
        """
        normed = _pick(self.input_layernorm, recursion)(x)
        own_keys = own_values = None
        if keys is None or self.update:
            own_keys, own_values = self.self_attn.keys_values(normed, scope)
            if scope.store is not None:
                own_keys, own_values = scope.store(name, own_keys, own_values)
        if keys is None:
            keys, values = own_keys, own_values
        elif self.update:
            keys, values = torch.cat([keys, own_keys], 2), torch.cat([values, own_values], 2)
        x = x + self.self_attn(normed, keys, values, scope)
        x = x + self.mlp(_pick(self.post_attention_layernorm, recursion)(x))
        return x, own_keys, own_values


def _norms(config: MoRConfig, separate: bool) -> nn.Module:
    if separate:
        return nn.ModuleList(MoRRMSNorm(config) for _ in range(config.num_recursions))
    return MoRRMSNorm(config)


def _pick(norms: nn.Module, recursion: int) -> nn.Module:
    return norms[recursion] if isinstance(norms, nn.ModuleList) else norms


class MoRRouterLinear(nn.Module):
    """A matrix that works in float32, whatever dtype it is stored in.

    No `nn.Linear`, so that quantisation and adapters for "all linear layers" leave routers alone.
    """

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)"""
        return F.linear(x, self.weight.float())


class MoRRouter(nn.Module):
    """Logits of tokens, `outputs` each, in float32 whatever the model's dtype."""

    def __init__(self, config: MoRConfig, outputs: int):
        super().__init__()
        width = config.hidden_size
        if config.router["arch"] == "linear":
            self.router = MoRRouterLinear(width, outputs)
        else:
            hidden, out = MoRRouterLinear(width, 2 * width), MoRRouterLinear(2 * width, outputs)
            self.router = nn.Sequential(hidden, nn.GELU(), out)

    def forward(self, x: Tensor) -> Tensor:
        """(b, l, d) -> (b, l, outputs)"""
        with torch.autocast(device_type=x.device.type, enabled=False):
            return self.router(x.float())


class MoRPreTrainedModel(PreTrainedModel):
    """What transformers has to know about these models."""

    config_class = MoRConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["MoRLayer"]
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, MoRRouterLinear):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, MoRModel) and module.router_bias is not None:
            nn.init.zeros_(module.router_bias)


@dataclasses.dataclass
class MoRModelOutput(BaseModelOutputWithPast):
    """depths: recursions that each token went through, (b, l); 0 for padding. None: no router.

    router_loss: weighted sum of the losses of the routers, under top-k routing; else None.
    """

    depths: Tensor | None = None
    router_loss: Tensor | None = None


@dataclasses.dataclass
class MoROutput(CausalLMOutputWithPast):
    """depths: recursions that each token went through, (b, l); 0 for padding. None: no router.

    router_loss: weighted sum of the losses of the routers, under top-k routing; else None.
    """

    depths: Tensor | None = None
    router_loss: Tensor | None = None


class MoRModel(MoRPreTrainedModel):
    """The decoder without its output projection."""

    def __init__(self, config: MoRConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = self.first = self.shared = self.last = None
        self.routers = self.aux_routers = self.router = None
        if config.sharing == "none":
            self.layers = nn.ModuleList(MoRLayer(config) for _ in range(config.num_hidden_layers))
        else:
            apart, update = not config.share_norms, config.kv_mode == "shared_update"
            slots = range(config.shared_layers)
            self.shared = nn.ModuleList(MoRLayer(config, apart, update) for _ in slots)
        if config.is_middle:
            self.first, self.last = MoRLayer(config), MoRLayer(config)
        self.norm = MoRRMSNorm(config)
        self.register_buffer("router_bias", None)
        self._add_routers()
        self.post_init()

    def _add_routers(self) -> None:
        config, nr = self.config, self.config.num_recursions
        if config.router["kind"] == "expert":
            self.routers = nn.ModuleList(MoRRouter(config, 1) for _ in range(nr))
            if config.router["aux"] == "aux_router":
                self.aux_routers = nn.ModuleList(MoRRouter(config, 1) for _ in range(nr))
        elif config.router["kind"] == "token":
            self.router = MoRRouter(config, nr)
            if config.router["balancing"] == "loss_free":
                self.register_buffer("router_bias", torch.zeros(nr))

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the token embedding."""
        self.embed_tokens = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        routing: str | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> MoRModelOutput | tuple:
        """Runs tokens (b, l), after those that the cache has seen.

        attention_mask: (b, l) or (b, seen + l), 0 at padding; padding may stand at either end.
        position_ids: of the rotary embedding; by default padding is not counted.
        past_key_values, cache: two names of one thing.
        routing: "causal" or "topk"; None: what the configuration says.
        hidden_states: after the embedding and every layer (routed models: every recursion as a
            whole), the last one after the final norm.

        Raises:
            ValueError: top-k routing with a cache; a mask, a cache or a keyword of an unknown kind;
                a cache whose tokens would be lost; several texts in a row; `output_attentions`.
        """
        if kwargs.get("output_attentions") or self.config.output_attentions:
            raise ValueError("output_attentions=True: attention weights are never computed whole")
        cache_position = kwargs.pop("cache_position", None)
        _refuse_unknown(kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        routing = self.config.routing if routing is None else routing
        _choose_from("routing", routing, ROUTINGS)
        cache = self._cache(_either(past_key_values, cache), use_cache, routing)
        _check_cache_position(cache_position, cache, x.shape[1])
        row = self._row(x, attention_mask, position_ids, cache)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        states = []
        keep = states.append if output_hidden_states else lambda x: None
        keep(x)
        for i, layer in enumerate(self.layers or ([] if self.first is None else [self.first])):
            x, _, _ = layer(x, None, None, row.scope, f"first.{i}")
            keep(x)
        depths = router_loss = None
        if self.shared is not None:
            x, depths, router_loss = self._recur(x, row, routing, keep)
        if self.last is not None:
            x, _, _ = self.last(x, None, None, row.scope, "last")
            keep(x)
        x = self.norm(x)
        hidden_states = (*states[:-1], x) if output_hidden_states else None
        out = MoRModelOutput(
            x, hidden_states=hidden_states, depths=depths, router_loss=router_loss, **{CACHE: cache}
        )
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return out if return_dict else out.to_tuple()

    def _cache(self, given: Cache | None, use_cache: bool | None, routing: str) -> MoRCache | None:
        if use_cache is None:
            use_cache = given is not None or (self.config.use_cache and not self.training)
        topk = self.config.router["kind"] != "none" and routing == "topk"
        if topk and given is not None and use_cache:
            raise ValueError(
                "routing='topk' looks at the whole row, so tokens cannot be added to it one after "
                "the other. Generate with routing='causal', or score whole rows with "
                "use_cache=False"
            )
        kept = use_cache and not topk and not self._checkpoints
        if isinstance(given, MoRCache) and kept:
            return given
        seen = 0 if given is None else given.get_seq_length()
        if seen and not kept:
            why = "use_cache=False" if not use_cache else "gradient checkpointing keeps no cache"
            raise ValueError(
                f"cache: holds {seen} tokens, which would be lost ({why}). Pass all tokens and no "
                "cache, or use_cache=True to a model that is evaluated"
            )
        if seen:
            raise ValueError(
                f"cache: is a {type(given).__name__}; these models keep other tokens at every "
                "recursion. Pass a MoRCache, or nothing"
            )
        if given is not None and kept:
            _check_first(given)
        return MoRCache() if kept else None

    @property
    def _checkpoints(self) -> bool:
        # A layer that is run again for its gradient would enter its keys twice; without gradients
        # none is, and a model in training mode generates like any other.
        layers = self.layers or self.shared
        return self.training and torch.is_grad_enabled() and layers[0].gradient_checkpointing

    def _row(
        self, x: Tensor, mask: Tensor | None, positions: Tensor | None, cache: MoRCache | None
    ) -> Row:
        (b, length), past = x.shape[:2], 0 if cache is None else cache.length
        real = _real(mask, past, length)
        if past:
            _check_past(mask, cache)
        keys = real
        if cache is not None and (real is not None or cache.real is not None):
            ones = partial(torch.ones, dtype=torch.bool, device=x.device)
            real = ones(b, length) if real is None else real
            before = ones(b, past) if cache.real is None else cache.real
            keys = torch.cat([before, real], 1)
        if positions is None:
            if keys is None:
                positions = torch.arange(past, past + length, device=x.device)[None]
            else:
                positions = (keys.cumsum(1) - 1).clamp(min=0)[:, past:]
        else:
            _check_positions(positions, real, length)
        cos, sin = rotary(self.config, positions)
        visible = None
        if keys is not None or (past and length > 1):
            places = torch.arange(past + length, device=x.device)
            visible = _visible(places[past:][None], past + length, keys)
        store = None
        if cache is not None:
            cache.length, cache.real = past + length, keys
            store = cache.extend
        return Row(Scope(cos, sin, visible, store), cache, past, real, keys)

    def _recur(
        self, x: Tensor, row: Row, routing: str, keep: Keep
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The recursion stage: its output, the depth of each token, the loss of the routers."""
        kind = self.config.router["kind"]
        if kind == "none":
            return self._recur_all(x, row, keep), None, None
        recur = self._recur_expert if kind == "expert" else self._recur_token
        return recur(x, row, routing, keep)

    def _recur_all(self, x: Tensor, row: Row, keep: Keep) -> Tensor:
        """Every token goes through every recursion."""
        config, first = self.config, {}
        slots, recursions = range(config.shared_layers), range(config.num_recursions)
        order = [(r, s) for r in recursions for s in slots]
        if config.sharing.endswith("sequence"):
            order = [(r, s) for s in slots for r in recursions]
        for r, s in order:
            keys, values = first.get(s, (None, None))
            x, k, v = self.shared[s](x, keys, values, row.scope, _shared_name(r, s), r)
            if r == 0 and config.kv_mode != "recursion":
                first[s] = (k, v)
            keep(x)
        return x

    def _recur_expert(
        self, x: Tensor, row: Row, routing: str, keep: Keep
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Expert-choice: x + gate * block(x) for the tokens that each recursion chooses."""
        router, depths = self.config.router, x.new_zeros(x.shape[:2], dtype=torch.long)
        active, kept, losses = row.real, None, []
        for r in range(self.config.num_recursions):
            logits = self.routers[r](x.float() / router["temperature"])[..., 0]
            score = _expert_score(router, logits)
            trained = logits
            if self.aux_routers is not None:
                trained = self.aux_routers[r](x.detach())[..., 0]
            level = self._choose(active, score, trained, r, routing)
            if routing == "topk":
                losses.append(_expert_loss(router, (logits, trained), active, level.chosen))
            active = level.chosen
            depths = depths + (1 if active is None else active.long())
            here, out, kept = self._block(x, level, row, r, kept)
            if out is not None:
                if router["gating"] == "weighted":
                    out = level.take(score[..., None]).to(out.dtype) * out
                x = level.put(x, here, here + out)
            keep(x)
        return x, depths, sum(losses) if losses else None

    def _choose(
        self, active: Tensor | None, score: Tensor, trained: Tensor, r: int, routing: str
    ) -> Level:
        """The tokens of expert-choice's next recursion, out of the active ones."""
        share, length = self.config.shares[r], score.shape[1]
        if routing == "causal":
            if share == 1.0:
                return Level(active)
            thresholds = self.config.thresholds
            passing = trained >= (0.0 if thresholds is None else thresholds[r])
            return Level.of(passing if active is None else passing & active)
        room = _whole(max(1, int(share * length)), length, self.config.router)
        return Level(active) if room == length else Level.of(_best(score, room, active))

    def _recur_token(
        self, x: Tensor, row: Row, routing: str, keep: Keep
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Token-choice: each token runs to its depth and leaves as x + weight * block output."""
        router, nr, length = self.config.router, self.config.num_recursions, x.shape[1]
        logits = self.router(x.float() / router["temperature"])
        weights = router["alpha"] * (
            logits.softmax(-1) if router["score"] == "softmax" else logits.sigmoid()
        )
        bias = 0.0 if self.router_bias is None else self.router_bias.float()
        choice = (weights + bias).argmax(-1)
        gate = weights.gather(-1, choice[..., None])
        depths, y = x.new_zeros(x.shape[:2], dtype=torch.long), x
        active, kept = row.real, None
        for r in range(nr):
            room = length
            if routing == "topk" and router["capacity_factor"] is not None:
                room = _room(router["capacity_factor"] * (nr - r) / nr * length, length)
                room = _whole(room, length, router)
            level = _admit(active, choice, gate[..., 0], r, room)
            active = level.chosen
            depths = depths + (1 if active is None else active.long())
            here, out, kept = self._block(y, level, row, r, kept)
            if out is not None:
                y = level.put(y, here, out)
            if r < nr - 1:
                keep(y)
        if router["gating"] == "weighted":
            y = gate.to(y.dtype) * y
        x = torch.where((depths > 0)[..., None], x + y, x)
        keep(x)
        if routing == "causal":
            return x, depths, None
        return x, depths, _token_loss(router, logits, weights, choice, row.real)

    def _block(
        self, x: Tensor, level: Level, row: Row, r: int, kept: list | None
    ) -> tuple[Tensor | None, Tensor | None, list | None]:
        """The level's tokens before and after the shared block; None after it: nobody entered.

        kept: keys and values of recursion 0 of every slot, where later recursions attend to them.
        """
        shares = self.config.kv_mode != "recursion"
        # Later recursions attend to every token's keys, so the first one computes them all.
        whole = level.index is None or (shares and r == 0)
        here = x if whole else level.take(x)
        scope = row.scope if whole else self._scope(level, row, r)
        if level.is_empty and not whole:
            return None, None, kept
        handed = kept if r > 0 and not (whole and self.config.kv_mode == "shared_update") else None
        out, own = here, []
        for s, layer in enumerate(self.shared):
            keys, values = (None, None) if handed is None else handed[s]
            out, k, v = layer(out, keys, values, scope, _shared_name(r, s), r)
            own.append((k, v))
        if r == 0 and shares:
            return level.take(x), level.take(out), own
        return here, out, kept

    def _scope(self, level: Level, row: Row, r: int) -> Scope:
        """What the tokens of a level see: each other, the whole row, or the row brought up to date.

        Enters the level's tokens in the cache's books.
        """
        index, mode = level.index, self.config.kv_mode
        places = index[..., None].expand(-1, -1, row.scope.cos.shape[-1])
        tables = (t.expand(len(index), -1, -1) for t in (row.scope.cos, row.scope.sin))
        cos, sin = (t.gather(1, places) for t in tables)
        among, store, entered = None, None, level.chosen
        if mode != "shared":
            among, store, entered = self._among(level, row, r)
        if mode == "recursion":
            return Scope(cos, sin, among, store)
        keys = row.past + level.chosen.shape[1]
        visible = _visible(row.past + index, keys, row.keys)
        if mode == "shared_update":
            if among is None:
                slots = torch.arange(index.shape[1], device=index.device)
                among = _visible(slots[None], index.shape[1], None)
            visible = visible & ~entered[:, None, None, :]
            among = among.expand(len(visible), -1, -1, -1)
            visible = torch.cat([visible, among], 3)
        return Scope(cos, sin, visible, store)

    def _among(
        self, level: Level, row: Row, r: int
    ) -> tuple[Tensor | None, Callable | None, Tensor]:
        """Mask of a level's tokens against all that ever entered it, how to keep them, and which
        tokens of the row those are.
        """
        cache, entered = row.cache, level.chosen
        if cache is None:
            # Fillers stand last, so that in causal order no token sees one.
            return None, None, entered
        start = entered.new_zeros(len(entered), dtype=torch.long)
        if r in cache.entered:
            start = cache.entered[r].sum(1)
            entered = torch.cat([cache.entered[r], entered], 1)
        cache.entered[r] = entered
        size, slots = int(entered.sum(1).max()), level.index.shape[1]
        rank = start[:, None] + torch.arange(slots, device=start.device)

        def store(name: str, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            return cache.pack(name, start, size, keys, values)

        return _visible(rank, size, None), store, entered


def _refuse_unknown(keywords: dict[str, Any]) -> None:
    """Raises `ValueError` on a keyword that is not known here.

    Releases of transformers rename theirs, and one that is lost changes the text without a word.
    """
    for name, value in keywords.items():
        if value is None or (isinstance(value, bool) and GRANTED.get(name) is value):
            continue
        if isinstance(value, Cache):
            raise ValueError(
                f"{name}={type(value).__name__}: a cache under this name would be lost, and the "
                f"text be wrong. Pass it as one of {CACHE_NAMES}"
            )
        if name == "token_type_ids" and not torch.compiler.is_compiling() and not value.any():
            # Many tokenizers add them; all 0 says that there is one text.
            continue
        shown = tuple(value.shape) if isinstance(value, Tensor) else value
        raise ValueError(
            f"{name}={shown!r}: these models know no such keyword, and it would have no effect. "
            "Leave it out"
        )


def _either(past_key_values: Cache | None, cache: Cache | None) -> Cache | None:
    """The cache, by whichever name it came."""
    given = cache if past_key_values is None else past_key_values
    if cache is not None and cache is not given:
        raise ValueError(
            "past_key_values and cache: two names of one thing, and two different caches. This "
            f"release of transformers ({transformers.__version__}) calls it {CACHE}; pass that one"
        )
    if given is not None and not isinstance(given, Cache):
        raise ValueError(f"cache={type(given).__name__}: must be a MoRCache. Pass one, or nothing")
    return given


def _check_first(given: Cache) -> None:
    """Raises `ValueError` if an empty cache of another kind comes a second time.

    `generate` hands one over at first and goes on with that of the output. Whoever goes on with the
    one they gave, which transformers' own models fill, would lose all tokens so far.
    """
    if getattr(given, "given_to_mor", False):
        raise ValueError(
            f"cache: this {type(given).__name__} was given before and stays empty. Go on with the "
            f"{CACHE} of the output, or begin with a MoRCache, which is filled in place"
        )
    given.given_to_mor = True


def _check_cache_position(places: Tensor | None, cache: MoRCache | None, length: int) -> None:
    """Raises `ValueError` unless the new tokens come right after those of the cache.

    places: (l,), which older releases pass along; None: nothing is said.
    """
    if places is None or torch.compiler.is_compiling():
        return
    past = 0 if cache is None else cache.length
    if places.shape != (length,) or int(places[0]) != past or int(places[-1]) != past + length - 1:
        raise ValueError(
            f"cache_position={places.tolist()}: the cache holds {past} tokens and {length} are "
            f"new, so it must be {past}, ..., {past + length - 1}. Leave it out"
        )


def _check_past(mask: Tensor | None, cache: MoRCache) -> None:
    """Raises `ValueError` if a mask says of tokens in the cache what they were not taken for."""
    if mask is None or mask.shape[1] <= cache.length or torch.compiler.is_compiling():
        return
    before = mask[:, : cache.length].bool()
    if bool((~before if cache.real is None else before != cache.real).any()):
        raise ValueError(
            "attention_mask: has other padding among the tokens of the cache than they were given "
            "with. Pass the same mask again, longer by the new tokens"
        )


def _check_positions(positions: Tensor, real: Tensor | None, length: int) -> None:
    """Raises `ValueError` if positions do not fit, or tell of several texts in one row."""
    if positions.dim() != 2 or positions.shape[1] != length:
        raise ValueError(
            f"position_ids has shape {tuple(positions.shape)}: needs (batch, {length}), one for "
            "each new token"
        )
    if length == 1 or torch.compiler.is_compiling():
        return
    back = positions[:, 1:] <= positions[:, :-1]
    if real is not None:
        back = back & real[:, 1:] & real[:, :-1]
    if bool(back.any()):
        raise ValueError(
            "position_ids: start again within a row, as for texts packed one after the other, "
            "which would see each other here. Give each text a row of its own, padded"
        )


def _real(mask: Tensor | None, past: int, length: int) -> Tensor | None:
    """Which of the new tokens are none of padding, (b, l); None: all of them."""
    if mask is None:
        return None
    if mask.dim() != 2 or mask.shape[1] not in (length, past + length):
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}: needs (batch, {length}), or (batch, "
            f"{past + length}) with the tokens seen before; 1 for a token, 0 for padding"
        )
    real = mask[:, -length:].bool()
    # A look at the values would break a compiled graph in two.
    if not torch.compiler.is_compiling() and bool(real.all()):
        return None
    return real


def _visible(places: Tensor, keys: int, real: Tensor | None) -> Tensor:
    """(b or 1, 1, c, keys): a query at `places` (b or 1, c) sees earlier keys that are `real`.

    It always sees itself, so that padding, whose results nobody reads, has something to see.
    """
    order = torch.arange(keys, device=places.device)
    visible = order <= places[..., None]
    if real is not None:
        visible = visible & (real[:, None, :] | (order == places[..., None]))
    return visible[:, None]


def _expert_score(router: dict[str, Any], logits: Tensor) -> Tensor:
    """alpha * sigmoid(z), alpha * tanh(z), or z itself."""
    if router["score"] == "sigmoid":
        return router["alpha"] * logits.sigmoid()
    return router["alpha"] * logits.tanh() if router["score"] == "tanh" else logits


def _expert_loss(
    router: dict[str, Any],
    logits: tuple[Tensor, Tensor],
    candidates: Tensor | None,
    chosen: Tensor | None,
) -> Tensor:
    """Weighted losses of one recursion's router, a mean over its candidates.

    logits: of the main router, and those that learn to predict the choice.
    """
    main, trained = logits
    here = torch.ones_like(main) if candidates is None else candidates.float()
    target = torch.ones_like(main) if chosen is None else chosen.float()
    weight = {"aux_loss": router["aux_coeff"], "aux_router": 1.0, "none": 0.0}[router["aux"]]
    bce = F.binary_cross_entropy_with_logits(trained, target, reduction="none")
    return ((weight * bce + router["z_coeff"] * main.square()) * here).sum() / here.sum()


def _token_loss(
    router: dict[str, Any], logits: Tensor, weights: Tensor, choice: Tensor, real: Tensor | None
) -> Tensor:
    """Weighted losses of token-choice's router, means over all tokens."""
    here = torch.ones_like(weights[..., 0]) if real is None else real.float()
    loss = router["z_coeff"] * (logits.logsumexp(-1).square() * here).sum() / here.sum()
    if router["balancing"] != "loss":
        return loss
    nr, here = weights.shape[-1], here[..., None]
    score = (weights * here).sum((0, 1)) / here.sum()
    share = (F.one_hot(choice, nr) * here).sum((0, 1)) / here.sum()
    return loss + router["balance_coeff"] * nr * (score * share).sum()


def _best(scores: Tensor, room: int, active: Tensor | None) -> Tensor:
    """(b, l): the `room` active tokens with the highest scores; of tied ones the earlier.

    Tied are scores within four units in the last place of the row's highest from the lowest that
    is chosen: rounding alone tells tokens that are equal apart.
    """
    scores = scores.detach().float()
    if active is not None:
        scores = scores.masked_fill(~active, -math.inf)
    ranked = torch.sort(scores, dim=1, descending=True).values
    lowest = ranked[:, room - 1 : room]
    margin = 4 * torch.finfo(torch.float32).eps * torch.maximum(ranked[:, :1].abs(), lowest.abs())
    margin = torch.where(margin.isfinite(), margin, 0.0)
    sure = scores > lowest + margin
    tied = (scores >= lowest - margin) & ~sure
    left = room - sure.sum(dim=1, keepdim=True)
    chosen = sure | (tied & (tied.cumsum(dim=1) <= left))
    return chosen if active is None else chosen & active


def _room(wanted: float, length: int) -> int:
    # The small term keeps a product such as 0.1 * 3 * 10 from rounding up past 3.
    return max(1, min(length, math.ceil(wanted - 1e-9)))


def _whole(room: int, length: int, router: dict[str, Any]) -> int:
    # Rounded up as in training, where kernels like whole tiles.
    multiple = router["capacity_multiple"] or 1
    return min(length, -(-room // multiple) * multiple)


def _admit(active: Tensor | None, choice: Tensor, gate: Tensor, r: int, room: int) -> Level:
    """The tokens of token-choice that want to go on and find room; the highest weights first."""
    length = choice.shape[1]
    if r == 0 and room == length:
        return Level(active)
    wanted = choice >= r
    if active is not None:
        wanted = wanted & active
    return Level.of(wanted if room == length else _best(gate, room, wanted))


def _targets(labels: Tensor, mask: Tensor | None) -> Tensor:
    """Labels without those of padding, and without those that padding would have to predict."""
    if mask is None:
        return labels
    real = mask[:, -labels.shape[1] :].bool()
    before = torch.cat([real[:, :1], real[:, :-1]], dim=1)
    return labels.masked_fill(~(real & before), -100)


def _weight(labels: Tensor, items: Tensor | int | None) -> Tensor | float:
    """Share of this batch in an optimiser step whose loss is divided by its `items` targets."""
    return 1.0 if items is None else (labels[:, 1:] != -100).sum() / items


class MoRForCausalLM(MoRPreTrainedModel, GenerationMixin):
    """The decoder with its output projection: logits, loss, `generate`."""

    # From release 5 on a mapping to the tensor that is stored, before a list.
    _tied_weights_keys = (
        {"lm_head.weight": "model.embed_tokens.weight"}
        if int(transformers.__version__.split(".")[0]) >= 5
        else ["lm_head.weight"]
    )

    def __init__(self, config: MoRConfig):
        super().__init__(config)
        self.model = MoRModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the token embedding."""
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        """The output projection."""
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replaces the output projection."""
        self.lm_head = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        routing: str | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> MoROutput | tuple:
        """As `MoRModel.forward`, and logits and loss.

        labels: (b, l) unshifted, -100 where there is no loss: position i learns label i + 1.
            Padding neither learns nor is learnt. In training mode under top-k routing the loss
            includes that of the routers.
        logits_to_keep: how many of the last positions, or which ones, get logits; 0: all.
        num_items_in_batch: targets that the loss is divided by, instead of those of this call.
        """
        out = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            routing=routing,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
            cache=cache,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            targets = _targets(labels, attention_mask)
            loss = self._text_loss(logits, targets, num_items_in_batch)
            if self.training and out.router_loss is not None:
                loss = loss + out.router_loss * _weight(labels, num_items_in_batch)
        made = MoROutput(
            loss=loss,
            logits=logits,
            hidden_states=out.hidden_states,
            depths=out.depths,
            router_loss=out.router_loss,
            **{CACHE: getattr(out, CACHE)},
        )
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return made if return_dict else made.to_tuple()

    def _text_loss(self, logits: Tensor, targets: Tensor, items: Tensor | int | None) -> Tensor:
        return self.loss_function(
            logits=logits,
            labels=targets,
            vocab_size=self.config.vocab_size,
            num_items_in_batch=items,
        )


MoRConfig.register_for_auto_class()
MoRForCausalLM.register_for_auto_class("AutoModelForCausalLM")
