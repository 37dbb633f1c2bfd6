"""The PyTorch model beside ours: its configuration, its weights, and both on the same rows."""

import functools
import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from support.seeded import random_params

import mor_jax.convert.hf
from mor_jax.checkpoint.lazy_arrays import flatten, from_arrays
from mor_jax.config import ModelConfig
from mor_jax.convert.export_config import mor_config
from mor_jax.convert.names import mor_entries
from mor_jax.convert.views import as_tensors

MODELING = Path(mor_jax.convert.hf.__file__).with_name("modeling_mor.py")


@functools.cache
def modeling() -> Any:
    """The module of the export, loaded as a file of its own, as it stands in an export."""
    spec = importlib.util.spec_from_file_location("modeling_mor", MODELING)
    module = importlib.util.module_from_spec(spec)
    sys.modules["modeling_mor"] = module
    spec.loader.exec_module(module)
    return module


def params_of(cfg: ModelConfig):
    """The weights of every test: with this seed, tokens of every variant take several depths."""
    return random_params(cfg, seed=2)


def hf_config(cfg: ModelConfig, **changes) -> Any:
    """The configuration of the export of `cfg`."""
    return modeling().MoRConfig(**(mor_config(cfg) | changes))


def torch_state(cfg: ModelConfig, params) -> dict[str, torch.Tensor]:
    """Our parameters under the names of the export."""
    view = as_tensors(cfg, mor_entries(cfg), from_arrays(dict(flatten(params))))
    return {name: torch.from_numpy(np.array(view.read(name))) for name in view.specs}


def torch_model(cfg: ModelConfig, **changes) -> Any:
    """The PyTorch model with the weights of `params_of(cfg)`, in evaluation mode."""
    model = modeling().MoRForCausalLM(hf_config(cfg, **changes)).eval()
    missing, unexpected = model.load_state_dict(torch_state(cfg, params_of(cfg)), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    return model
