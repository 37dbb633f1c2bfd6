"""Small runs on disk, for whatever loads a model to serve."""

import dataclasses

from support.seeded import random_params
from support.tiny import TINY, train_config

from mor_jax.checkpoint import pretrained
from mor_jax.checkpoint.lazy_arrays import flatten, from_arrays
from mor_jax.checkpoint.run_dir import claim_workdir
from mor_jax.config import DataConfig, EvalConfig


def write_run(workdir, model, *, params=None, seed=1, tokenizer="bytes", sources=("stdlib",)):
    """Weights to start from in a new directory `workdir`; returns the run's configuration."""
    cfg = train_config(
        model=model,
        data=DataConfig(sources=sources, tokenizer=tokenizer, validation_fraction=0.2),
        eval=EvalConfig(interval=None, batches=8, batch_size=4, prompt="", completion_tokens=0),
    )
    claim_workdir(workdir, cfg)
    params = random_params(model, seed) if params is None else params
    pretrained.write(workdir, model, from_arrays(dict(flatten(params))), {"from": "a/model"})
    return cfg


def of_bytes(name, **changes):
    """The model `TINY[name]` with a vocabulary of all bytes."""
    return dataclasses.replace(TINY[name], vocab_size=256, **changes)


def with_router(model, **changes):
    """`model` with other settings of its router."""
    return dataclasses.replace(model, router=dataclasses.replace(model.router, **changes))
