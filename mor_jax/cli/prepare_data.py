"""Tokenises a corpus once into shards; training reads them with data.sources=('shards:DIR',).

    mor prepare-data --source='jsonl:corpus/*.jsonl' --train-bpe=32768 --output=DIR

A run that was stopped resumes when the same command is repeated.
"""

import argparse
import logging
import sys
from pathlib import Path

from mor_jax.cli.parser import CommandParser
from mor_jax.runtime import exit_codes
from mor_jax.runtime.preemption import Signals


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line as values."""
    parser = CommandParser(__doc__)
    source = "stdlib, text:GLOB, jsonl:GLOB, parquet:GLOB, tfds:NAME[:SPLIT], hf:NAME[:SPLIT]; "
    source += "may be repeated"
    parser.add_argument("--source", action="append", required=True, help=source)
    parser.add_argument("--output", type=Path, required=True, help="directory of the shards")
    parser.add_argument("--tokenizer", default="bytes", help="bytes, tokenizer.json or .model file")
    size = "train a byte-level BPE with this vocabulary size on the training documents"
    parser.add_argument("--train-bpe", type=int, metavar="VOCAB", help=size)
    parser.add_argument("--text-key", default="text", help="field, column or feature of the text")
    parser.add_argument("--shard-tokens", type=int, default=2**27, help="training tokens per shard")
    share = "fraction of the documents for validation"
    parser.add_argument("--validation-fraction", type=float, default=0.01, help=share)
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Runs the preparation; 2 on bad settings or sources, 1 if the disk refuses."""
    flags = vars(parse(arguments))
    from mor_jax.data.shards import prepare

    cfg = prepare.PrepareConfig(sources=tuple(flags.pop("source")), **flags)
    # In a terminal one line is rewritten; in a log every report is a line.
    start, end = ("\r", "") if sys.stderr.isatty() else ("", "\n")
    # Warnings about skipped records get a line of their own.
    logging.basicConfig(format=f"{start}%(message)s", level=logging.WARNING)

    def report(done: prepare.Progress) -> None:
        kept = f" ({done.kept} kept)" if done.kept else ""
        line = f"{done.shards} shards{kept}, {done.documents:,} documents, {done.tokens:,} tokens"
        print(f"{start}{line:<70}", end=end, file=sys.stderr, flush=True)

    try:
        manifest = prepare.prepare(cfg, report)
    except (ValueError, OSError) as error:
        print(f"{start}error: {error}", file=sys.stderr)
        return exit_codes.of(error)
    print(end="" if end else "\n", file=sys.stderr)
    for split, content in manifest["splits"].items():
        print(f"{split}: {content['tokens']:,} tokens of {content['documents']:,} documents")
    own = manifest["tokenizer"]
    name = str(cfg.output / own["file"]) if own["file"] else own["name"]
    if cfg.train_bpe is not None and own["vocab_size"] < cfg.train_bpe:
        message = (
            f"--train-bpe={cfg.train_bpe}: the text gave {own['vocab_size']:,} tokens, not more"
        )
        print(message, file=sys.stderr)
    print(f"Train with data.sources=('shards:{cfg.output}',) data.tokenizer={name}")
    print(f"and model.vocab_size of at least {own['vocab_size']}")
    return 0


if __name__ == "__main__":
    with Signals("complete shards are kept"):
        sys.exit(main(sys.argv[1:]))
