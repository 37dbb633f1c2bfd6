"""What every import gives: a configuration, weights to be read one at a time, a tokenizer."""

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
    """A foreign model.

    cfg: in float32. params: our parameters by dotted path. tokenizer: its files by name, None
    where there was none. facts: what the report of a conversion says about the source.
    """

    cfg: ModelConfig
    params: LazyArrays
    tokenizer: Mapping[str, bytes] | None
    facts: Mapping[str, Any]


def facts_of(weights: Weights, tensors: LazyArrays | None = None, **more: Any) -> dict[str, Any]:
    """The report's lines on a source: where, format, tensors by stored dtype, notes, and `more`."""
    specs = (tensors or weights.tensors).specs
    stored = Counter(spec.dtype for spec in specs.values())
    wide = [name for name, spec in specs.items() if spec.dtype in ("float64", "F64")]
    rounded = [f"{len(wide)} tensors of float64 were rounded to float32"] if wide else []
    notes = (*weights.notes, *more.pop("notes", ()), *rounded)
    return {
        "source": weights.tensors.where,
        "format": weights.format,
        "tensors": dict(stored.most_common()),
        **more,
        "notes": list(notes),
    }


def tokenizer_beside(directory: Path, vocab_size: int) -> dict[str, bytes] | None:
    """The tokenizer's files in `directory`, None if there is no tokenizer.json nor .model.

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
    largest = _largest(files[name], f"{where}/{name}")
    rule = f"has a token {largest}, but the model embeds {vocab_size} tokens, 0 to {vocab_size - 1}"
    fix = "Name the tokenizer that the model was trained with: --tokenizer=DIR"
    check(largest < vocab_size, f"{where}/{name}", largest + 1, rule, fix)


def _largest(contents: bytes, where: str) -> int:
    """The largest token number of a tokenizer.json or SentencePiece model."""
    if where.endswith(".model"):
        sentencepiece = require_package("sentencepiece", "path", where)
        pieces = sentencepiece.SentencePieceProcessor()
        try:
            pieces.LoadFromSerializedProto(contents)
        except RuntimeError as error:
            fail(where, f"{len(contents)} bytes", f"is no SentencePiece model ({error})", "Copy it")
        return pieces.vocab_size() - 1
    try:
        told = json.loads(contents)
        vocabulary = told["model"]["vocab"]
        ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else range(len(vocabulary))
        numbers = [*ids, *(token["id"] for token in told.get("added_tokens") or ())]
        odd = [number for number in numbers if type(number) is not int]
        if odd:
            raise ValueError(f"a token has the number {odd[0]!r}")
        return max(numbers)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        rule = f"is damaged or no Hugging Face tokenizer ({error!r})"
        fail(where, f"{len(contents)} bytes", rule, "Copy or download it again")
