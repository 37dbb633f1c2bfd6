"""Reads recorded cases of the reference: the model, the batch and the recorded arrays.

A case is `NAME.json` (options, names and shapes) and `NAME.npz` (arrays). Flat vectors concatenate
the unique parameters in the order of `param_layout`.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mor_jax.config import Attention, ModelConfig
from mor_jax.config.parsing import check, fail
from mor_jax.convert.names import HEAD
from mor_jax.convert.reference_config import merge_options, model_config
from mor_jax.convert.state_dict import to_params
from mor_jax.types import IGNORE, Batch, Params

# Required keys of a case and the types of their values; a trajectory has more.
COMMON: dict[str, type] = {"hf_config": dict, "param_layout": list, "tied": dict}
TRAJECTORY: dict[str, type] = {
    "hp": dict,
    "steps": int,
    "grad_accum": int,
    "batch": int,
    "lr_used_per_step": list,
    "decay_names": list,
}
JSON_NAMES = {dict: "object", list: "array", int: "whole number"}
BLOCKS = ("recursive", "mor", "kv_sharing")


@dataclasses.dataclass(frozen=True)
class Case:
    """One recorded case. spec: its JSON. arrays: its NPZ. attention: the kernel to use."""

    name: str
    spec: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray]
    attention: Attention = "auto"

    @property
    def is_trajectory(self) -> bool:
        """Whether it records optimiser steps rather than one forward and backward pass."""
        return "init_flat" in self.arrays

    @cached_property
    def config(self) -> ModelConfig:
        """Our configuration of the recorded model. Raises `ValueError` if there is none."""
        resolved = self.spec.get("resolved", {})
        blocks = {name: resolved[name] for name in BLOCKS if name in resolved}
        cfg = model_config(
            self.spec["hf_config"],
            merge_options(self.spec.get("cfg"), blocks),
            layers=resolved.get("num_hidden_layers_after"),
            tied=HEAD in self.spec["tied"],
            attention=self.attention,
        )
        # The reference's rotary embedding has no maximum sequence length.
        length = self.arrays["input_ids"].shape[-1]
        return dataclasses.replace(cfg, max_seq_len=max(cfg.max_seq_len, length))

    @property
    def items(self) -> float:
        """The count by which the reference divided the summed cross-entropy."""
        labels = self.arrays.get("labels", self.arrays["input_ids"])
        recorded = self.spec.get("meta", {}).get("num_items_in_batch")
        return float(self.spec.get("num_items_in_batch") or recorded or np.sum(labels != IGNORE))

    @property
    def passes_before(self) -> int:
        """Training forward passes before the first recorded one; warm-ups count them."""
        return int(self.spec.get("training_step", 0))

    def tensors(self, key: str) -> dict[str, np.ndarray]:
        """The flat vector `key` (`params_flat`, ...) as tensors by reference name.

        Raises:
            ValueError: the vector's length is not that of the layout.
        """
        flat, layout = self.arrays[key], self.spec["param_layout"]
        counts = [math.prod(shape) for _, shape in layout]
        rule = f"must have the {sum(counts)} values of param_layout"
        check(flat.shape == (sum(counts),), key, flat.shape, rule, "Record the case again")
        chunks = np.split(flat, np.cumsum(counts)[:-1])
        pairs = zip(layout, chunks, strict=True)
        return {name: chunk.reshape(shape) for (name, shape), chunk in pairs}

    def params(self, key: str) -> Params:
        """The flat vector `key` as our parameter tree, with the recorded aliases."""
        state = self.tensors(key)
        aliases = {alias: state[name] for alias, name in self.spec["tied"].items()}
        return to_params(self.config, state | aliases)


def load_case(path: Path, attention: Attention = "auto") -> Case:
    """Reads `path` (.json) and the .npz file of the same name.

    Raises:
        ValueError: one of the two is missing or not a valid case.
    """
    arrays = path.with_suffix(".npz")
    for file in (path, arrays):
        check(
            file.exists(),
            str(file),
            None,
            "the file is missing",
            "A case needs its .json and its .npz file",
        )
    spec = _read(path)
    with np.load(arrays) as archive:
        values = {key: archive[key] for key in archive.files}
    trajectory = TRAJECTORY if "init_flat" in values else {}
    for key, kind in (COMMON | trajectory).items():
        ok = isinstance(spec.get(key), kind) and not isinstance(spec.get(key), bool)
        rule = f"is required, as a JSON {JSON_NAMES[kind]}"
        check(ok, f"{path}: {key}", spec.get(key), rule, "Record the case again")
    counts = [key for key in ("steps", "grad_accum", "batch") if key in trajectory]
    for key, least in (*((key, 1) for key in counts), ("training_step", 0)):
        value = spec.get(key, 0)
        ok = type(value) is int and value >= least
        check(
            ok, f"{path}: {key}", value, f"must be a whole number, at least {least}", "Correct it"
        )
    is_case = any(key in values for key in ("params_flat", "init_flat"))
    rule = "needs input_ids, and params_flat (a pass) or init_flat (a trajectory)"
    check(is_case and "input_ids" in values, str(arrays), sorted(values), rule, "Record it again")
    _check_tokens(arrays, values["input_ids"], spec["hf_config"].get("vocab_size"))
    return Case(path.stem, spec, values, attention)


def _read(path: Path) -> dict[str, Any]:
    try:
        spec = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        line = getattr(error, "lineno", 1)
        fail(f"{path}:{line}", "...", f"is not JSON ({error})", "Record the case again")
    check(
        isinstance(spec, dict),
        str(path),
        type(spec).__name__,
        "must be a JSON object",
        "Correct it",
    )
    return spec


def _check_tokens(path: Path, ids: np.ndarray, vocabulary: int | None) -> None:
    place = f"{path}: input_ids"
    ok = ids.ndim == 2 and ids.size > 0 and np.issubdtype(ids.dtype, np.integer)
    check(
        ok,
        place,
        f"{ids.dtype}{ids.shape}",
        "must be sequences of whole numbers",
        "Record it again",
    )
    if isinstance(vocabulary, int):
        bounds = (int(np.min(ids)), int(np.max(ids)))
        rule = f"tokens must be 0 to vocab_size - 1 = {vocabulary - 1}"
        check(
            bounds[0] >= 0 and bounds[1] < vocabulary, place, bounds, rule, "Record the case again"
        )


def batch_of(
    tokens: np.ndarray, labels: np.ndarray | None = None, mask: np.ndarray | None = None
) -> Batch:
    """A batch from unshifted labels (default: the tokens) and a mask that is 0 at padding."""
    labels = tokens if labels is None else labels
    none = np.full_like(labels[:, :1], IGNORE)
    targets = np.concatenate([labels[:, 1:], none], axis=1)
    segments = None if mask is None or np.all(mask) else mask.astype(np.int32)
    return Batch(tokens.astype(np.int32), targets.astype(np.int32), segments)
