"""Imports a Hugging Face directory or hub repository: plain Llamas and our own exports."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mor_jax.checkpoint.lazy_arrays import LazyArrays
from mor_jax.config import ModelConfig
from mor_jax.convert.hf_config import (
    CONFIG,
    is_tied,
    llama_config,
    mor_config,
    read_config,
    remarks,
)
from mor_jax.convert.imported_model import ImportedModel, source_facts, tokenizer_beside
from mor_jax.convert.names import EMBEDDING, HEAD, TensorName, llama_entries, mor_entries
from mor_jax.convert.size_checks import check_layers, check_sizes
from mor_jax.convert.sources import check_readable, open_weights
from mor_jax.convert.sources.hub import locate_model
from mor_jax.convert.views import as_params


def import_hf(path: str, weights: str | None = None, tokenizer: bool = True) -> ImportedModel:
    """The model in directory `path`, or in the hub's repository `owner/name[@revision]`.

    weights: file or directory of the tensors, if they are not beside config.json. tokenizer:
    whether to read the tokenizer beside the model.

    Raises:
        ValueError: no model, another architecture than Llama or ours, unsupported options, or
            tensors that do not match config.json.
    """
    location = locate_model(path)
    directory = location if location.is_dir() else location.parent
    check_readable(location)
    hf = read_config(directory)
    where = str(directory / CONFIG)
    opened = open_weights(
        Path(os.path.expanduser(weights)) if weights else _weights(path, directory)
    )
    tied, notes = are_tied(opened.tensors, hf, where)
    cfg, table = _model(hf, where, tied, opened.tensors)
    params = as_params(cfg, table, opened.tensors)
    notes = (*remarks(hf), *notes)
    if hf.get("thresholds") or hf.get("routing", "causal") != "causal":
        note = "routing and thresholds in config.json apply to generation only and are not imported"
        notes = (*notes, note)
    facts = source_facts(opened, architecture=hf.get("model_type", "llama"), notes=notes)
    files = tokenizer_beside(directory, cfg.vocab_size) if tokenizer else None
    return ImportedModel(cfg, params, files, facts)


def _weights(path: str, directory: Path) -> Path:
    # An explicitly given file is read even if there are others beside it.
    named = Path(os.path.expanduser(path))
    return named if named.is_file() and named.name != CONFIG else directory


def _model(
    hf: Mapping[str, Any], where: str, tied: bool, tensors: LazyArrays
) -> tuple[ModelConfig, Sequence[TensorName]]:
    ours = hf.get("model_type") == "mor"
    cfg = (mor_config if ours else llama_config)(hf, where, tied=tied)
    check_sizes(hf, tensors, where)
    key, layers = f"{where}: num_hidden_layers", hf["num_hidden_layers"]
    if ours:
        key += f" (sharing={cfg.sharing}, num_recursions={cfg.num_recursions})"
    check_layers(key, layers, cfg.unique_layers, tensors.specs)
    return cfg, (mor_entries if ours else llama_entries)(cfg)


def are_tied(
    tensors: LazyArrays, hf: Mapping[str, Any], where: str
) -> tuple[bool, tuple[str, ...]]:
    """Whether embedding and unembedding are tied, and a note if config.json says otherwise.

    The tensors decide if both exist; otherwise config.json does.
    """
    declared = is_tied(hf, where)
    specs = tensors.specs
    if HEAD not in specs or EMBEDDING not in specs:
        return declared, ()
    alike = specs[HEAD].shape == specs[EMBEDDING].shape
    tied = alike and np.array_equal(tensors.read(HEAD), tensors.read(EMBEDDING))
    if tied == declared:
        return tied, ()
    actual, claimed = ("tied", "untied") if tied else ("untied", "tied")
    note = f"embedding and unembedding are {actual}, though config.json says {claimed}"
    return tied, (note,)
