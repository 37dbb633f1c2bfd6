"""A Hugging Face directory, or a repository of the hub -> our parameters.

Plain Llama models, and what our own export wrote.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mor_jax.checkpoint.lazy_arrays import LazyArrays
from mor_jax.config import ModelConfig
from mor_jax.convert.fitting import check_layers, check_sizes
from mor_jax.convert.hf_config import (
    CONFIG,
    is_tied,
    llama_config,
    mor_config,
    read_config,
    remarks,
)
from mor_jax.convert.imported import ImportedModel, facts_of, tokenizer_beside
from mor_jax.convert.names import EMBEDDING, HEAD, TensorName, llama_entries, mor_entries
from mor_jax.convert.sources import check_readable, open_weights
from mor_jax.convert.sources.hub import locate_model
from mor_jax.convert.views import as_params


def import_hf(path: str, weights: str | None = None, tokenizer: bool = True) -> ImportedModel:
    """The model in directory `path`, or of the hub's repository `owner/name[@revision]`.

    weights: where the tensors lie, if not beside config.json: a file or a directory, such as one
    of a trainer. tokenizer: whether the one that lies there is wanted.

    Raises:
        ValueError: no model, another architecture than Llama or ours, options that we do not have,
            or tensors that do not make the model that config.json describes.
    """
    place = locate_model(path)
    directory = place if place.is_dir() else place.parent
    check_readable(place)
    hf = read_config(directory)
    where = str(directory / CONFIG)
    found = open_weights(
        Path(os.path.expanduser(weights)) if weights else _weights(path, directory)
    )
    tied, notes = are_tied(found.tensors, hf, where)
    cfg, table = _model(hf, where, tied, found.tensors)
    params = as_params(cfg, table, found.tensors)
    notes = (*remarks(hf), *notes)
    if hf.get("thresholds") or hf.get("routing", "causal") != "causal":
        told = "routing and thresholds in config.json belong to generation: not taken over"
        notes = (*notes, told)
    facts = facts_of(found, architecture=hf.get("model_type", "llama"), notes=notes)
    files = tokenizer_beside(directory, cfg.vocab_size) if tokenizer else None
    return ImportedModel(cfg, params, files, facts)


def _weights(path: str, directory: Path) -> Path:
    # A file that was named is read even where others lie beside it.
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
    """Whether the unembedding repeats the embedding, and a note where config.json says otherwise.

    The tensors decide where both are there; without an unembedding it is as config.json says.
    """
    told = is_tied(hf, where)
    specs = tensors.specs
    if HEAD not in specs or EMBEDDING not in specs:
        return told, ()
    alike = specs[HEAD].shape == specs[EMBEDDING].shape
    tied = alike and np.array_equal(tensors.read(HEAD), tensors.read(EMBEDDING))
    if tied == told:
        return tied, ()
    words = ("are one", "differ") if tied else ("differ", "are one")
    note = f"embedding and unembedding {words[0]}, though config.json says that they {words[1]}"
    return tied, (note,)
