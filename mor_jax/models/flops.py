"""Parameters, FLOPs and bytes of every model variant, per token and per recursion.

Conventions, the same everywhere. A multiply-add is 2 FLOPs. Only matrix products count: the
projections, attention's scores and mixing, the MLP, the routers and the output head; norms,
rotary turns, softmax, gathers and the embedding look-up do not. "Per token" means per token of
the row, also for work that only some tokens of the row receive. Attention is held for all pairs
of a query and a key; `causal=True` halves it, as a causal mask leaves about half of the pairs.
The backward pass is twice the forward pass.

Two counts go side by side. Routed: the tokens that the routers send on, the model FLOPs that an
MFU or an isoFLOP budget is made of. Computed: the tokens that the static shapes process, the
hardware FLOPs; they differ for token-choice routing and under rematerialisation.
"""

import dataclasses
import math

from mor_jax.config import ModelConfig
from mor_jax.config.parsing import check
from mor_jax.models.param_count import (
    effective_parameters,
    key_value_weights,
    query_output_weights,
    scorer_weights,
    scorers,
    unique_parameters,
)
from mor_jax.models.routing.router import capacity_tokens

_ITEMSIZE = {"bfloat16": 2, "float32": 4}


def _tile(queries: float) -> float:
    """Queries that blockwise attention handles at once, which decides what it skips."""
    return queries if queries <= 256 else 64.0 * math.ceil(queries / 512)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageFlops:
    """Forward work of one stage, in FLOPs per token of the row.

    name: `layers`, `first`, `recursion 0` .., `last`. layers: layers that the stage applies.
    share: share of the row's tokens that go through them, 0 .. 1. projections: query, key, value
    and output. attention: scores and mixing over all pairs, not halved. router: scoring the
    candidates of this stage.
    """

    name: str
    layers: int
    share: float
    projections: float
    attention: float
    mlp: float
    router: float = 0.0

    def forward(self, *, causal: bool = True) -> float:
        """FLOPs per token of the row; `causal` halves attention."""
        attention = self.attention / 2 if causal else self.attention
        return self.projections + attention + self.mlp + self.router


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlopReport:
    """FLOPs of one model at one row length, per token of the row.

    length: tokens of a row. routed: the stages in order, by the tokens routed. computed: the same
    by static shapes, with attention as the implementation runs it (`xla`: all pairs; the others:
    the keys that a block of queries can reach). head: the product with the output matrix.
    recomputed: what the backward pass runs a second time, because of `remat` and because fused
    attention makes its scores again.
    """

    length: int
    routed: tuple[StageFlops, ...]
    computed: tuple[StageFlops, ...]
    head: float
    recomputed: float

    def forward(self, *, causal: bool = True, head: bool = True) -> float:
        """Model FLOPs of a forward pass; `head` False leaves the output matrix out."""
        stages = sum(stage.forward(causal=causal) for stage in self.routed)
        return stages + (self.head if head else 0.0)

    def training(self, *, causal: bool = True) -> float:
        """Model FLOPs of a training step: three forward passes, recomputation not counted."""
        return 3 * self.forward(causal=causal)

    def hardware(self) -> float:
        """FLOPs that a training step executes, recomputation and filler slots included."""
        forward = self.head + sum(stage.forward(causal=False) for stage in self.computed)
        return 3 * forward + self.recomputed


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByteReport:
    """Bytes of one model at one row length.

    parameters: of the stored float32 weights. train_state: with the two moments of AdamW.
    kv: cache per token of the row in the compute dtype, for the shares routed on. activations:
    per token of the row, what the stages keep for the backward pass (`activation_bytes`).
    logits: per token of the row, one float32 row of the vocabulary.
    """

    parameters: int
    train_state: int
    kv: float
    activations: float
    logits: int


def routed_shares(cfg: ModelConfig, length: int) -> tuple[float, ...]:
    """Share of a row's tokens that each recursion takes, 0 .. 1, before any step is run.

    Expert-choice: `capacity_tokens` over the length. Token-choice: (Nr - r) / Nr, what perfectly
    balanced depths give. Unrouted models: 1.
    """
    if cfg.router.kind == "token":
        return tuple(
            (cfg.num_recursions - r) / cfg.num_recursions for r in range(cfg.num_recursions)
        )
    return computed_shares(cfg, length)


