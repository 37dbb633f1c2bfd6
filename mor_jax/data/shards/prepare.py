"""Tokenises sources into shards once, so that runs start quickly and corpora may have any size.

An interrupted preparation resumes after its last complete shard and writes the same bytes as an
uninterrupted one. The manifest is written last: if it exists, the preparation is complete.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mor_jax.config.parsing import check, fail
from mor_jax.data.shards.prepare_config import PrepareConfig, Progress, Report
from mor_jax.data.shards.prepare_parts import PARTS, ShardJob, clear_partial, to_json
from mor_jax.data.shards.reader import FORMAT, MANIFEST, RECORD_TOKENS, SPLITS
from mor_jax.data.shards.writer import PARTIAL, write_file
from mor_jax.data.sources.documents import Documents, open_documents
from mor_jax.data.streams.validation_split import is_validation, text_hash
from mor_jax.data.tokenizers.base import Tokenizer
from mor_jax.data.tokenizers.load import load_tokenizer
from mor_jax.data.tokenizers.train_bpe import train_bpe
from mor_jax.files import LockHeld, lock, this_process

__all__ = ["PrepareConfig", "Progress", "prepare"]

SETTINGS = "settings.json"
BPE_CHARACTERS = 256 * 2**20
"""Largest number of characters to train a BPE tokenizer on, divided evenly between the sources."""


def prepare(cfg: PrepareConfig, report: Report) -> dict[str, Any]:
    """Writes all missing shards, then the manifest, and returns it.

    Calls `report` about once a second and at the end. Raises `ValueError` on invalid settings or
    sources, if the directory belongs to a preparation with other settings, and if a split is empty;
    `OSError` if the disk is full.
    """
    cfg.validate()
    sources = [open_documents(spec, cfg.text_key, "--source") for spec in cfg.sources]
    tokenizer = None if cfg.train_bpe is not None else load_tokenizer(cfg.tokenizer, "--tokenizer")
    settings = _settings(cfg, sources, tokenizer)
    with _locked_output(cfg.output):
        # Checked before any cleanup, so that a foreign directory stays unchanged.
        _check_output(cfg.output, settings)
        try:
            _claim(cfg.output, settings)
            tokenizer = tokenizer or _trained(cfg, sources)
            for name, contents in tokenizer.files().items():
                write_file(cfg.output / name, contents)
            parts = ShardJob(cfg, sources, tokenizer, report).run()
            _check_splits(cfg, parts)
            manifest = _manifest(settings, tokenizer, parts)
            write_file(cfg.output / MANIFEST, to_json(manifest))
        finally:
            clear_partial(cfg.output)
            if not _written(cfg.output):
                _remove_if_empty(cfg.output)
    return manifest


@contextlib.contextmanager
def _locked_output(output: Path) -> Iterator[None]:
    """Creates the output directory and locks it against a second preparation."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        rule = f"cannot be created ({error.strerror})"
        fail("--output", str(output), rule, "Name a directory that you may write to")
    directory = os.open(output, os.O_RDONLY)
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, directory)
        try:
            stack.enter_context(lock(directory, this_process()))
        except LockHeld:
            rule = "another preparation is writing to it"
            fail("--output", str(output), rule, "Wait for it, or name another directory")
        yield


def _settings(
    cfg: PrepareConfig, sources: list[Documents], tokenizer: Tokenizer | None
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "sources": list(cfg.sources),
        "identities": [source.identity for source in sources],
        "text_key": cfg.text_key,
        "tokenizer": tokenizer.fingerprint if tokenizer else f"train-bpe={cfg.train_bpe}",
        "shard_tokens": cfg.shard_tokens,
        "record_tokens": RECORD_TOKENS,
        "heldout_share": cfg.validation_fraction,
    }


