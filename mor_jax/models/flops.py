"""Parameters, FLOPs and bytes of every model variant, per token and per recursion.

Conventions, the same everywhere: a multiply-add is 2 FLOPs. Only matrix products count: the
projections, attention scores and their products with values, the MLP, the routers and the output
head; norms, rotary embeddings, softmax, gathers and the embedding look-up do not. "Per token"
means per token of the sequence, also for work that only some of its tokens receive. Attention
counts all pairs of a query and a key; `causal=True` halves it, as a causal mask leaves about half
of the pairs.
The backward pass is twice the forward pass.

Every report has two counts. Routed: the tokens that the routers select; these are the model FLOPs
of an MFU or an isoFLOP budget. Computed: the tokens that the static shapes process; these are the
hardware FLOPs. They differ for token-choice routing and under rematerialisation.
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
    """Queries per block of blockwise attention; a block skips keys that no query of it can see."""
    return queries if queries <= 256 else 64.0 * math.ceil(queries / 512)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageFlops:
    """Forward FLOPs of one stage, per token of the sequence.

    name: `layers`, `first`, `recursion 0` .., `last`. layers: layers that the stage applies.
    share: fraction of the sequence's tokens that the stage processes, 0 .. 1. projections: query,
    key, value and output. attention: scores and weighted sums over all pairs, not halved. router:
    scores of the candidates of this stage.
    """

    name: str
    layers: int
    share: float
    projections: float
    attention: float
    mlp: float
    router: float = 0.0

    def forward(self, *, causal: bool = True) -> float:
        """FLOPs per token of the sequence; `causal` halves attention."""
        attention = self.attention / 2 if causal else self.attention
        return self.projections + attention + self.mlp + self.router


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlopReport:
    """FLOPs of one model at one sequence length, per token of the sequence.

    length: tokens of a sequence. routed: the stages in order, counted by routed tokens. computed:
    the same counted by static shapes, with attention as the implementation runs it (`xla`: all
    pairs; the others: the keys that a block of queries can see). head: the product with the output
    matrix. recomputed: what the backward pass computes a second time, due to `remat` and because
    fused attention recomputes its scores.
    """

    length: int
    routed: tuple[StageFlops, ...]
    computed: tuple[StageFlops, ...]
    head: float
    recomputed: float

    def forward(self, *, causal: bool = True, head: bool = True) -> float:
        """Model FLOPs of a forward pass; `head=False` excludes the output matrix."""
        stages = sum(stage.forward(causal=causal) for stage in self.routed)
        return stages + (self.head if head else 0.0)

    def training(self, *, causal: bool = True) -> float:
        """Model FLOPs of a training step: three forward passes, recomputation not counted."""
        return 3 * self.forward(causal=causal)

    def hardware(self) -> float:
        """FLOPs that a training step executes, including recomputation and padding slots."""
        forward = self.head + sum(stage.forward(causal=False) for stage in self.computed)
        return 3 * forward + self.recomputed


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByteReport:
    """Bytes of one model at one sequence length.

    parameters: the stored float32 weights. train_state: these and the two moments of AdamW.
    kv: cache per token of the sequence in the compute dtype, for the routed fractions.
    activations: per token of the sequence, what the stages save for the backward pass
    (`activation_bytes`). logits: float32 logits per token of the sequence.
    """

    parameters: int
    train_state: int
    kv: float
    activations: float
    logits: int


def routed_shares(cfg: ModelConfig, length: int) -> tuple[float, ...]:
    """Expected fraction of a sequence's tokens that each recursion selects, 0 .. 1.

    Expert-choice: `capacity_tokens` over the length. Token-choice: (Nr - r) / Nr, as for perfectly
    balanced depths. Unrouted models: 1.
    """
    if cfg.router.kind == "token":
        return tuple(
            (cfg.num_recursions - r) / cfg.num_recursions for r in range(cfg.num_recursions)
        )
    return computed_shares(cfg, length)


def computed_shares(cfg: ModelConfig, length: int) -> tuple[float, ...]:
    """Fraction of a sequence's tokens that the static shapes of each recursion process, 0 .. 1.

    Equals `routed_shares` except for token-choice, which without a capacity factor allocates slots
    for all tokens at every recursion.
    """
    return tuple(count / length for count in capacity_tokens(cfg, length))


def flops(cfg: ModelConfig, length: int, shares: tuple[float, ...] | None = None) -> FlopReport:
    """FLOPs per token of a sequence of `length` tokens.

    shares: measured fraction of tokens that each recursion selected, in place of `routed_shares`;
    for logging. Attention then uses their mean, which slightly undercounts unevenly routed
    sequences. Raises ValueError unless there is one fraction per recursion, each in [0, 1].
    """
    if shares is None:
        shares = routed_shares(cfg, length)
    rule = f"needs one fraction in [0, 1] per recursion ({cfg.num_recursions})"
    ok = len(shares) == cfg.num_recursions and all(0 <= share <= 1 for share in shares)
    check(ok, "shares", shares, rule, "Divide the selected tokens by the tokens of the sequence")
    computed = _stages(cfg, length, computed_shares(cfg, length), blocks=cfg.attention != "xla")
    return FlopReport(
        length=length,
        routed=_stages(cfg, length, tuple(shares), blocks=False),
        computed=computed,
        head=2.0 * cfg.hidden_size * cfg.vocab_size,
        recomputed=sum(_recomputed(cfg, stage) for stage in computed),
    )


def _recomputed(cfg: ModelConfig, stage: StageFlops) -> float:
    """FLOPs per token of the sequence that the backward pass of `stage` recomputes.

    Blocked attention recomputes its scores; `xla` saves only its inputs and recomputes everything.
    `block` recomputes the MLP's first two products. `full` and `offload` recompute every
    checkpointed body except its last product, whose result no gradient needs.
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
    """Fractions of a sequence in one stage.

    share: tokens that are processed, as queries. keys: tokens that can be attended to. fresh:
    tokens whose keys and values are newly projected.
    """

    share: float = 1.0
    keys: float = 1.0
    fresh: float = 1.0