def computed_shares(cfg: ModelConfig, length: int) -> tuple[float, ...]:
    """Share of a row's tokens that the static shapes of each recursion process, 0 .. 1.

    They equal the routed shares but for token-choice, which without a capacity factor makes room
    for all tokens at every recursion.
    """
    return tuple(count / length for count in capacity_tokens(cfg, length))


def flops(cfg: ModelConfig, length: int, shares: tuple[float, ...] | None = None) -> FlopReport:
    """FLOPs per token of a row of `length` tokens.

    shares: realised share of tokens that each recursion took, in place of `routed_shares`; for
    logging. Attention then uses their mean, so rows routed unevenly are slightly undercounted.
    Raises ValueError unless there is one share per recursion, each in [0, 1].
    """
    if shares is None:
        shares = routed_shares(cfg, length)
    rule = f"needs one share in [0, 1] per recursion ({cfg.num_recursions})"
    ok = len(shares) == cfg.num_recursions and all(0 <= share <= 1 for share in shares)
    check(ok, "shares", shares, rule, "Pass the tokens that went on over the tokens of the row")
    computed = _stages(cfg, length, computed_shares(cfg, length), blocks=cfg.attention != "xla")
    return FlopReport(
        length=length,
        routed=_stages(cfg, length, tuple(shares), blocks=False),
        computed=computed,
        head=2.0 * cfg.hidden_size * cfg.vocab_size,
        recomputed=sum(_recomputed(cfg, stage) for stage in computed),
    )


