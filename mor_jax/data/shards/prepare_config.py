"""Settings of a preparation, and what it reports while it runs."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

from mor_jax.config.parsing import check, fail
from mor_jax.data.tokenizers.train_bpe import check_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """What to write where. `train_bpe`: size of a vocabulary to train instead of `tokenizer`.

    A shard ends with the document that brings its training tokens to `shard_tokens`.
    """

    sources: tuple[str, ...]
    output: Path
    tokenizer: str = "bytes"
    train_bpe: int | None = None
    text_key: str = "text"
    shard_tokens: int = 2**27
    heldout_share: float = 0.01

    def validate(self) -> None:
        """Raises `ValueError` on a setting out of range."""
        check(bool(self.sources), "--source", self.sources, "is empty", "Try --source=stdlib")
        rule = "must be at least 1; it is the number of training tokens of a shard"
        check(self.shard_tokens >= 1, "--shard-tokens", self.shard_tokens, rule, "Try 134217728")
        rule = "must be in (0, 0.5]; it is the share of documents kept for evaluation"
        ok = 0 < self.heldout_share <= 0.5
        check(ok, "--heldout-share", self.heldout_share, rule, "Try 0.01")
        for spec in self.sources:
            rule = "is tokenised already"
            ok = not spec.startswith("shards:")
            check(ok, "--source", spec, rule, "Name several shards: in data.sources instead")
        ok = not re.match(r"[a-z0-9]+:/", str(self.output))
        fix = "Write to a directory here, then copy it to where the run reads it"
        given = str(self.output).replace(":/", "://", 1)
        check(ok, "--output", given, "is no directory of this machine", fix)
        try:
            ok = not self.output.exists() or self.output.is_dir()
        except OSError as error:
            fail("--output", given, f"cannot be used ({error.strerror})", "Name another directory")
        check(ok, "--output", str(self.output), "is a file", "Name a directory")
        if self.train_bpe is not None:
            check_size(self.train_bpe)


@dataclasses.dataclass
class Progress:
    """What has been written so far; `kept` counts shards of an earlier run."""

    shards: int = 0
    kept: int = 0
    documents: int = 0
    tokens: int = 0


Report = Callable[[Progress], None]
