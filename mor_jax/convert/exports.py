"""Exports a run's weights to Hugging Face, a plain Llama, or the reference's format."""

import concurrent.futures
import dataclasses
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from mor_jax.checkpoint.lazy_arrays import LazyArrays
from mor_jax.config.parsing import check
from mor_jax.convert.card import model_card
from mor_jax.convert.export_config import llama_config, mor_config, reference_options
from mor_jax.convert.modeling_file import MODELING, modeling_text
from mor_jax.convert.names import TensorName, entries, llama_entries, mor_entries
from mor_jax.convert.output_directory import PathLike, absolute, check_target, fresh_directory
from mor_jax.convert.run_source import RunSource
from mor_jax.convert.shards import DEFAULT_SHARD, DTYPES, Dtype, write_shards
from mor_jax.convert.tokenizers.export import special_ids, tokenizer_files
from mor_jax.convert.views import as_tensors

Target = Literal["hf", "llama", "reference"]
TARGETS: tuple[Target, ...] = get_args(Target)

GENERATION = "generation_config.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Options of an export.

    output: its directory. dtype: dtype of the weights. shard_bytes: size limit of a safetensors
    file. unroll: unroll a recursive model into a plain Llama. replace: replace an earlier export.
    """

    output: PathLike
    dtype: Dtype = "float32"
    shard_bytes: int = DEFAULT_SHARD
    unroll: bool = False
    replace: bool = False

    def validate(self) -> None:
        """Raises `ValueError` on an invalid setting, or a directory that may not be written."""
        check(self.dtype in DTYPES, "dtype", self.dtype, f"must be one of {DTYPES}", "Try float32")
        check_target(self.output, replace=self.replace)


@dataclasses.dataclass(frozen=True)
class ExportResult:
    """Result of an export. stored: number of stored values. size: bytes of all files."""

    output: Path
    files: tuple[str, ...]
    stored: int
    size: int
    seconds: float


def export(run: RunSource, target: Target, options: ExportOptions) -> ExportResult:
    """Writes `run` for `target`; the directory is complete or absent.

    Memory: one array of the model and one shard.

    Raises:
        ValueError: the target format cannot express the model, an option or the directory is
            invalid, or a weight is not finite. Nothing is left behind then.
    """
    writers: dict[Target, Callable[[RunSource, ExportOptions, Path], int]] = {
        "hf": _hf,
        "llama": _llama,
        "reference": _reference,
    }
    check(target in writers, "to", target, f"must be one of {TARGETS}", "Try 'hf'")
    rule = f"recursions are unrolled for --to=llama only; --to={target} stores them shared"
    check(target == "llama" or not options.unroll, "unroll", True, rule, "Omit it")
    options.validate()
    start = time.perf_counter()
    sources = [run.path, *([] if run.tokenizer is None else [run.tokenizer.name])]
    with (
        concurrent.futures.ThreadPoolExecutor(1, "check") as thread,
        fresh_directory(options.output, replace=options.replace, sources=sources) as draft,
    ):
        checked = thread.submit(run.check)
        stored = writers[target](run, options, draft)
        # Raises if the check found damage, before the output is published.
        checked.result()
        size = sum(file.stat().st_size for file in draft.rglob("*") if file.is_file())
        files = tuple(sorted(str(file.relative_to(draft)) for file in draft.rglob("*")))
    output = absolute(options.output)
    return ExportResult(output, files, stored, size, time.perf_counter() - start)


def _hf(run: RunSource, options: ExportOptions, draft: Path) -> int:
    tensors = _tensors(run, mor_entries(run.cfg.model))
    (draft / MODELING).write_text(modeling_text(), encoding="utf-8")
    write_shards(draft, tensors, options.dtype, options.shard_bytes)
    _write_settings(run, draft, mor_config(run.cfg.model), options.dtype)
    use = _USE.format(title=_title(options), code=", trust_remote_code=True")
    if run.cfg.model.router.kind == "expert":
        use += _ROUTING
    (draft / "README.md").write_text(model_card(run, _title(options), use))
    return _count(tensors)


def _llama(run: RunSource, options: ExportOptions, draft: Path) -> int:
    cfg = run.cfg.model
    rule = f"a plain Llama stores the shared layers {cfg.num_recursions} times"
    fix = "Use --to=hf, which stores shared weights once"
    if cfg.router.kind == "none":
        fix = f"Pass --unroll to accept that, or u{fix[1:]}"
    check(cfg.sharing == "none" or options.unroll, "model.sharing", cfg.sharing, rule, fix)
    tensors = _tensors(run, llama_entries(cfg))
    write_shards(draft, tensors, options.dtype, options.shard_bytes)
    _write_settings(run, draft, llama_config(cfg), options.dtype)
    use = _USE.format(title=_title(options), code="")
    (draft / "README.md").write_text(model_card(run, _title(options), use))
    return _count(tensors)


def _reference(run: RunSource, options: ExportOptions, draft: Path) -> int:
    import yaml

    from mor_jax.convert.torch_writer import write_torch

    cfg = run.cfg.model
    blocks = reference_options(cfg)
    table = entries(cfg)
    tensors = _tensors(run, table)
    aliases = {entry.name: entry.canonical for entry in table if entry.is_alias}
    write_torch(draft / "pytorch_model.bin", tensors, aliases, options.dtype)
    _write_settings(run, draft, llama_config(cfg), options.dtype)
    name = _title(options)
    text = yaml.safe_dump(_reference_run(run, options, blocks), sort_keys=False)
    (draft / f"{name}.yaml").write_text(text)
    use = _REFERENCE_USE.format(name=name)
    (draft / "README.md").write_text(model_card(run, _title(options), use))
    return _count(tensors)


def _reference_run(run: RunSource, options: ExportOptions, blocks: dict[str, Any]) -> dict:
    precision = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[options.dtype]
    output = absolute(options.output)
    return {
        "name": output.name,
        "model": "smollm",
        "model_name_or_path": str(output),
        "model_config": None,
        "tokenizer": "smollm",
        "add_bos_token": False,
        "max_length": run.cfg.seq_len,
        "precision": precision,
        "attn_implementation": "flash_attention_2",
        "use_pretrained_weights": False,
        "num_train_steps": run.cfg.steps,
        "num_warmup_steps": run.cfg.optim.warmup_steps,
        "gradient_accumulation_steps": run.cfg.grad_accum_steps,
        **blocks,
    }


def _tensors(run: RunSource, table: Sequence[TensorName]) -> LazyArrays:
    return as_tensors(run.cfg.model, table, run.params)


def _write_settings(run: RunSource, draft: Path, config: dict[str, Any], dtype: Dtype) -> None:
    """Writes config.json, generation_config.json and the tokenizer's files."""
    files = {} if run.tokenizer is None else tokenizer_files(run.tokenizer)
    for name, content in files.items():
        (draft / name).write_bytes(content)
    ids = {} if run.tokenizer is None else special_ids(run.tokenizer, files)
    _write_json(draft / "config.json", config | ids | {"torch_dtype": dtype})
    # The tokenizer's generation settings may lack the end-of-text token.
    generation = json.loads(files.get(GENERATION, b"{}"))
    _write_json(draft / GENERATION, ids | generation)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")


def _count(tensors: LazyArrays) -> int:
    return sum(math.prod(spec.shape) for spec in tensors.specs.values())


def _title(options: ExportOptions) -> str:
    return absolute(options.output).name


_USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

path = "{title}"  # path of this directory
tokenizer = AutoTokenizer.from_pretrained(path{code})
model = AutoModelForCausalLM.from_pretrained(path{code})
ids = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=40)[0]))
```"""

_ROUTING = """

Each token is routed by its own score alone, as generation requires. The routing of training, which
selects the top tokens of the whole sequence and so depends on later tokens, is also available:
`model(**ids, routing="topk", use_cache=False)`."""

_REFERENCE_USE = """For the code of the paper's authors: copy `{name}.yaml` to its `conf/pretrain/`
and this directory to where its configuration expects checkpoints. `pytorch_model.bin` is their
state dict, with shared weights tied; `config.json` describes the base model that
`model_name_or_path` names, not this one. `tokenizer` in the YAML is one of their names; this
directory has the files of the model's own tokenizer."""
