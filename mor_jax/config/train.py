"""The settings of a training run: frozen dataclasses and their validation.

`TrainConfig.from_dict` is the only place where a plain dictionary becomes typed. An unknown key, a
wrong type or a value out of range raises `ValueError` with the setting's path, its value, the rule
and a fix. Derived values are properties and never stored.
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
from mor_jax.config.parsing import (
    check,
    check_not_negative,
    check_numbers,
    check_positive,
    fail,
    parse,
)

_UNBOUNDED = ("optim.clip_norm", "eval.batches", "eval.batch_size")
"""A huge value means no gradient clipping, or all of the validation data."""

MAX_WORKERS = 1024
MAX_PREFETCH = 65536


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its learning-rate schedule. Step counts are optimiser steps."""

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
        check_positive(
            path, self, "lr", "eps", "clip_norm", "aux_router_lr_ratio", "max_skipped_steps"
        )
        check_not_negative(
            path, self, "warmup_steps", "decay_steps", "final_lr_ratio", "weight_decay"
        )
        for name in ("b1", "b2"):
            value = getattr(self, name)
            check(0 <= value < 1, f"{path}.{name}", value, "must be in [0, 1)", "Try 0.9")
        ramps = self.warmup_steps + (self.decay_steps if self.schedule == "trapezoid" else 0)
        rule = f"warm-up and decay together ({ramps}) must fit into steps={steps}"
        fix = f"Try warmup_steps={steps // 20} and decay_steps={steps // 5}"
        check(ramps <= steps, f"{path}.warmup_steps", self.warmup_steps, rule, fix)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Sources, tokenisation and packing of the data. docs/data.md explains every source.

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
        rule = "must be in (0, 0.5]; it is the fraction of documents used for validation"
        ok = 0 < self.validation_fraction <= 0.5
        check(ok, f"{path}.validation_fraction", self.validation_fraction, rule, "Try 0.01")
        check_not_negative(path, self, "seed", "num_workers", "prefetch")
        for name, most in (("num_workers", MAX_WORKERS), ("prefetch", MAX_PREFETCH)):
            rule = f"must be at most {most}: each is a process" if name == "num_workers" else ""
            rule = rule or f"must be at most {most}: each prefetched batch is held in memory"
            ok = getattr(self, name) <= most
            check(ok, f"{path}.{name}", getattr(self, name), rule, "Try 2")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation on the validation split. `interval`: steps in between; None: only at the end."""

    interval: int | None = 100
    batches: int = 8
    batch_size: int = 8
    prompt: str = "def "
    completion_tokens: int = 160

    def validate(self, path: str) -> None:
        """Raises `ValueError` on a setting out of range."""
        check_positive(path, self, "batches", "batch_size")
        check_not_negative(path, self, "completion_tokens")
        if self.interval is not None:
            check_positive(path, self, "interval")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written and retained. `interval`: steps; None: only at the end.

    keep_steps: further steps to write a checkpoint at; these are never deleted.
    """

    interval: int | None = 200
    max_to_keep: int = 2
    keep_period: int | None = None
    keep_steps: tuple[int, ...] = ()

    def validate(self, path: str) -> None:
        """Raises `ValueError` on a setting out of range."""
        check_positive(path, self, "max_to_keep")
        for name in ("interval", "keep_period"):
            if getattr(self, name) is not None:
                check_positive(path, self, name)
        for i, step in enumerate(self.keep_steps):
            check(step > 0, f"{path}.keep_steps[{i}]", step, "must be at least 1", "Try (100,)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Logging to `metrics.jsonl` and, if enabled, to TensorBoard and Weights & Biases."""

    interval: int = 10
    tensorboard: bool = False
    wandb_project: str | None = None

    def validate(self, path: str) -> None:
        """Raises `ValueError` on a setting out of range."""
        check_positive(path, self, "interval")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices per mesh axis; at most one may be None: all remaining devices.

    slice: replicas connected only by the data-centre network (TPU slices, or hosts without a fast
    interconnect). data: replicas of the parameters within a slice. fsdp: shards of parameters,
    optimiser state and batch. tensor: shards of heads, MLP and vocabulary.
    """

    slice: int | None = 1
    data: int | None = None
    fsdp: int | None = 1
    tensor: int | None = 1

    def validate(self, path: str) -> None:
        """Raises `ValueError` on a setting out of range."""
        sizes = dataclasses.asdict(self)
        unset = [name for name, size in sizes.items() if size is None]
        rule = "at most one axis may be None (all remaining devices)"
        check(
            len(unset) <= 1, f"{path}.{unset[-1] if unset else 'data'}", None, rule, "Set it to 1"
        )
        for name, size in sizes.items():
            check(size is None or size > 0, f"{path}.{name}", size, "must be positive", "Try 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardingConfig:
    """How a step uses the mesh.

    all_gather_shared: `once`: all-gather the fsdp shards of the shared block once for all
    recursions and micro-batches (paper section 2.1); `per_recursion`: gather each layer whenever it
    runs, which needs less memory. None: `once` if it fits the device's memory.
    """

    all_gather_shared: Literal["once", "per_recursion"] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostsConfig:
    """How the processes of a run monitor each other.

    heartbeat_timeout: seconds without a heartbeat after which a process counts as lost.
    """

    heartbeat_timeout: int = 30

    def validate(self, path: str) -> None:
        """Raises `ValueError` on a setting out of range."""
        rule = "must be at least 5 seconds, so that a slow file system does not count as a failure"
        check(
            self.heartbeat_timeout >= 5,
            f"{path}.heartbeat_timeout",
            self.heartbeat_timeout,
            rule,
            "Try 30",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """Profiler traces. steps: first and last step to record; None: no trace."""

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
    """All settings of a training run.

    batch_size: sequences of a step over all devices, split into `grad_accum_steps` micro-batches.
    loss_chunk_size: positions of each sequence whose logits are in memory at a time; None: all.
    compilation_cache: keep compiled functions in the workdir, for the next start.
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
        """Parses and validates nested plain values. Raises `ValueError` if any is invalid."""
        cfg = parse(cls, values, "")
        cfg.validate()
        return cfg

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, with tuples; the inverse of `from_dict`."""
        return dataclasses.asdict(self)

    def validate(self) -> None:
        """Raises `ValueError` if a setting is out of range or two settings are incompatible."""
        check_numbers(self.to_dict(), unbounded=_UNBOUNDED)
        check_positive("config", self, "steps", "batch_size", "grad_accum_steps")
        rule = f"must be between 2 and model.max_seq_len={self.model.max_seq_len}"
        ok = 2 <= self.seq_len <= self.model.max_seq_len
        check(ok, "seq_len", self.seq_len, rule, "Lower seq_len or raise model.max_seq_len")
        rule = f"must divide batch_size={self.batch_size}; it is the number of micro-batches"
        ok = self.batch_size % self.grad_accum_steps == 0
        check(ok, "grad_accum_steps", self.grad_accum_steps, rule, "Try a divisor, such as 1 or 2")
        check_not_negative("config", self, "z_loss_coeff", "seed")
        if self.loss_chunk_size is not None:
            check_positive("config", self, "loss_chunk_size")
        self.model.validate("model")
        self.optim.validate("optim", self.steps)
        self.profile.validate("profile", self.steps)
        for name in ("data", "eval", "checkpoint", "log", "mesh", "hosts"):
            getattr(self, name).validate(name)

    def validate_start(self) -> None:
        """`validate`, and further checks that apply only to a run that is about to start."""
        self.validate()
        rule = f"must be a step of the run, in 1 .. {self.steps}"
        for i, step in enumerate(self.checkpoint.keep_steps):
            fix = "Remove it, or raise steps"
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
