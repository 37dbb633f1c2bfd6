"""Imports a checkpoint of the paper authors' code (the reference).

Their checkpoints contain tensors only. The YAML file of the training run describes the model: the
shape of a Llama (the config.json of the base model, changed by `model_config`) and the blocks
`recursive`, `mor` and `kv_sharing`.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mor_jax.config.optional_import import require_package
from mor_jax.config.parsing import check, fail
from mor_jax.convert.hf_config import CONFIG, read_config
from mor_jax.convert.import_hf import are_tied
from mor_jax.convert.imported_model import ImportedModel, source_facts, tokenizer_beside
from mor_jax.convert.names import entries
from mor_jax.convert.reference_config import DEFAULTS, merge_options, model_config
from mor_jax.convert.size_checks import check_reference_layers
from mor_jax.convert.sources import open_weights
from mor_jax.convert.sources.hub import locate_model
from mor_jax.convert.views import as_params

_BASE, _CHANGES = "model_name_or_path", "model_config"


def import_reference(path: str, reference_config: str, tokenizer: bool = True) -> ImportedModel:
    """The model at `path`, trained by the paper authors' code with the YAML `reference_config`.

    path: the directory of a checkpoint, or the file with its tensors. The Llama's config.json comes
    from there, or else from the base model that the YAML names. tokenizer: whether to read a
    tokenizer beside either.

    Raises:
        ValueError: missing or damaged files, unsupported options, tensors that do not match the
            model, or attention that differs between recursions.
    """
    source, yaml_file = Path(os.path.expanduser(path)), Path(os.path.expanduser(reference_config))
    settings = read_yaml(yaml_file)
    opened = open_weights(source)
    directory = _config_directory(source if source.is_dir() else source.parent, settings, yaml_file)
    hf = read_config(directory) | dict(settings.get(_CHANGES) or {})
    where = str(directory / CONFIG)
    tied, notes = are_tied(opened.tensors, hf, where)
    options = merge_options(settings)
    cfg = model_config(hf, options, tied=tied)
    if cfg.num_layers != hf["num_hidden_layers"]:
        note = f"{hf['num_hidden_layers']} layers became {cfg.num_layers} to fit the sharing scheme"
        notes = (*notes, note)
    layers = hf["num_hidden_layers"]
    check_reference_layers(
        f"{where}: num_hidden_layers", layers, cfg.unique_layers, opened.tensors.specs
    )
    params = as_params(cfg, entries(cfg), opened.tensors)
    places = [source, directory] if source.is_dir() else [directory]
    tried = (tokenizer_beside(place, cfg.vocab_size) for place in places if tokenizer)
    files = next((files for files in tried if files is not None), None)
    facts = source_facts(opened, architecture="reference", notes=notes, name=settings.get("name"))
    return ImportedModel(cfg, params, files, facts)


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings of a training run of the reference.

    Raises:
        ValueError: not a YAML file, not one of the reference, or one with unresolved references.
    """
    yaml = require_package("yaml", "reference_config", str(path))
    check(path.is_file(), "reference_config", str(path), "does not exist", "Check the path")
    try:
        settings = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        fail("reference_config", str(path), f"is not a YAML file ({error})", "Check the file")
    valid = isinstance(settings, Mapping) and any(key in settings for key in (*DEFAULTS, _BASE))
    rule = f"has none of the settings {[*DEFAULTS, _BASE]}"
    check(valid, "reference_config", str(path), rule, "Pass the YAML file of the training run")
    unresolved = [place for place, value in _leaves(settings) if "${" in str(value)]
    rule = f"has unresolved references in {unresolved[:5]}"
    fix = "Write the values out, or pass the resolved file that the run saved"
    check(not unresolved, "reference_config", str(path), rule, fix)
    return dict(settings)


def _leaves(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Settings that describe the model, by dotted name."""
    leaves = []
    for key, value in settings.items():
        if not prefix and key not in (*DEFAULTS, _BASE, _CHANGES):
            continue
        if isinstance(value, Mapping):
            leaves += _leaves(value, f"{prefix}{key}.")
        else:
            leaves.append((f"{prefix}{key}", value))
    return leaves


def _config_directory(beside: Path, settings: Mapping[str, Any], yaml_file: Path) -> Path:
    """The directory with the Llama's config.json."""
    if (beside / CONFIG).is_file():
        return beside
    base = settings.get(_BASE)
    rule = f"names no base model, and there is no {CONFIG} in {beside}"
    fix = f"Copy the base model's {CONFIG} there"
    check(bool(base), f"{yaml_file}: {_BASE}", base, rule, fix)
    # A relative path may also be relative to the YAML file.
    for place in (Path(os.path.expanduser(base)), yaml_file.parent / base):
        if (place / CONFIG).is_file():
            return place
    try:
        return locate_model(str(base), weights=False)
    except ValueError as error:
        raise ValueError(f"{yaml_file}: {_BASE}: {error}. Or: {fix}") from error
