"""A run and its state: what trainer, loop and report share. Imports none of them."""

import dataclasses
from functools import partial
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from mor_jax import data
from mor_jax.checkpoint.checkpointer import Checkpointer
from mor_jax.config import TrainConfig
from mor_jax.distributed import mesh as sharding
from mor_jax.distributed.data_shard import data_parallel_rank
from mor_jax.distributed.heartbeat import PeerMonitor
from mor_jax.distributed.stop_consensus import StopConsensus
from mor_jax.observability.event_log import Events
from mor_jax.observability.progress import Meter
from mor_jax.runtime.compilation_cache import Cache
from mor_jax.runtime.preemption import Signals
from mor_jax.training.compiled_step import CompiledSteps
from mor_jax.training.evaluator import Evaluator
from mor_jax.training.train_state import TrainState
from mor_jax.types import Batch


@dataclasses.dataclass(frozen=True)
class Run:
    """The parts of a run that stay the same from step to step.

    path: the run directory. fingerprint: of the data and the tokenizer. beginning: the position
    before the first sequence. abstract: shapes and shardings of the state.
    """

    cfg: TrainConfig
    path: epath.Path
    mesh: Mesh
    tokenizer: data.Tokenizer
    evaluator: Evaluator
    fingerprint: str
    beginning: data.DataPosition
    abstract: TrainState
    steps: CompiledSteps

    def place(self, batch: Batch) -> Batch:
        """This process's sequences -> the global batch on the devices."""
        return place(self.mesh, batch)

    def batches(self, start: "ResumePoint") -> data.TrainBatches:
        """This process's sequences of the training batches, from the position of `start`."""
        cfg, position = self.cfg, start.position
        layout = batch_layout(self.mesh, cfg, cfg.batch_size)
        options: dict[str, Any] = {
            "seed": cfg.seed,
            "start": position,
            "jumps": start.skipped_ranges,
        }
        return data.train_batches(cfg.data, self.tokenizer, layout, **options)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunServices:
    """What a run writes to and listens to, apart from its metrics."""

    checkpoints: Checkpointer
    events: Events
    signals: Signals
    stop_consensus: StopConsensus
    cache: Cache | None
    peers: PeerMonitor


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResumePoint:
    """Where a loop starts.

    position: in the data. skipped_ranges: sequences that are left out, as (first, end).
    rolled_back: whether the one rollback was used. bad: first sequence of each of the steps skipped
    last. eval_pending: a stop interrupted the evaluation of this state.
    """

    state: TrainState
    position: data.DataPosition
    skipped_ranges: tuple[data.SkippedRange, ...] = ()
    rolled_back: bool = False
    bad: tuple[int, ...] = ()
    eval_pending: bool = False

    def notes(self) -> dict[str, Any]:
        """What a checkpoint stores beside the state and the position."""
        return {
            "data": self.position.notes(),
            "jumps": [list(jump) for jump in self.skipped_ranges],
            "rolled_back": self.rolled_back,
            "bad": list(self.bad),
            "owes_evaluation": self.eval_pending,
        }

    @classmethod
    def of(
        cls, state: TrainState, position: data.DataPosition, notes: dict[str, Any]
    ) -> "ResumePoint":
        """From a restored checkpoint. position: in the data as it is now."""
        return cls(
            state=state,
            position=position,
            skipped_ranges=tuple((first, end) for first, end in notes.get("jumps", ())),
            rolled_back=notes.get("rolled_back", False),
            bad=tuple(notes.get("bad", ())),
            eval_pending=notes.get("owes_evaluation", False),
        )


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """The end of a loop: the last state, the last evaluation and the speed."""

    state: TrainState
    evaluated: dict[str, Any]
    meter: Meter


def batch_layout(mesh: Mesh, cfg: TrainConfig, batch_size: int) -> data.Layout:
    """Global batches of `batch_size` sequences, and the part of them that this process reads."""
    host, hosts = data_parallel_rank(mesh)
    return data.Layout(length=cfg.seq_len, batch_size=batch_size, host=host, hosts=hosts)


def place(mesh: Mesh, batch: Batch) -> Batch:
    """This process's sequences -> the global batch on the devices."""
    sharding_of_batch = sharding.batch_sharding(mesh)
    return jax.tree.map(partial(jax.make_array_from_process_local_data, sharding_of_batch), batch)