def _recomputed(cfg: ModelConfig, stage: StageFlops) -> float:
    """FLOPs per token of the row that the backward pass of `stage` repeats.

    Blocked attention makes its scores again; `xla` keeps no more than its inputs, so all of it is
    made again. `block` runs the MLP's first two products again. `full` and `offload` run every
    checkpointed body again, but for the last product: no gradient needs its result.
    """
    last = f"recursion {cfg.num_recursions - 1}"
    # The sequence schemes checkpoint all recursions of a layer as one body.
    ends_body = not cfg.is_sequence or stage.name in (last, "first", "last")
    down = stage.mlp / 3
    layers = stage.forward(causal=False) - stage.router
    if cfg.remat in ("none", "block"):
        again = stage.attention if cfg.attention == "xla" else 0.0
        again += 0.0 if ends_body else down
        again += 2 * down if cfg.remat == "block" else 0.0
    else:
        again = layers - (down if ends_body else 0.0)
    return again + (0.0 if cfg.attention == "xla" else stage.attention / 2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Load:
    """Shares of a row in one stage: tokens that ask, that answer and that are projected anew."""

    share: float = 1.0
    keys: float = 1.0
    fresh: float = 1.0


def _loads(cfg: ModelConfig, shares: tuple[float, ...]) -> list[_Load]:
    """One per recursion.

    With KV sharing the first one yields keys for the whole row, so it processes every token even
    where its router keeps fewer.
    """
    if cfg.kv_mode == "recursion":
        return [_Load(share=share, keys=share, fresh=share) for share in shares]
    fresh = 1.0 if cfg.kv_mode == "shared_update" else 0.0
    return [_Load()] + [_Load(share=share, keys=1.0, fresh=fresh * share) for share in shares[1:]]


def _stages(
    cfg: ModelConfig, length: int, shares: tuple[float, ...], *, blocks: bool
) -> tuple[StageFlops, ...]:
    """All stages; with `blocks`, attention leaves out keys that no query of a block can see."""

    def stage(name: str, layers: int, load: _Load, router: float = 0.0) -> StageFlops:
        keys = load.keys
        if blocks:
            keys -= (load.share - min(load.share, _tile(load.share * length) / length)) / 2
        linear = load.share * query_output_weights(cfg) + load.fresh * key_value_weights(cfg)
        return StageFlops(
            name=name,
            layers=layers,
            share=load.share,
            projections=2.0 * layers * linear,
            attention=4.0 * layers * load.share * keys * length * cfg.num_heads * cfg.head_dim,
            mlp=6.0 * layers * load.share * cfg.hidden_size * cfg.intermediate_size,
            router=router,
        )

    if cfg.sharing == "none":
        return (stage("layers", cfg.num_layers, _Load()),)
    rows = [
        stage(f"recursion {r}", cfg.shared_layers, load, _router_flops(cfg, r, shares))
        for r, load in enumerate(_loads(cfg, shares))
    ]
    if not cfg.is_middle:
        return tuple(rows)
    return (stage("first", 1, _Load()), *rows, stage("last", 1, _Load()))


def _router_flops(cfg: ModelConfig, r: int, shares: tuple[float, ...]) -> float:
    """Scoring before recursion `r`: its candidates; all depths at once for token-choice."""
    if cfg.router.kind == "expert":
        candidates = 1.0 if r == 0 else shares[r - 1]
        return 2.0 * candidates * scorers(cfg) * scorer_weights(cfg, 1)
    if cfg.router.kind == "token" and r == 0:
        return 2.0 * scorer_weights(cfg, cfg.num_recursions)
    return 0.0


def kv_bytes(cfg: ModelConfig, length: int, shares: tuple[float, ...] | None = None) -> float:
    """Bytes of keys and values that decoding keeps per token of the row, in the compute dtype.

    Recursion-wise caching keeps one pair per layer and recursion that the token went through; KV
    sharing one per shared layer; updated sharing recursion 0's and, at every later recursion, the
    fresh ones of its tokens. shares: as in `flops`; all ones give the room of a dense cache.
    """
    pair = 2 * cfg.num_kv_heads * cfg.head_dim * _ITEMSIZE[cfg.dtype]
    if cfg.sharing == "none":
        return float(cfg.num_layers * pair)
    shares = routed_shares(cfg, length) if shares is None else shares
    kept = sum(load.fresh for load in _loads(cfg, shares))
    return pair * (2 * cfg.is_middle + cfg.shared_layers * kept)


def activation_bytes(cfg: ModelConfig, length: int) -> float:
    """What the stages keep for the backward pass, in bytes per token of the row.

    With `remat="none"`, per layer and processed token, in the compute dtype: the layer's input and
    its sum with attention (2 d), the MLP's gate and up (2 f), queries and attention's result
    (2 h k), new keys and values (2 g k), and a float32 normaliser per query and head; everything
    else is made again, by `xla` attention its result and normaliser too. With `block` the gate and
    up of one layer at a time; with `full` every layer's input and the rest for one layer at a time;
    with `offload` the inputs too are on the host.
    Not counted: embedding, head, router scores, copies of gathered tokens, temporaries.
    """
    e, kept, peak = _ITEMSIZE[cfg.dtype], 0.0, 0.0
    for load, layers in _layers_of(cfg, length):
        inner = e * load.share * 2 * (cfg.hidden_size + cfg.intermediate_size)
        inner += load.share * cfg.num_heads * e * cfg.head_dim
        inner += load.fresh * e * 2 * cfg.num_kv_heads * cfg.head_dim
        if cfg.attention != "xla":
            inner += load.share * cfg.num_heads * (e * cfg.head_dim + 4)
        inputs = e * load.share * cfg.hidden_size
        wide = e * load.share * 2 * cfg.intermediate_size
        each = {"none": inner, "block": inner - wide, "full": inputs, "offload": 0.0}[cfg.remat]
        kept += each * layers
        again = {"none": 0.0, "block": wide, "full": inner, "offload": inner + inputs}[cfg.remat]
        peak = max(peak, again)
    return kept + peak


def _layers_of(cfg: ModelConfig, length: int) -> list[tuple[_Load, int]]:
    """Load and number of layers of every stage, by static shapes."""
    if cfg.sharing == "none":
        return [(_Load(), cfg.num_layers)]
    shared = [(load, cfg.shared_layers) for load in _loads(cfg, computed_shares(cfg, length))]
    return shared + [(_Load(), 1)] * (2 * cfg.is_middle)


def memory(cfg: ModelConfig, length: int) -> ByteReport:
    """Every byte count of the model at rows of `length` tokens."""
    stored = 4 * unique_parameters(cfg)
    return ByteReport(
        parameters=stored,
        train_state=3 * stored,
        kv=kv_bytes(cfg, length),
        activations=activation_bytes(cfg, length),
        logits=4 * cfg.vocab_size,
    )


__all__ = [
    "ByteReport",
    "FlopReport",
    "StageFlops",
    "activation_bytes",
    "computed_shares",
    "effective_parameters",
    "flops",
    "kv_bytes",
    "memory",
    "routed_shares",
    "unique_parameters",
]
