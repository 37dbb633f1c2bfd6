"""A run's weights for other programs: Hugging Face, plain Llama, the reference's code."""

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
from mor_jax.convert.directory import PathLike, absolute, check_target, fresh_directory
from mor_jax.convert.export_config import llama_config, mor_config, reference_options
from mor_jax.convert.modeling_file import MODELING, modeling_text
from mor_jax.convert.names import TensorName, entries, llama_entries, mor_entries
from mor_jax.convert.run_source import RunSource
from mor_jax.convert.shards import DEFAULT_SHARD, DTYPES, Dtype, write_shards
from mor_jax.convert.tokenizers.export import special_ids, tokenizer_files
from mor_jax.convert.views import as_tensors

Target = Literal["hf", "llama", "reference"]
TARGETS: tuple[Target, ...] = get_args(Target)

GENERATION = "generation_config.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """How an export is written.

    output: its directory. dtype: of the weights. shard_bytes: largest safetensors file. unroll:
    write a recursive model out as a plain Llama. replace: an existing directory gives way.
    """

    output: PathLike
    dtype: Dtype = "float32"
    shard_bytes: int = DEFAULT_SHARD
    unroll: bool = False
    replace: bool = False

    def validate(self) -> None:
        """Raises `ValueError` on a setting out of range, or a directory that is taken."""
        check(self.dtype in DTYPES, "dtype", self.dtype, f"must be one of {DTYPES}", "Try float32")
        check_target(self.output, replace=self.replace)


@dataclasses.dataclass(frozen=True)
class ExportResult:
    """What was written. stored: numbers in its files. size: bytes of all files."""

    output: Path
    files: tuple[str, ...]
    stored: int
    size: int
    seconds: float


def export(run: RunSource, target: Target, options: ExportOptions) -> ExportResult:
    """Writes `run` for `target`; the directory is complete or absent.

    Memory: one array of the model and one shard.

    Raises:
        ValueError: the model cannot be expressed there, an option or the directory does not fit,
            or a weight is not finite. Nothing is left then.
    """
    writers: dict[Target, Callable[[RunSource, ExportOptions, Path], int]] = {
        "hf": _hf,
        "llama": _llama,
        "reference": _reference,
    }
    check(target in writers, "to", target, f"must be one of {TARGETS}", "Try 'hf'")
    rule = f"recursions are written out for --to=llama only, and --to={target} has them shared"
    check(target == "llama" or not options.unroll, "unroll", True, rule, "Leave it out")
    options.validate()
    start = time.perf_counter()
    sources = [run.path, *([] if run.tokenizer is None else [run.tokenizer.name])]
    with (
        concurrent.futures.ThreadPoolExecutor(1, "check") as thread,
        fresh_directory(options.output, replace=options.replace, sources=sources) as draft,
    ):
        checked = thread.submit(run.check)
        stored = writers[target](run, options, draft)
        # Damage that was found meanwhile comes out here, before anything is published.
        checked.result()
        size = sum(file.stat().st_size for file in draft.rglob("*") if file.is_file())
        files = tuple(sorted(str(file.relative_to(draft)) for file in draft.rglob("*")))
    output = absolute(options.output)
    return ExportResult(output, files, stored, size, time.perf_counter() - start)


def _hf(run: RunSource, options: ExportOptions, draft: Path) -> int:
    tensors = _tensors(run, mor_entries(run.cfg.model))
    (draft / MODELING).write_text(modeling_text(), encoding="utf-8")
    write_shards(draft, tensors, options.dtype, options.shard_bytes)
    _beside(run, draft, mor_config(run.cfg.model), options.dtype)
    use = _USE.format(title=_title(options), code=", trust_remote_code=True")
    if run.cfg.model.router.kind == "expert":
        use += _ROUTING
    (draft / "README.md").write_text(model_card(run, _title(options), use))
    return _count(tensors)


def _llama(run: RunSource, options: ExportOptions, draft: Path) -> int:
    cfg = run.cfg.model
    rule = f"recursions are written out {cfg.num_recursions} times in a plain Llama"
    fix = "Use --to=hf, which stores shared weights once"
    if cfg.router.kind == "none":
        fix = f"Give --unroll if that is meant, or u{fix[1:]}"
    check(cfg.sharing == "none" or options.unroll, "model.sharing", cfg.sharing, rule, fix)
    tensors = _tensors(run, llama_entries(cfg))
    write_shards(draft, tensors, options.dtype, options.shard_bytes)
    _beside(run, draft, llama_config(cfg), options.dtype)
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
    _beside(run, draft, llama_config(cfg), options.dtype)
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


def _beside(run: RunSource, draft: Path, config: dict[str, Any], dtype: Dtype) -> None:
    # config.json, generation_config.json and the tokenizer's files.
    files = {} if run.tokenizer is None else tokenizer_files(run.tokenizer)
    for name, content in files.items():
        (draft / name).write_bytes(content)
    ids = {} if run.tokenizer is None else special_ids(run.tokenizer, files)
    _write_json(draft / "config.json", config | ids | {"torch_dtype": dtype})
    # Settings of generation that came along may not say what ends a text.
    told = json.loads(files.get(GENERATION, b"{}"))
    _write_json(draft / GENERATION, ids | told)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")


def _count(tensors: LazyArrays) -> int:
    return sum(math.prod(spec.shape) for spec in tensors.specs.values())


def _title(options: ExportOptions) -> str:
    return absolute(options.output).name


_USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

path = "{title}"  # where this directory lies
tokenizer = AutoTokenizer.from_pretrained(path{code})
model = AutoModelForCausalLM.from_pretrained(path{code})
ids = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=40)[0]))
```"""

_ROUTING = """

Every token is routed by its own score alone, as generation needs. The rule of training, which takes
the best tokens of the whole row and so looks ahead, is there on request:
`model(**ids, routing="topk", use_cache=False)`."""

_REFERENCE_USE = """For the code of the paper's authors: put `{name}.yaml` into its `conf/pretrain/`
and this directory where its configuration expects checkpoints. `pytorch_model.bin` is their state
dict, shared weights tied; `config.json` is the base model that `model_name_or_path` names, not
this one. `tokenizer` in the YAML is a name of theirs: the files of this model's own lie here."""
