"""What the training benchmarks share: the project's step compiled, interleaved timing, records.

Variants are timed in turns, round after round, so that a slow minute of the machine falls on all of
them alike; the median over rounds is reported.
"""

import dataclasses
import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from mor_jax.config import TrainConfig
from mor_jax.models.params import init_params
from mor_jax.models.routing.router import capacity_tokens
from mor_jax.runtime.host_memory import keep_freed_memory
from mor_jax.runtime.platform import use_cpu_without_accelerator
from mor_jax.training.compiled_step import jitted_steps
from mor_jax.training.optimizer import make_optimizer
from mor_jax.training.train_state import new_state
from mor_jax.types import IGNORE, Batch, Params

use_cpu_without_accelerator()
RESULTS = Path(__file__).resolve().parent / "results"


def use_cores(count: int | None) -> None:
    """Restricts this process to `count` CPU cores; call before JAX starts. None: leave it."""
    if count is not None:
        allowed = sorted(os.sched_getaffinity(0))
        if count > len(allowed):
            raise ValueError(f"--cores={count}: this machine offers {len(allowed)}. Ask for fewer")
        os.sched_setaffinity(0, set(allowed[:count]))


def random_batch(cfg: TrainConfig, seed: int = 0) -> Batch:
    """Rows of uniformly random tokens; the last position of a row has no target."""
    rng = np.random.default_rng(seed)
    shape = (cfg.batch_size, cfg.seq_len)
    ids = rng.integers(0, cfg.model.vocab_size, shape, dtype=np.int32)
    targets = np.concatenate([ids[:, 1:], np.full((shape[0], 1), IGNORE, np.int32)], axis=1)
    return Batch(tokens=jnp.asarray(ids), targets=jnp.asarray(targets))


class Trainer:
    """A run's train step, compiled as `training.trainer` does, on one batch and one device.

    temp_bytes: memory of the compiled step beside the state and the batch. losses: cross-entropy
    of every step taken, in nats per token.
    """

    def __init__(self, cfg: TrainConfig, change: Callable[[Params], Params] | None = None):
        """`change` edits the fresh parameters before the optimiser sees them."""
        keep_freed_memory()
        self.cfg, self.batch, self.losses = cfg, random_batch(cfg), []
        params = init_params(cfg.model, cfg.seed)
        params = params if change is None else change(params)
        optimizer = make_optimizer(cfg.optim, cfg.steps, params)
        self.state = new_state(params, optimizer.init(params))
        step = jitted_steps(cfg)(capacity_tokens(cfg.model, cfg.seq_len))
        self._compiled = step.lower(self.state, self.batch).compile()
        self.temp_bytes = self._compiled.memory_analysis().temp_size_in_bytes

    def step(self) -> None:
        """One optimiser step, finished when this returns; the state before it is gone."""
        self.state, metrics = self._compiled(self.state, self.batch)
        self.losses.append(float(jax.block_until_ready(metrics)["ce"]))


def interleaved(
    steps: dict[str, Callable[[], None]], *, warmup: int, rounds: int
) -> dict[str, list[float]]:
    """Seconds of each call, by variant. Every call must return only when its work is done."""
    for step in steps.values():
        for _ in range(warmup):
            step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def median(seconds: list[float]) -> float:
    """The middle one: unmoved by a few disturbed rounds."""
    return statistics.median(seconds)


def machine() -> dict[str, str | int]:
    """Where and when a result was taken."""
    device = jax.devices()[0]
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "device": device.device_kind if device.platform != "cpu" else _cpu_name(),
        "platform": device.platform,
        "cores": len(os.sched_getaffinity(0)),
        "jax": jax.__version__,
    }


def _cpu_name() -> str:
    lines = (
        Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    )
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def report(question: str, record: dict, save: bool) -> None:
    """Prints the record as one JSON line; with `save` also appends it to results/."""
    line = json.dumps({"benchmark": question, **machine(), **record})
    print(line)
    if save:
        RESULTS.mkdir(exist_ok=True)
        with open(RESULTS / f"{question}.jsonl", "a") as file:
            file.write(line + "\n")


def settings(cfg: TrainConfig) -> dict:
    """The settings that a result depends on, for the record."""
    model = dataclasses.asdict(cfg.model)
    keep = ("vocab_size", "hidden_size", "num_heads", "num_kv_heads", "intermediate_size")
    keep += ("dtype", "attention", "remat")
    return {
        "length": cfg.seq_len,
        "batch": cfg.batch_size,
        "loss_chunk": cfg.loss_chunk_size,
        **{name: model[name] for name in keep},
    }