def _check_output(output: Path, settings: dict[str, Any]) -> None:
    """Raises `ValueError` unless the directory is empty or has the same settings."""
    path = output / SETTINGS
    if path.exists():
        before = _read_settings(path, output)
        changed = {k: (before.get(k), v) for k, v in settings.items() if before.get(k) != v}
        rule = f"was started with other settings (before, now): {changed}"
        fix = "Name another directory, remove this one, or use the old settings"
        # A preparation that failed before its first shard has nothing to lose.
        check(not changed or not _written(output), "--output", str(output), rule, fix)
        return
    # A preparation killed at its start leaves only this file.
    others = {entry.name for entry in output.iterdir()} - {f"{SETTINGS}{PARTIAL}"}
    rule = "is neither empty nor a directory of this command"
    check(not others, "--output", str(output), rule, "Name a new directory")


def _claim(output: Path, settings: dict[str, Any]) -> None:
    """Records the settings in the directory after `_check_output`."""
    path, contents = output / SETTINGS, to_json(settings)
    if not path.exists() or path.read_bytes() != contents:
        write_file(path, contents)
    (output / PARTS).mkdir(exist_ok=True)
    clear_partial(output)


def _written(output: Path) -> bool:
    """Whether the directory contains more than settings."""
    complete = [path for path in output.rglob("*") if not path.name.endswith(PARTIAL)]
    return any(path.name not in (SETTINGS, PARTS) for path in complete)


def _remove_if_empty(output: Path) -> None:
    """Removes what a preparation created that failed before its first shard."""
    (output / SETTINGS).unlink(missing_ok=True)
    for directory in (output / PARTS, output):
        if directory.is_dir() and not any(directory.iterdir()):
            directory.rmdir()


def _read_settings(path: Path, output: Path) -> dict[str, Any]:
    try:
        before = json.loads(path.read_text())
    except ValueError as error:
        before = error
    rule = f"its {SETTINGS} is damaged ({before})"
    fix = "Name another directory, or remove this one"
    check(isinstance(before, dict), "--output", str(output), rule, fix)
    return before


def _trained(cfg: PrepareConfig, sources: list[Documents]) -> Tokenizer:
    path = cfg.output / "tokenizer.json"
    if not path.exists():
        texts = _training_texts(sources, cfg.validation_fraction)
        write_file(path, train_bpe(texts, cfg.train_bpe or 0).encode())
    return load_tokenizer(str(path), "--tokenizer")


def _training_texts(sources: list[Documents], share: float) -> Iterator[str]:
    for source in sources:
        left = BPE_CHARACTERS // len(sources)
        for text in source.read(0):
            if text and not is_validation(text_hash(text), share):
                yield text
                left -= len(text)
            if left <= 0:
                break


def _check_splits(cfg: PrepareConfig, parts: list[dict[str, Any]]) -> None:
    documents = {s: sum(p[s]["documents"] for p in parts if p[s]) for s in SPLITS}
    total = sum(documents.values())
    rule = f"has {total} non-empty documents; needs two, one for training and one for validation"
    check(total >= 2, "--source", cfg.sources, rule, "Add documents, one per file or record")
    if min(documents.values()) == 0:
        lowest = min(part["lowest"] for part in parts)
        rule = f"gives {documents['train']} training and {documents['heldout']} validation "
        rule += f"documents; the first validation document needs a share above {lowest:.6f}"
        fix = f"Remove {cfg.output} and use another share, or add documents"
        fail("--validation-fraction", cfg.validation_fraction, rule, fix)


def _manifest(
    settings: dict[str, Any], tokenizer: Tokenizer, parts: list[dict[str, Any]]
) -> dict[str, Any]:
    splits = {}
    for split in SPLITS:
        shards = [part[split] for part in parts if part[split]]
        totals = {key: sum(shard[key] for shard in shards) for key in ("tokens", "documents")}
        splits[split] = totals | {"shards": shards}
    description = {
        "name": tokenizer.name if not tokenizer.files() else next(iter(tokenizer.files())),
        "file": next(iter(tokenizer.files()), None),
        "fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
    }
    return settings | {"tokenizer": description, "dtype": tokenizer.dtype.name, "splits": splits}
