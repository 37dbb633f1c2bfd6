"""The result of reading a foreign model: configuration, lazily read weights, tokenizer."""

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mor_jax.checkpoint.lazy_arrays import LazyArrays
from mor_jax.config import ModelConfig
from mor_jax.config.optional_import import require_package
from mor_jax.config.parsing import check, fail
from mor_jax.convert.sources import Weights
from mor_jax.convert.tokenizers.export import TOKENIZER_FILES
from mor_jax.data.tokenizers.load import files_beside


@dataclasses.dataclass(frozen=True)
class ImportedModel:
    """A foreign model, ready to be written as a run.

    cfg: with dtype float32. params: our parameters by dotted path. tokenizer: its files by name,
    None if there is none. facts: the entries about the source in the conversion's report.
    """

    cfg: ModelConfig
    params: LazyArrays
    tokenizer: Mapping[str, bytes] | None
    facts: Mapping[str, Any]


def source_facts(
    weights: Weights, tensors: LazyArrays | None = None, **more: Any
) -> dict[str, Any]:
    """Report entries about a source: path, format, tensors by stored dtype, notes, and `more`."""
    specs = (tensors or weights.tensors).specs
    stored = Counter(spec.dtype for spec in specs.values())
    float64 = [name for name, spec in specs.items() if spec.dtype in ("float64", "F64")]
    rounded = [f"{len(float64)} float64 tensors were rounded to float32"] if float64 else []
    notes = (*weights.notes, *more.pop("notes", ()), *rounded)
    return {
        "source": weights.tensors.where,
        "format": weights.format,
        "tensors": dict(stored.most_common()),
        **more,
        "notes": list(notes),
    }


def tokenizer_beside(directory: Path, vocab_size: int) -> dict[str, bytes] | None:
    """The tokenizer's files in `directory`; None without tokenizer.json and tokenizer.model.

    Raises:
        ValueError: a damaged file, or a tokenizer with more tokens than the model has.
    """
    files = files_beside(directory, TOKENIZER_FILES)
    if not {"tokenizer.json", "tokenizer.model"} & files.keys():
        return None
    check_tokenizer(files, vocab_size, str(directory))
    return files


def check_tokenizer(files: Mapping[str, bytes], vocab_size: int, where: str) -> None:
    """Raises `ValueError` unless every token of the tokenizer has a row of the embedding."""
    name = "tokenizer.json" if "tokenizer.json" in files else "tokenizer.model"
    largest = _largest_id(files[name], f"{where}/{name}")
    rule = f"has a token {largest}, but the model embeds {vocab_size} tokens, 0 to {vocab_size - 1}"
    fix = "Pass the tokenizer that the model was trained with: --tokenizer=DIR"
    check(largest < vocab_size, f"{where}/{name}", largest + 1, rule, fix)


def _largest_id(contents: bytes, where: str) -> int:
    """The largest token ID of a tokenizer.json or SentencePiece model."""
    if where.endswith(".model"):
        sentencepiece = require_package("sentencepiece", "path", where)
        processor = sentencepiece.SentencePieceProcessor()
        try:
            processor.LoadFromSerializedProto(contents)
        except RuntimeError as error:
            fail(
                where,
                f"{len(contents)} bytes",
                f"is not a SentencePiece model ({error})",
                "Copy it again",
            )
        return processor.vocab_size() - 1
    try:
        settings = json.loads(contents)
        vocabulary = settings["model"]["vocab"]
        ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else range(len(vocabulary))
        numbers = [*ids, *(token["id"] for token in settings.get("added_tokens") or ())]
        invalid = [number for number in numbers if type(number) is not int]
        if invalid:
            raise ValueError(f"a token has the ID {invalid[0]!r}")
        return max(numbers)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        rule = f"is damaged or not a Hugging Face tokenizer ({error!r})"
        fail(where, f"{len(contents)} bytes", rule, "Copy or download it again")
