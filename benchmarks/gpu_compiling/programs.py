"""A case's program: traced and lowered for its devices, then compiled, and what came out."""

import re
import time
from collections import Counter
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from gpu_compiling.matrix import ENGINE, Case, config
from mor_jax.config import TrainConfig
from mor_jax.data.tokenizers.load import load_tokenizer
from mor_jax.distributed import mesh as sharding
from mor_jax.inference.config import EngineConfig, plan_cache
from mor_jax.inference.engine.batch_state import (
    BatchState,
    DecodeInput,
    PrefillInput,
    SequenceBlocks,
)
from mor_jax.inference.engine.model_runner import CHUNK_TOKENS, GROUP_TOKENS
from mor_jax.inference.engine.sampling import SamplingFeatures
from mor_jax.inference.engine.step_functions import StepFunctions
from mor_jax.inference.load_model import LoadedModel, expected_shares
from mor_jax.models.decode.layer import Weights
from mor_jax.models.decode.paged_cache import BlockTables
from mor_jax.models.flops import flops
from mor_jax.models.params import abstract_params
from mor_jax.models.routing.router import capacity_tokens
from mor_jax.planning import aot
from mor_jax.planning.aot import parse_topology
from mor_jax.planning.gpu_targets import TARGETS, gpu_devices
from mor_jax.planning.hlo.memory import traffic
from mor_jax.planning.hlo.text import parse_module
from mor_jax.training import compiled_step
from mor_jax.training.train_step import eval_step

SLOTS, PIECE, PAGE = 64, 256, 32
"""Of the engine: sequences that decode together, tokens of a prompt stored at a time, of a page."""

_KERNEL = re.compile(r'custom_call_target="(__cudnn\$fmha\w+|tpu_custom_call)"')


def compiled(case: Case) -> dict[str, Any]:
    """Bytes, kernels and seconds of the case's program. Raises whatever its compilation raises."""
    cfg, devices = config(case), _devices(case)
    mesh, start = sharding.make_mesh(cfg.mesh, devices), time.perf_counter()
    with jax.set_mesh(mesh):
        lowered = _engine(case, cfg, mesh) if case.program in ENGINE else _model(case, cfg, mesh)
        traced = time.perf_counter()
        program = lowered.compile()
    text, stats = program.as_text() or "", program.memory_analysis()
    fresh = stats.output_size_in_bytes - stats.alias_size_in_bytes
    return {
        "capacities": capacity_tokens(cfg.model, cfg.seq_len),
        "arguments": stats.argument_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "peak": stats.argument_size_in_bytes + fresh + stats.temp_size_in_bytes,
        "kernels": dict(Counter(_KERNEL.findall(text))),
        "accessed": traffic(parse_module(text)).bytes,
        "flops": None if case.program in ENGINE else _flops(cfg, case),
        "trace_seconds": traced - start,
        "compile_seconds": time.perf_counter() - traced,
    }


def _devices(case: Case) -> list[jax.Device]:
    if case.target in TARGETS:
        return gpu_devices(case.target, case.devices)
    # libtpu describes a host's chips together; a program may be for one of them.
    return aot.devices(parse_topology(case.target))[: case.devices]


def _flops(cfg: TrainConfig, case: Case) -> float:
    """Of a device's matrix products, by accounting; recomputed ones too."""
    report = flops(cfg.model, cfg.seq_len)
    forward = report.head + sum(stage.forward(causal=False) for stage in report.computed)
    a_token = report.hardware() if case.program == "train" else forward
    return a_token * case.rows * cfg.seq_len


def _model(case: Case, cfg: TrainConfig, mesh: Mesh) -> jax.stages.Lowered:
    """The train step, or an evaluation of one batch."""
    state, batch = aot.abstract_inputs(cfg, mesh)
    if case.program == "train":
        return compiled_step.jitted_steps(cfg)(capacity_tokens(cfg.model, cfg.seq_len)).lower(
            state, batch
        )
    step = jax.jit(partial(eval_step, cfg), static_argnums=2)
    return step.lower(state.params, batch, case.program)


def _engine(case: Case, cfg: TrainConfig, mesh: Mesh) -> jax.stages.Lowered:
    """A decode step with full slots, or a prefill chunk, as a GPU compiles them."""
    engine = EngineConfig(slots=SLOTS, cache_bytes=2**32, dtype="bfloat16", piece=PIECE, page=PAGE)
    made = plan_cache(_served(cfg), engine)
    model = made.spec.cfg
    chunk = CHUNK_TOKENS.get("gpu", 16384) // PAGE
    group = GROUP_TOKENS.get("gpu", PIECE)
    programs = StepFunctions(
        made.spec, (0,), (0.0,) * model.num_recursions, chunk, group
    ).compiled()

    def arguments() -> tuple[Any, ...]:
        slots = BatchState.empty(made.spec, made.slots)
        return slots, made.spec.cache(made.end_pages, made.block_pages)

    slots, cache = jax.eval_shape(arguments)
    weights = jax.eval_shape(partial(Weights.of, model), abstract_params(model))
    asked = _step(made.slots) if case.program == "decode" else _prompt()
    given = (weights, slots, cache, _held(made), asked)
    where = SingleDeviceSharding(mesh.devices.flat[0])
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=where), given
    )
    return (programs.decode_step if case.program == "decode" else programs.prefill).lower(*placed)


def _served(cfg: TrainConfig) -> LoadedModel:
    tokenizer = load_tokenizer("bytes")
    return LoadedModel(
        name="none",
        cfg=cfg.model,
        params={},
        thresholds=None,
        shares=expected_shares(cfg.model),
        tokenizer=tokenizer,
        chat_template=None,
        special_tokens={},
        eos_ids=frozenset({0}),
        created=0,
    )


def _held(made: Any) -> SequenceBlocks:
    rows, lists, most = made.slots + 1, made.spec.lists, -(-made.max_length // PAGE)

    def whole(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, np.int32)

    return SequenceBlocks(
        BlockTables(whole(rows, most), whole(rows, lists, most)), whole(rows, lists)
    )


def _step(rows: int) -> DecodeInput:
    return DecodeInput(np.zeros(rows, np.int32), np.zeros(rows, bool), SamplingFeatures.of([]))


def _prompt() -> PrefillInput:
    return PrefillInput(np.int32(0), np.int32(0), np.int32(0), np.zeros(PIECE, np.int32))
