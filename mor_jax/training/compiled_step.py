"""The compiled train step of a run: compiled from shapes alone, in the background.

Compilation takes longer than everything else before the first step, so it starts first, while the
data is read and the state is initialised. During capacity warm-up the next step function is
compiled in advance.
"""

import concurrent.futures
import threading
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mor_jax.config import TrainConfig
from mor_jax.distributed import mesh as sharding
from mor_jax.models.params import abstract_params, init_params
from mor_jax.models.routing.router import capacity_tokens
from mor_jax.training.optimizer import make_optimizer
from mor_jax.training.train_state import TrainState, new_state
from mor_jax.training.train_step import StepSpec, train_step
from mor_jax.types import Batch, Params

AHEAD = 50
"""Steps in advance at which the compilation of the next step function starts."""

Step = Callable[[TrainState, Batch], tuple[TrainState, dict[str, Any]]]


def jitted_steps(cfg: TrainConfig) -> Callable[[tuple[int, ...]], Any]:
    """Maps token slots per recursion to a jitted `train_step` that donates the state."""
    optimizer = make_optimizer(cfg.optim, cfg.steps, abstract_params(cfg.model))

    @cache
    def jitted(kept: tuple[int, ...]) -> Any:
        return jax.jit(partial(train_step, StepSpec(cfg, optimizer, kept)), donate_argnums=0)

    return jitted


def fresh_state(cfg: TrainConfig) -> TrainState:
    """The state before the first step, of random parameters; traceable."""
    return first_state(cfg, init_params(cfg.model, cfg.seed))


def first_state(cfg: TrainConfig, params: Params) -> TrainState:
    """The state before the first step, of these parameters; traceable."""
    optimizer = make_optimizer(cfg.optim, cfg.steps, abstract_params(cfg.model))
    return new_state(params, optimizer.init(params))


def abstract_state(cfg: TrainConfig, mesh: Mesh, placement: Params) -> TrainState:
    """Shapes of the state with their shardings; placement: those of the parameters."""
    shapes = jax.eval_shape(partial(fresh_state, cfg))
    shardings = sharding.state_shardings(mesh, shapes, placement)
    return jax.tree.map(
        lambda shape, where: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=where),
        shapes,
        shardings,
    )


def abstract_batch(cfg: TrainConfig, mesh: Mesh) -> Batch:
    """Shapes of a global training batch with their shardings."""
    shape = jax.ShapeDtypeStruct(
        (cfg.batch_size, cfg.seq_len), jnp.int32, sharding=sharding.batch_sharding(mesh)
    )
    packed = shape if cfg.data.document_mask else None
    return Batch(shape, shape, packed, packed)


class CompiledSteps:
    """Maps a step (from 1) to its compiled `train_step`; one for each set of capacities."""

    def __init__(self, cfg: TrainConfig, mesh: Mesh, state: TrainState):
        """state: `abstract_state`. Nothing is compiled before `prepare` or the first call."""
        self._cfg, self._mesh, self._state = cfg, mesh, state
        self._jitted = jitted_steps(cfg)
        self._made: dict[tuple[int, ...], concurrent.futures.Future[Step]] = {}

    def prepare(self, step: int) -> "concurrent.futures.Future[Step]":
        """Starts compiling the function of `step`, unless that has started already."""
        kept = capacity_tokens(self._cfg.model, self._cfg.seq_len, step)
        if kept not in self._made:
            made = self._made[kept] = concurrent.futures.Future()
            # Not a daemon: exiting the interpreter during compilation would crash the process.
            threading.Thread(target=self._compile, args=(kept, made)).start()
        return self._made[kept]

    def __call__(self, step: int) -> Step:
        """The compiled function of `step`; waits for it. Raises what its compilation raised."""
        program = self.prepare(step).result()
        self.prepare(min(step + AHEAD, self._cfg.steps))
        return program

    def _compile(self, kept: tuple[int, ...], made: "concurrent.futures.Future[Step]") -> None:
        try:
            with jax.set_mesh(self._mesh):
                batch = abstract_batch(self._cfg, self._mesh)
                made.set_result(self._jitted(kept).lower(self._state, batch).compile())
        except BaseException as error:
            # Raised again in the thread that waits for the function.
            made.set_exception(error)
