"""The typed side of configuration: frozen dataclasses, parsing, validation.

`TrainConfig.from_dict` is the one place where a plain dictionary becomes typed. An unknown key, a
value of another type or out of range raises `ValueError` with the setting's path, its value, the
rule and a fix. Values that follow from others are properties, never stored twice.
"""

import dataclasses
from typing import Any, Literal

from mor_jax.config.model import (
    Attention,
    KVMode,
    ModelConfig,
    Remat,
    RopeScaling,
    RouterConfig,
    Sharing,
)
from mor_jax.config.parsing import check, fail, not_negative, numbers, parse, positive

_ENDLESS = ("optim.clip_norm", "eval.batches", "eval.batch_size")
"""No limit of the gradient; as much held-out text as there is."""

MOST_WORKERS = 1024
MOST_AHEAD = 65536


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
    aux_router_lr_ratio: float = 10.0
    max_skipped_steps: int = 10

    def validate(self, path: str, steps: int) -> None:
        """Raises `ValueError` on a setting out of range for a run of `steps` steps."""
        positive(path, self, "lr", "eps", "clip_norm", "aux_router_lr_ratio", "max_skipped_steps")
        not_negative(path, self, "warmup_steps", "decay_steps", "final_lr_ratio", "weight_decay")
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
        `tfds:DIR[:SPLIT]`, `hf:NAME[:SPLIT]`, `shards:DIR`; one weight each, normalised.
    """

    sources: tuple[str, ...] = ("stdlib",)
    weights: tuple[float, ...] | None = None
    text_key: str = "text"
    tokenizer: str = "bytes"
    document_mask: bool = False
    validation_fraction: float = 0.01
    shuffle: bool = True
    seed: int = 0
    num_workers: int = 0
    prefetch: int = 2

    def validate(self, path: str) -> None:
        """Raises `ValueError` on a setting out of range."""
        check(bool(self.sources), f"{path}.sources", self.sources, "is empty", "Try ('stdlib',)")
        if self.weights is not None:
            rule = f"needs one positive weight per source ({len(self.sources)})"
            ok = len(self.weights) == len(self.sources) and all(w > 0 for w in self.weights)
            check(ok, f"{path}.weights", self.weights, rule, "Leave it None for equal weights")
        rule = "must be in (0, 0.5]; it is the share of documents kept for evaluation"
        ok = 0 < self.validation_fraction <= 0.5
        check(ok, f"{path}.validation_fraction", self.validation_fraction, rule, "Try 0.01")
        not_negative(path, self, "seed", "num_workers", "prefetch")
        for name, most in (("num_workers", MOST_WORKERS), ("prefetch", MOST_AHEAD)):
            rule = f"must be at most {most}: each is a process" if name == "num_workers" else ""
            rule = rule or f"must be at most {most}: so many batches are kept in memory"
            ok = getattr(self, name) <= most
            check(ok, f"{path}.{name}", getattr(self, name), rule, "Try 2")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation on held-out text. `interval`: steps between two; None: only at the end."""

    interval: int | None = 100
    batches: int = 8
    batch_size: int = 8
    prompt: str = "def "
    completion_tokens: int = 160

    def validate(self, path: str) -> None:
        """Raises `ValueError` on a setting out of range."""
        positive(path, self, "batches", "batch_size")
        not_negative(path, self, "completion_tokens")
        if self.interval is not None:
            positive(path, self, "interval")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When a checkpoint is written and which stay. `interval`: steps; None: only at the end.

    keep_steps: further steps after which one is written; these stay for good.
    """

    interval: int | None = 200
    max_to_keep: int = 2
    keep_period: int | None = None
    keep_steps: tuple[int, ...] = ()

    def validate(self, path: str) -> None:
        """Raises `ValueError` on a setting out of range."""
        positive(path, self, "max_to_keep")
        for name in ("interval", "keep_period"):
            if getattr(self, name) is not None:
                positive(path, self, name)
        for i, step in enumerate(self.keep_steps):
            check(step > 0, f"{path}.keep_steps[{i}]", step, "must be a step, from 1", "Try (100,)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Metrics go to `metrics.jsonl` always; TensorBoard and Weights & Biases when asked."""

    interval: int = 10
    tensorboard: bool = False
    wandb_project: str | None = None

    def validate(self, path: str) -> None:
        """Raises `ValueError` on a setting out of range."""
        positive(path, self, "interval")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices per mesh axis; at most one may be None, which means the rest.

    slice: copies of the mesh that only the data-centre network joins (TPU slices, or hosts without
    a fast link). data: copies of the parameters inside a slice. fsdp: parts that parameters,
    optimiser and rows are cut into. tensor: parts that heads, MLP and vocabulary are cut into.
    """

    slice: int | None = 1
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
class ShardingConfig:
    """How a step uses the mesh.

    all_gather_shared: `once`: the block that recursions share is gathered from its fsdp parts once
    and serves all recursions and micro-batches (paper section 2.1); `per_recursion`: layer by
    layer, each time it runs, which needs less memory. None: once where it fits the device.
    """

    all_gather_shared: Literal["once", "per_recursion"] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostsConfig:
    """How the processes of a run watch each other.

    heartbeat_timeout: seconds without a sign of life after which a process counts as lost.
    """

    heartbeat_timeout: int = 30

    def validate(self, path: str) -> None:
        """Raises `ValueError` on a setting out of range."""
        rule = "must be at least 5 seconds, so that a busy file system is no death"
        check(
            self.heartbeat_timeout >= 5,
            f"{path}.heartbeat_timeout",
            self.heartbeat_timeout,
            rule,
            "Try 30",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """Traces of the device. steps: first and last step to record; None: none."""

    steps: tuple[int, ...] | None = None

    def validate(self, path: str, steps: int) -> None:
        """Raises `ValueError` on a setting out of range for a run of `steps` steps."""
        if self.steps is None:
            return
        rule = f"needs the first and the last step to record, in 1 .. {steps}"
        ok = len(self.steps) == 2 and 1 <= self.steps[0] <= self.steps[1] <= steps
        check(ok, f"{path}.steps", self.steps, rule, "Try (10, 12)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that a training run depends on.

    batch_size: rows of a step over all devices, split into `grad_accum_steps` micro-batches.
    loss_chunk_size: positions of each row whose logits exist at one time; None: all of them.
    compilation_cache: keep compiled programs in the workdir, for the next start.
    """

    steps: int = 1000
    batch_size: int = 8
    seq_len: int = 256
    grad_accum_steps: int = 1
    loss_chunk_size: int | None = 128
    z_loss_coeff: float = 0.0
    seed: int = 0
    compilation_cache: bool = True
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    optim: OptimConfig = OptimConfig()
    data: DataConfig = DataConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    mesh: MeshConfig = MeshConfig()
    sharding: ShardingConfig = ShardingConfig()
    hosts: HostsConfig = HostsConfig()
    profile: ProfileConfig = ProfileConfig()

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
        numbers(self.to_dict(), endless=_ENDLESS)
        positive("config", self, "steps", "batch_size", "grad_accum_steps")
        rule = f"must be between 2 and model.max_seq_len={self.model.max_seq_len}"
        ok = 2 <= self.seq_len <= self.model.max_seq_len
        check(ok, "seq_len", self.seq_len, rule, "Shorten the rows or raise model.max_seq_len")
        rule = f"must divide batch_size={self.batch_size}; it is the number of micro-batches"
        ok = self.batch_size % self.grad_accum_steps == 0
        check(ok, "grad_accum_steps", self.grad_accum_steps, rule, "Try a divisor, such as 1 or 2")
        not_negative("config", self, "z_loss_coeff", "seed")
        if self.loss_chunk_size is not None:
            positive("config", self, "loss_chunk_size")
        self.model.validate("model")
        self.optim.validate("optim", self.steps)
        self.profile.validate("profile", self.steps)
        for name in ("data", "eval", "checkpoint", "log", "mesh", "hosts"):
            getattr(self, name).validate(name)

    def validate_start(self) -> None:
        """`validate`, and what a run that starts has to fulfil; one that ended may hold others."""
        self.validate()
        rule = f"must be a step of the run, in 1 .. {self.steps}; after others nothing is written"
        for i, step in enumerate(self.checkpoint.keep_steps):
            fix = "Leave it out, or raise steps"
            check(step <= self.steps, f"checkpoint.keep_steps[{i}]", step, rule, fix)


__all__ = [
    "Attention",
    "CheckpointConfig",
    "DataConfig",
    "EvalConfig",
    "HostsConfig",
    "KVMode",
    "LogConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimConfig",
    "ProfileConfig",
    "Remat",
    "RopeScaling",
    "RouterConfig",
    "ShardingConfig",
    "Sharing",
    "TrainConfig",
    "check",
    "fail",
]
