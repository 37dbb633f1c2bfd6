"""Directories of runs as training leaves them, without the training."""

import dataclasses
import json

import jax
from support.seeded import random_params
from support.tiny import TINY, train_config

from mor_jax.checkpoint.checkpointer import Checkpointer
from mor_jax.checkpoint.run_dir import claim_workdir
from mor_jax.config import CheckpointConfig, MeshConfig, ModelConfig
from mor_jax.distributed import mesh as sharding
from mor_jax.models.params import abstract_params, logical_axes

STEP = 7


def model(name: str) -> ModelConfig:
    """`TINY[name]` for the byte tokenizer."""
    return dataclasses.replace(TINY[name], vocab_size=256)


def trained(path, name, *, fsdp=1, change=None):
    """A run at step 7; its parameters. fsdp: devices that the checkpoint was written from."""
    cfg = train_config(model=model(name), mesh=MeshConfig(data=1, fsdp=fsdp))
    params = random_params(cfg.model)
    params = params if change is None else change(params)
    state = {"params": params, "step": jax.numpy.int32(STEP)}
    if fsdp > 1:
        mesh = sharding.make_mesh(cfg.mesh)
        shapes = abstract_params(cfg.model)
        where = sharding.param_shardings(mesh, logical_axes(cfg.model), shapes)
        state["params"] = jax.device_put(params, where)
    claim_workdir(path, cfg)
    evaluated = {"eval/loss_causal": 1.25, "eval/loss_topk": 1.125, "eval/depth_causal": 1.5}
    record = json.dumps({"step": STEP, "time": 0.0, **evaluated})
    (path / "metrics.jsonl").write_text(record + "\n")
    with Checkpointer(path, CheckpointConfig()) as checkpoints:
        checkpoints.save(STEP, state, 0, cfg.to_dict())
    return params
