"""Imports foreign weights as a run, which can be trained, evaluated, served and exported."""

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from mor_jax import data
from mor_jax.checkpoint import pretrained
from mor_jax.checkpoint import run_dir as workdir
from mor_jax.checkpoint.lazy_arrays import LazyArrays
from mor_jax.config import DataConfig, EvalConfig, ModelConfig, OptimConfig, TrainConfig
from mor_jax.config.parsing import check
from mor_jax.convert.imported_model import ImportedModel
from mor_jax.convert.output_directory import PathLike, absolute, check_target, fresh_directory
from mor_jax.convert.upcycle import parse_upcycle, upcycle, upcycle_notes, upcycled_config

Origin = Literal["hf", "reference", "gguf"]
ORIGINS: tuple[Origin, ...] = get_args(Origin)

TOKENIZER = "tokenizer"
"""Subdirectory of a run for the tokenizer imported with its weights."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """Options of an import.

    workdir: the new run. dtype: compute dtype of training; weights are float32. tokenizer: `bytes`
    or a path, instead of the source's own. upcycle: text for `parse_upcycle`. config: the
    reference's YAML. replace: replace an earlier import.
    """

    workdir: PathLike
    dtype: Literal["float32", "bfloat16"] = "float32"
    tokenizer: str | None = None
    upcycle: str | None = None
    config: str | None = None
    replace: bool = False


@dataclasses.dataclass(frozen=True)
class ImportResult:
    """Result of an import.

    stored: number of parameters. facts: about the source. notes: remarks to print.
    """

    workdir: Path
    cfg: TrainConfig
    stored: int
    facts: dict[str, Any]
    notes: tuple[str, ...]
    seconds: float


def import_run(origin: Origin, source: str, options: ImportOptions) -> ImportResult:
    """Imports `source` as a run; the directory is complete or absent.

    Memory: one array of our model and one tensor of the source.

    Raises:
        ValueError: the source is not such a model or is damaged, tensors do not fit (all are
            listed), or an option or the directory is invalid. Nothing is left behind then.
    """
    check(origin in ORIGINS, "from", origin, f"must be one of {ORIGINS}", "Try 'hf'")
    rule = "applies to --from=reference only"
    valid = options.config is None or origin == "reference"
    check(valid, "reference_config", options.config, rule, "Omit it")
    sources = [path for path in (source, options.config, options.tokenizer) if path is not None]
    output = {"replace": options.replace, "sources": sources, "name": "workdir"}
    target = check_target(options.workdir, **output)
    start = time.perf_counter()
    imported = _readers(options)[origin](source)
    notes = [str(note) for note in imported.facts.get("notes", ())]
    model, params = imported.cfg, imported.params
    if options.upcycle is not None:
        model, params, upcycle_remarks = _upcycled(imported, options.upcycle)
        notes += upcycle_remarks
    files = {} if options.tokenizer else dict(imported.tokenizer or {})
    name = (
        str(target / TOKENIZER) if files else _check_tokenizer(options.tokenizer, model.vocab_size)
    )
    if name is None:
        notes.append("the source has no tokenizer: set data.tokenizer before training")
    cfg = run_config(dataclasses.replace(model, dtype=options.dtype), name or "bytes")
    facts = {**imported.facts, "from": f"{source} ({origin})", "notes": notes, "tokenizer": name}
    with fresh_directory(target, **output) as draft:
        for file, content in files.items():
            (draft / TOKENIZER).mkdir(exist_ok=True)
            (draft / TOKENIZER / file).write_bytes(content)
        pretrained.write(draft, cfg.model, params, facts)
        text = json.dumps(workdir.to_plain(cfg), indent=2) + "\n"
        (draft / workdir.CONFIG_FILE).write_text(text)
    stored = sum(math.prod(spec.shape) for spec in params.specs.values())
    return ImportResult(target, cfg, stored, facts, tuple(notes), time.perf_counter() - start)


def run_config(model: ModelConfig, tokenizer: str) -> TrainConfig:
    """A training configuration for imported weights, sized for a small machine.

    All of it may be changed until the first checkpoint is written.
    """
    cfg = TrainConfig(
        steps=1000,
        batch_size=8,
        seq_len=min(1024, model.max_seq_len),
        model=model,
        optim=OptimConfig(lr=3e-4, warmup_steps=50, decay_steps=200),
        data=DataConfig(tokenizer=tokenizer),
        eval=EvalConfig(completion_tokens=min(40, model.max_seq_len // 2)),
    )
    cfg.validate()
    return cfg


def _readers(options: ImportOptions) -> dict[Origin, Callable[[str], ImportedModel]]:
    # Imported here so that only the requested origin's libraries are needed.
    from mor_jax.convert import import_gguf, import_hf, import_reference

    # If --tokenizer is given, the source's own tokenizer is not read.
    own = options.tokenizer is None
    return {
        "hf": partial(import_hf.import_hf, tokenizer=own),
        "gguf": partial(import_gguf.import_gguf, tokenizer=own),
        "reference": lambda source: import_reference.import_reference(
            source, options.config or _only_yaml(source), own
        ),
    }


def _only_yaml(source: str) -> str:
    # The reference stores it elsewhere; our own exports have it beside the weights.
    path = Path(os.path.expanduser(source))
    check(path.exists(), "source", source, "is neither a file nor a directory", "Check the path")
    folder = path if path.is_dir() else path.parent
    files = sorted(str(file) for file in folder.glob("*.yaml"))
    rule = f"{folder} contains {len(files)} YAML files, and exactly one must describe the model"
    fix = "Pass --reference_config=FILE, the training run's YAML from conf/pretrain/"
    check(len(files) == 1, "reference_config", None, rule, fix)
    return files[0]


def _upcycled(imported: ImportedModel, text: str) -> tuple[ModelConfig, LazyArrays, list[str]]:
    chosen = parse_upcycle(text)
    model = upcycled_config(imported.cfg, chosen)
    params = upcycle(imported.cfg, model, imported.params, chosen)
    return model, params, upcycle_notes(imported.cfg, chosen)


def _check_tokenizer(tokenizer: str | None, vocab_size: int) -> str | None:
    """The name of a tokenizer from --tokenizer, which stays where it is and must fit."""
    if tokenizer is None:
        return None
    loaded = data.load_tokenizer(tokenizer, "tokenizer")
    data.check_vocabulary(loaded, vocab_size)
    return tokenizer if tokenizer == "bytes" else str(absolute(tokenizer))