def _loads(cfg: ModelConfig, shares: tuple[float, ...]) -> list[_Load]:
    """One `_Load` per recursion.

    With KV sharing the first recursion produces the keys of the whole sequence, so it processes
    every token even if its router selects fewer.
    """
    if cfg.kv_mode == "recursion":
        return [_Load(share=share, keys=share, fresh=share) for share in shares]
    fresh = 1.0 if cfg.kv_mode == "shared_update" else 0.0
    return [_Load()] + [_Load(share=share, keys=1.0, fresh=fresh * share) for share in shares[1:]]


def _stages(
    cfg: ModelConfig, length: int, shares: tuple[float, ...], *, blocks: bool
) -> tuple[StageFlops, ...]:
    """All stages; `blocks` excludes keys that no query of an attention block can see."""

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
    """FLOPs of the router before recursion `r`; token-choice scores all depths before the first."""
    if cfg.router.kind == "expert":
        candidates = 1.0 if r == 0 else shares[r - 1]
        return 2.0 * candidates * scorers(cfg) * scorer_weights(cfg, 1)
    if cfg.router.kind == "token" and r == 0:
        return 2.0 * scorer_weights(cfg, cfg.num_recursions)
    return 0.0


def kv_bytes(cfg: ModelConfig, length: int, shares: tuple[float, ...] | None = None) -> float:
    """Bytes of cached keys and values per token of the sequence, in the compute dtype.

    Recursion-wise caching stores one pair per layer and recursion that processed the token; KV
    sharing one per shared layer; updated sharing those of recursion 0 and, at every later
    recursion, the new ones of its tokens. shares: as in `flops`; all ones give a dense cache.
    """
    pair = 2 * cfg.num_kv_heads * cfg.head_dim * _ITEMSIZE[cfg.dtype]
    if cfg.sharing == "none":
        return float(cfg.num_layers * pair)
    shares = routed_shares(cfg, length) if shares is None else shares
    pairs = sum(load.fresh for load in _loads(cfg, shares))
    return pair * (2 * cfg.is_middle + cfg.shared_layers * pairs)


def activation_bytes(cfg: ModelConfig, length: int) -> float:
    """Activations saved for the backward pass, in bytes per token of the sequence.

    With `remat="none"`, per layer and processed token, in the compute dtype: the layer's input and
    its sum with attention (2 d), the MLP's gate and up (2 f), queries and the output of attention
    (2 h k), new keys and values (2 g k), and a float32 normaliser per query and head; everything
    else is recomputed, by `xla` attention also its output and normaliser. With `block`, gate and up
    of one layer at a time; with `full`, every layer's input and the rest for one layer at a time;
    with `offload`, the inputs are on the host as well.
    Not counted: embedding, head, router scores, copies of gathered tokens, temporaries.
    """
    e, saved, peak = _ITEMSIZE[cfg.dtype], 0.0, 0.0
    for load, layers in _layers_of(cfg, length):
        inner = e * load.share * 2 * (cfg.hidden_size + cfg.intermediate_size)
        inner += load.share * cfg.num_heads * e * cfg.head_dim
        inner += load.fresh * e * 2 * cfg.num_kv_heads * cfg.head_dim
        if cfg.attention != "xla":
            inner += load.share * cfg.num_heads * (e * cfg.head_dim + 4)
        inputs = e * load.share * cfg.hidden_size
        wide = e * load.share * 2 * cfg.intermediate_size
        each = {"none": inner, "block": inner - wide, "full": inputs, "offload": 0.0}[cfg.remat]
        saved += each * layers
        recomputed = {"none": 0.0, "block": wide, "full": inner, "offload": inner + inputs}[
            cfg.remat
        ]
        peak = max(peak, recomputed)
    return saved + peak


def _layers_of(cfg: ModelConfig, length: int) -> list[tuple[_Load, int]]:
    """Load and number of layers of every stage, by static shapes."""
    if cfg.sharing == "none":
        return [(_Load(), cfg.num_layers)]
    shared = [(load, cfg.shared_layers) for load in _loads(cfg, computed_shares(cfg, length))]
    return shared + [(_Load(), 1)] * (2 * cfg.is_middle)


def memory(cfg: ModelConfig, length: int) -> ByteReport:
    """Every byte count of the model at sequences of `length` tokens."""
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
