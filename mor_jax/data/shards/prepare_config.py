"""Settings and progress of the data preparation."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

from mor_jax.config.parsing import check, fail
from mor_jax.data.tokenizers.train_bpe import check_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Settings of the data preparation.

    train_bpe: vocabulary size of a tokenizer to train instead of `tokenizer`. shard_tokens: a shard
    ends with the document that reaches this number of training tokens.
    """

    sources: tuple[str, ...]
    output: Path
    tokenizer: str = "bytes"
    train_bpe: int | None = None
    text_key: str = "text"
    shard_tokens: int = 2**27
    validation_fraction: float = 0.01

    def validate(self) -> None:
        """Raises `ValueError` on a setting out of range."""
        check(bool(self.sources), "--source", self.sources, "is empty", "Try --source=stdlib")
        rule = "must be at least 1; it is the number of training tokens of a shard"
        check(self.shard_tokens >= 1, "--shard-tokens", self.shard_tokens, rule, "Try 134217728")
        rule = "must be in (0, 0.5]; it is the fraction of documents used for validation"
        ok = 0 < self.validation_fraction <= 0.5
        check(ok, "--validation-fraction", self.validation_fraction, rule, "Try 0.01")
        for spec in self.sources:
            rule = "is already tokenised"
            ok = not spec.startswith("shards:")
            check(ok, "--source", spec, rule, "Name several shards: in data.sources instead")
        ok = not re.match(r"[a-z0-9]+:/", str(self.output))
        fix = "Write to a local directory, then copy it to where the run reads it"
        address = str(self.output).replace(":/", "://", 1)
        check(ok, "--output", address, "is not a local directory", fix)
        try:
            ok = not self.output.exists() or self.output.is_dir()
        except OSError as error:
            rule = f"cannot be used ({error.strerror})"
            fail("--output", address, rule, "Name another directory")
        check(ok, "--output", str(self.output), "is a file", "Name a directory")
        if self.train_bpe is not None:
            check_size(self.train_bpe)


@dataclasses.dataclass
class Progress:
    """Totals written so far; `kept` counts shards of an earlier preparation."""

    shards: int = 0
    kept: int = 0
    documents: int = 0
    tokens: int = 0


Report = Callable[[Progress], None]
