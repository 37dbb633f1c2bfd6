"""The typed side of configuration: frozen dataclasses, parsing, validation.

`TrainConfig.from_dict` is the one place where a plain dictionary becomes typed. An unknown key, a
value of another type or out of range raises `ValueError` with the setting's path, its value, the
rule and a fix. Values that follow from others are properties, never stored twice.
"""

import dataclasses
import itertools
from typing import Any, Literal

from mor_jax.parsing import check, fail, parse

Sharing = Literal["none", "cycle", "sequence", "middle_cycle", "middle_sequence"]
KVMode = Literal["recursion", "shared", "shared_update"]
Attention = Literal["auto", "xla", "blockwise", "cudnn", "splash"]
Remat = Literal["none", "block", "full"]


def _positive(path: str, cfg: Any, *names: str) -> None:
    for name in names:
        value = getattr(cfg, name)
        check(value > 0, f"{path}.{name}", value, "must be greater than 0", "Try a positive value")


def _not_negative(path: str, cfg: Any, *names: str) -> None:
    for name in names:
        value = getattr(cfg, name)
        check(value >= 0, f"{path}.{name}", value, "must not be negative", "Use 0 to switch it off")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """Routing of tokens through recursions (paper section 2.2).

    `expert`: at each recursion the best `capacities[r]` of the tokens still active go on.
    `token`: each token chooses its depth once.
    """

    kind: Literal["none", "expert", "token"] = "none"
    arch: Literal["linear", "mlp"] = "linear"
    score: Literal["sigmoid", "tanh", "none", "softmax"] = "sigmoid"
    alpha: float = 0.1
    temperature: float = 1.0
    gating: Literal["weighted", "additive"] = "weighted"
    z_coeff: float = 0.0
    # Expert-choice. None capacities: (Nr - r) / Nr.
    capacities: tuple[float, ...] | None = None
    capacity_warmup_steps: int = 0
    capacity_warmup_levels: int = 8
    aux: Literal["aux_loss", "aux_router", "none"] = "aux_loss"
    aux_coeff: float = 0.001
    # Token-choice. None capacity factor: room for every token at every recursion, exact.
    balancing: Literal["loss", "loss_free", "none"] = "loss"
    balance_coeff: float = 0.1
    balance_warmup_steps: int = 0
    bias_rate: float = 0.001
    capacity_factor: float | None = None

    def validate(self, path: str, recursions: int) -> None:
        """Raises `ValueError` on a setting out of range for `recursions` recursions."""
        if self.kind == "none":
            return
        _positive(path, self, "alpha", "temperature", "capacity_warmup_levels")
        _not_negative(path, self, "z_coeff", "aux_coeff", "balance_coeff", "bias_rate")
        _not_negative(path, self, "capacity_warmup_steps", "balance_warmup_steps")
        allowed = {"expert": ("sigmoid", "tanh", "none"), "token": ("softmax", "sigmoid")}[
            self.kind
        ]
        rule = f"{self.kind}-choice routing takes one of {allowed}"
        check(self.score in allowed, f"{path}.score", self.score, rule, f"Try {allowed[0]!r}")
        if self.kind == "expert":
            self._validate_capacities(f"{path}.capacities", recursions)
        elif self.capacity_factor is not None:
            _positive(path, self, "capacity_factor")

    def _validate_capacities(self, path: str, recursions: int) -> None:
        shares = self.capacities
        if shares is None:
            return
        fix = f"Leave it None for {tuple(round(1 - r / recursions, 3) for r in range(recursions))}"
        rule = f"needs one share per recursion ({recursions})"
        check(len(shares) == recursions, path, shares, rule, fix)
        for r, share in enumerate(shares):
            rule = "must be in (0, 1]; it is the share of tokens kept at this recursion"
            check(0 < share <= 1, f"{path}[{r}]", share, rule, "Try 0.5")
        falling = all(a >= b for a, b in itertools.pairwise(shares))
        rule = "must not increase: a recursion keeps some of the tokens of the one before"
        check(falling, path, shares, rule, f"Try {tuple(sorted(shares, reverse=True))}")

    def shares(self, recursions: int) -> tuple[float, ...]:
        """Share of the row's tokens that each recursion keeps, in [0, 1]."""
        if self.kind != "expert":
            return (1.0,) * recursions
        return self.capacities or tuple((recursions - r) / recursions for r in range(recursions))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A Llama-style decoder whose middle may be one block applied `recursions` times.

    `layers` counts effective layers (what a plain model of the same depth would hold).
    """

    vocab_size: int = 256
    width: int = 256
    layers: int = 8
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 32
    mlp_width: int = 704
    max_length: int = 2048
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    init_std: float = 0.02
    tie_embeddings: bool = True
    sharing: Sharing = "none"
    recursions: int = 1
    share_norms: bool = True
    kv: KVMode = "recursion"
    router: RouterConfig = RouterConfig()
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    attention: Attention = "auto"
    remat: Remat = "none"

    @property
    def is_middle(self) -> bool:
        """Whether the first and the last layer stand outside the shared block."""
        return self.sharing.startswith("middle")

    @property
    def is_sequence(self) -> bool:
        """Whether each shared layer is repeated before the next one runs."""
        return self.sharing.endswith("sequence")

    @property
    def shared_layers(self) -> int:
        """Layers held by the shared block; for a plain model all of them."""
        return (self.layers - 2 * self.is_middle) // self.recursions

    @property
    def unique_layers(self) -> int:
        """Layers whose weights are stored."""
        return self.shared_layers + 2 * self.is_middle

    def validate(self, path: str = "model") -> None:
        """Raises `ValueError` on a setting out of range or two that do not fit together."""
        _positive(path, self, "vocab_size", "width", "layers", "heads", "kv_heads", "head_dim")
        _positive(path, self, "mlp_width", "max_length", "rope_theta", "norm_eps", "recursions")
        _not_negative(path, self, "init_std")
        rule = f"must divide heads={self.heads}; each key/value head serves the same number"
        divisors = [g for g in range(1, self.heads + 1) if self.heads % g == 0]
        nearest = min(divisors, key=lambda g: abs(g - self.kv_heads))
        ok = self.heads % self.kv_heads == 0
        check(ok, f"{path}.kv_heads", self.kv_heads, rule, f"Try {nearest}")
        rule = "must be even: the rotary embedding turns pairs of channels"
        check(self.head_dim % 2 == 0, f"{path}.head_dim", self.head_dim, rule, "Try 64")
        self._validate_sharing(path)
        self.router.validate(f"{path}.router", self.recursions)

    def _validate_sharing(self, path: str) -> None:
        routed = self.router.kind != "none"
        if self.sharing == "none":
            rule = "a plain model (sharing='none') runs its layers once"
            fix = "Set model.sharing='middle_cycle' or recursions=1"
            check(self.recursions == 1, f"{path}.recursions", self.recursions, rule, fix)
            rule = "routing needs a shared block"
            check(not routed, f"{path}.router.kind", self.router.kind, rule, fix)
            rule = "sharing keys and values needs a shared block"
            check(self.kv == "recursion", f"{path}.kv", self.kv, rule, "Use 'recursion'")
            return
        ends, nr = 2 * self.is_middle, self.recursions
        middle = self.layers - ends
        below = max(middle // nr, 1) * nr + ends
        rule = f"{self.sharing} with recursions={nr} needs {ends} + a multiple of {nr} layers"
        fix = f"The nearest counts are {below} and {below + nr}"
        ok = middle > 0 and middle % nr == 0
        check(ok, f"{path}.layers", self.layers, rule, fix)
        if routed:
            rule = "routed models repeat the whole block: cycle or middle_cycle"
            check(not self.is_sequence, f"{path}.sharing", self.sharing, rule, "Try 'middle_cycle'")
        if self.kv == "shared_update":
            rule = "without routing every key and value would be updated, so nothing is shared"
            check(routed, f"{path}.kv", self.kv, rule, "Use 'shared' or 'recursion'")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its schedule. Step counts are optimiser steps."""

    lr: float = 3e-3
    schedule: Literal["trapezoid", "cosine", "constant"] = "trapezoid"
    warmup_steps: int = 100
    decay_steps: int = 200
    final_lr_ratio: float = 0.0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    router_lr_ratio: float = 10.0
    max_skipped_steps: int = 10

    def validate(self, path: str, steps: int) -> None:
        """Raises `ValueError` on a setting out of range for a run of `steps` steps."""
        _positive(path, self, "lr", "eps", "clip_norm", "router_lr_ratio", "max_skipped_steps")
        _not_negative(path, self, "warmup_steps", "decay_steps", "final_lr_ratio", "weight_decay")
        for name in ("b1", "b2"):
            value = getattr(self, name)
            check(0 <= value < 1, f"{path}.{name}", value, "must be in [0, 1)", "Try 0.9")
        ramps = self.warmup_steps + (self.decay_steps if self.schedule == "trapezoid" else 0)
        rule = f"warm-up and decay together ({ramps}) must fit into steps={steps}"
        fix = f"Try warmup_steps={steps // 20} and decay_steps={steps // 5}"
        check(ramps <= steps, f"{path}.warmup_steps", self.warmup_steps, rule, fix)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read, how it is tokenised and packed. docs/data.md explains every source.

    sources: `stdlib`, `text:GLOB`, `jsonl:GLOB`, `parquet:GLOB`, `tfds:NAME[:SPLIT]`,
        `tfds:DIR[:SPLIT]`, `shards:DIR`; one weight each, normalised.
    """

    sources: tuple[str, ...] = ("stdlib",)
    weights: tuple[float, ...] | None = None
    text_key: str = "text"
    tokenizer: str = "bytes"
    within_documents: bool = False
    heldout_share: float = 0.01
    shuffle: bool = True
    seed: int = 0
    workers: int = 0
    prefetch: int = 2

    def validate(self, path: str) -> None:
        """Raises `ValueError` on a setting out of range."""
        check(bool(self.sources), f"{path}.sources", self.sources, "is empty", "Try ('stdlib',)")
        if self.weights is not None:
            rule = f"needs one positive weight per source ({len(self.sources)})"
            ok = len(self.weights) == len(self.sources) and all(w > 0 for w in self.weights)
            check(ok, f"{path}.weights", self.weights, rule, "Leave it None for equal weights")
        rule = "must be in (0, 0.5]; it is the share of documents kept for evaluation"
        ok = 0 < self.heldout_share <= 0.5
        check(ok, f"{path}.heldout_share", self.heldout_share, rule, "Try 0.01")
        _not_negative(path, self, "seed", "workers", "prefetch")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation on held-out text. `every`: steps between two; None: only at the end."""

    every: int | None = 100
    batches: int = 8
    batch_size: int = 8
    prompt: str = "def "
    completion_tokens: int = 160

    def validate(self, path: str) -> None:
        """Raises `ValueError` on a setting out of range."""
        _positive(path, self, "batches", "batch_size")
        _not_negative(path, self, "completion_tokens")
        if self.every is not None:
            _positive(path, self, "every")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When a checkpoint is written and which stay. `every`: steps; None: only at the end."""

    every: int | None = 200
    keep: int = 2
    keep_every: int | None = None

    def validate(self, path: str) -> None:
        """Raises `ValueError` on a setting out of range."""
        _positive(path, self, "keep")
        for name in ("every", "keep_every"):
            if getattr(self, name) is not None:
                _positive(path, self, name)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Metrics go to `metrics.jsonl` always; TensorBoard and Weights & Biases when asked."""

    every: int = 10
    tensorboard: bool = False
    wandb_project: str | None = None

    def validate(self, path: str) -> None:
        """Raises `ValueError` on a setting out of range."""
        _positive(path, self, "every")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices per mesh axis; at most one may be None, which means the rest."""

    data: int | None = None
    fsdp: int | None = 1
    tensor: int | None = 1

    def validate(self, path: str) -> None:
        """Raises `ValueError` on a setting out of range."""
        sizes = dataclasses.asdict(self)
        rest = [name for name, size in sizes.items() if size is None]
        rule = "at most one axis may be None (the rest of the devices)"
        check(len(rest) <= 1, f"{path}.{rest[-1] if rest else 'data'}", None, rule, "Set it to 1")
        for name, size in sizes.items():
            check(size is None or size > 0, f"{path}.{name}", size, "must be positive", "Try 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that a training run depends on.

    batch_size: rows of a step over all devices, split into `accumulate` micro-batches.
    loss_chunk: positions of each row whose logits exist at one time; None: all of them.
    """

    steps: int = 1000
    batch_size: int = 8
    length: int = 256
    accumulate: int = 1
    loss_chunk: int | None = 128
    loss_z_coeff: float = 0.0
    seed: int = 0
    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    data: DataConfig = DataConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    mesh: MeshConfig = MeshConfig()

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainConfig":
        """Parses and validates nested plain values. Raises `ValueError` on any misfit."""
        cfg = parse(cls, values, "")
        cfg.validate()
        return cfg

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, tuples kept; `from_dict` takes them back."""
        return dataclasses.asdict(self)

    def validate(self) -> None:
        """Raises `ValueError` on a setting out of range or two that do not fit together."""
        _positive("config", self, "steps", "batch_size", "accumulate")
        rule = f"must be between 2 and model.max_length={self.model.max_length}"
        ok = 2 <= self.length <= self.model.max_length
        check(ok, "length", self.length, rule, "Shorten the rows or raise model.max_length")
        rule = f"must divide batch_size={self.batch_size}; it is the number of micro-batches"
        ok = self.batch_size % self.accumulate == 0
        check(ok, "accumulate", self.accumulate, rule, "Try a divisor, such as 1 or 2")
        _not_negative("config", self, "loss_z_coeff", "seed")
        if self.loss_chunk is not None:
            _positive("config", self, "loss_chunk")
        self.model.validate("model")
        self.optim.validate("optim", self.steps)
        for name in ("data", "eval", "checkpoint", "log", "mesh"):
            getattr(self, name).validate(name)


__all__ = [
    "Attention",
    "CheckpointConfig",
    "DataConfig",
    "EvalConfig",
    "LogConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimConfig",
    "RouterConfig",
    "TrainConfig",
    "check",
    "fail",
]
