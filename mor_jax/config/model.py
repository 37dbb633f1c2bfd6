"""The settings of a model, re-exported by `mor_jax.config`."""

import dataclasses
import itertools
from typing import Literal

from mor_jax.config.parsing import check, check_not_negative, check_positive

Sharing = Literal["none", "cycle", "sequence", "middle_cycle", "middle_sequence"]
KVMode = Literal["recursion", "shared", "shared_update"]
Attention = Literal["auto", "xla", "blockwise", "cudnn", "splash"]
Remat = Literal["none", "block", "full", "offload"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """Routing of tokens through recursions (paper section 2.2).

    `expert`: each recursion selects its top tokens, a fraction `capacity[r]` of the sequence, from
    the tokens that are still active. `token`: each token is assigned its depth once.
    """

    kind: Literal["none", "expert", "token"] = "none"
    arch: Literal["linear", "mlp"] = "linear"
    activation: Literal["sigmoid", "tanh", "none", "softmax"] = "sigmoid"
    alpha: float = 0.1
    temperature: float = 1.0
    gating: Literal["weighted", "additive"] = "weighted"
    z_loss_coeff: float = 0.0
    # Expert-choice. None capacity: (Nr - r) / Nr.
    capacity: tuple[float, ...] | None = None
    capacity_warmup_steps: int = 0
    capacity_warmup_stages: int = 8
    causal_routing: Literal["aux_loss", "aux_router", "none"] = "aux_loss"
    aux_loss_coeff: float = 0.001
    # Token-choice. None capacity factor: no token is dropped.
    load_balancing: Literal["loss", "loss_free", "none"] = "loss"
    balance_loss_coeff: float = 0.1
    balance_warmup_steps: int = 0
    bias_update_rate: float = 0.001
    capacity_factor: float | None = None
    # Both: selected token counts are rounded to a multiple of it. None: chosen for the device.
    capacity_multiple: int | None = None

    def validate(self, path: str, recursions: int) -> None:
        """Raises `ValueError` on a setting out of range for `recursions` recursions."""
        if self.kind == "none":
            return
        check_positive(path, self, "alpha", "temperature", "capacity_warmup_stages")
        check_not_negative(
            path, self, "z_loss_coeff", "aux_loss_coeff", "balance_loss_coeff", "bias_update_rate"
        )
        check_not_negative(path, self, "capacity_warmup_steps", "balance_warmup_steps")
        if self.capacity_multiple is not None:
            check_positive(path, self, "capacity_multiple")
        allowed = {"expert": ("sigmoid", "tanh", "none"), "token": ("softmax", "sigmoid")}[
            self.kind
        ]
        rule = f"{self.kind}-choice routing takes one of {allowed}"
        check(
            self.activation in allowed,
            f"{path}.activation",
            self.activation,
            rule,
            f"Try {allowed[0]!r}",
        )
        if self.kind == "expert":
            self._validate_capacities(f"{path}.capacity", recursions)
        elif self.capacity_factor is not None:
            check_positive(path, self, "capacity_factor")

    def _validate_capacities(self, path: str, recursions: int) -> None:
        capacity = self.capacity
        if capacity is None:
            return
        default = tuple(round(1 - r / recursions, 3) for r in range(recursions))
        rule = f"needs one fraction per recursion ({recursions})"
        check(len(capacity) == recursions, path, capacity, rule, f"Leave it None for {default}")
        for r, fraction in enumerate(capacity):
            rule = "must be in (0, 1]; it is the fraction of tokens selected at this recursion"
            check(0 < fraction <= 1, f"{path}[{r}]", fraction, rule, "Try 0.5")
        decreasing = all(a >= b for a, b in itertools.pairwise(capacity))
        rule = "must not increase: a recursion selects from the tokens of the previous one"
        check(decreasing, path, capacity, rule, f"Try {tuple(sorted(capacity, reverse=True))}")

    def capacities(self, recursions: int) -> tuple[float, ...]:
        """Fraction of the sequence's tokens that each recursion selects, in [0, 1]."""
        if self.kind != "expert":
            return (1.0,) * recursions
        return self.capacity or tuple((recursions - r) / recursions for r in range(recursions))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Scaling of the rotary embedding for sequences longer than a model was first trained on.

    `linear`: divides every position by `factor`. `llama3` (Llama 3.1): divides frequencies with
    fewer than `low_freq_factor` periods in `original_max_position_embeddings` tokens by `factor`,
    leaves those with more than `high_freq_factor` periods unchanged, and interpolates in between.
    """

    rope_type: Literal["none", "linear", "llama3"] = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def validate(self, path: str) -> None:
        """Raises `ValueError` on a setting out of range."""
        if self.rope_type == "none":
            return
        rule = "must be at least 1: scaling extends the context, it does not shorten it"
        check(self.factor >= 1, f"{path}.factor", self.factor, rule, "Try 8.0")
        if self.rope_type == "llama3":
            check_positive(path, self, "low_freq_factor", "original_max_position_embeddings")
            rule = f"must be greater than low_freq_factor={self.low_freq_factor}"
            ok = self.high_freq_factor > self.low_freq_factor
            check(ok, f"{path}.high_freq_factor", self.high_freq_factor, rule, "Try 4.0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A Llama-style decoder whose middle may be one block applied `num_recursions` times.

    `num_layers` counts effective layers: those of a vanilla model of the same depth.
    """

    vocab_size: int = 256
    hidden_size: int = 256
    num_layers: int = 8
    num_heads: int = 8
    num_kv_heads: int = 4
    head_dim: int = 32
    intermediate_size: int = 704
    max_seq_len: int = 2048
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = RopeScaling()
    norm_eps: float = 1e-5
    init_std: float = 0.02
    tie_embeddings: bool = True
    sharing: Sharing = "none"
    num_recursions: int = 1
    share_norms: bool = True
    kv_mode: KVMode = "recursion"
    router: RouterConfig = RouterConfig()
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    attention: Attention = "auto"
    remat: Remat = "none"

    @property
    def is_middle(self) -> bool:
        """Whether the first and the last layer are outside the shared block."""
        return self.sharing.startswith("middle")

    @property
    def is_sequence(self) -> bool:
        """Whether each shared layer is repeated before the next one runs."""
        return self.sharing.endswith("sequence")

    @property
    def shared_layers(self) -> int:
        """Layers of the shared block; all layers for a vanilla model."""
        return (self.num_layers - 2 * self.is_middle) // self.num_recursions

    @property
    def unique_layers(self) -> int:
        """Layers whose weights are stored."""
        return self.shared_layers + 2 * self.is_middle

    def validate(self, path: str = "model") -> None:
        """Raises `ValueError` if a setting is out of range or two settings are incompatible."""
        check_positive(
            path,
            self,
            "vocab_size",
            "hidden_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
        )
        check_positive(
            path,
            self,
            "intermediate_size",
            "max_seq_len",
            "rope_theta",
            "norm_eps",
            "num_recursions",
        )
        check_not_negative(path, self, "init_std")
        rule = f"must divide num_heads={self.num_heads}; each key/value head serves the same number"
        if self.num_heads % self.num_kv_heads:
            # Bounded, so that an absurd num_heads does not take for ever.
            candidates = range(1, min(self.num_heads, 4096) + 1)
            divisors = [g for g in candidates if self.num_heads % g == 0]
            nearest = min(divisors, key=lambda g: abs(g - self.num_kv_heads))
            check(False, f"{path}.num_kv_heads", self.num_kv_heads, rule, f"Try {nearest}")
        rule = "must be even: the rotary embedding rotates pairs of channels"
        check(self.head_dim % 2 == 0, f"{path}.head_dim", self.head_dim, rule, "Try 64")
        self.rope_scaling.validate(f"{path}.rope_scaling")
        self._validate_sharing(path)
        self.router.validate(f"{path}.router", self.num_recursions)

    def _validate_sharing(self, path: str) -> None:
        routed = self.router.kind != "none"
        if self.sharing == "none":
            rule = "a vanilla model (sharing='none') runs its layers once"
            fix = "Set model.sharing='middle_cycle' or model.num_recursions=1"
            check(
                self.num_recursions == 1, f"{path}.num_recursions", self.num_recursions, rule, fix
            )
            rule = "routing needs a shared block"
            check(not routed, f"{path}.router.kind", self.router.kind, rule, fix)
            rule = "sharing keys and values needs a shared block"
            check(
                self.kv_mode == "recursion",
                f"{path}.kv_mode",
                self.kv_mode,
                rule,
                "Use 'recursion'",
            )
            return
        ends, nr = 2 * self.is_middle, self.num_recursions
        middle = self.num_layers - ends
        below = max(middle // nr, 1) * nr + ends
        rule = f"{self.sharing} with num_recursions={nr} needs {ends} + a multiple of {nr} layers"
        fix = f"The nearest counts are {below} and {below + nr}"
        ok = middle > 0 and middle % nr == 0
        check(ok, f"{path}.num_layers", self.num_layers, rule, fix)
        if routed:
            rule = "routed models repeat the whole block: cycle or middle_cycle"
            check(not self.is_sequence, f"{path}.sharing", self.sharing, rule, "Try 'middle_cycle'")
        if self.kv_mode == "shared_update":
            rule = "without routing every key and value would be updated, so nothing is shared"
            check(routed, f"{path}.kv_mode", self.kv_mode, rule, "Use 'shared' or 'recursion'")
