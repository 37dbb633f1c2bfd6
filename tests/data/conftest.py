"""Small corpora, tokenizers and settings that the data tests share."""

import json
from pathlib import Path

import pytest
from support.sample_texts import words

from mor_jax.config import DataConfig
from mor_jax.data import load_tokenizer


@pytest.fixture
def texts() -> list[str]:
    return [words(i) for i in range(60)]


@pytest.fixture
def jsonl(tmp_path: Path, texts: list[str]) -> str:
    """A source of 60 documents in two files."""
    for name, part in (("a", texts[:25]), ("b", texts[25:])):
        lines = [json.dumps({"text": text, "id": i}) for i, text in enumerate(part)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return f"jsonl:{tmp_path}/*.jsonl"


@pytest.fixture
def cfg(jsonl: str) -> DataConfig:
    return DataConfig(sources=(jsonl,), validation_fraction=0.2)


@pytest.fixture(scope="session")
def byte_tokenizer():
    return load_tokenizer("bytes")
