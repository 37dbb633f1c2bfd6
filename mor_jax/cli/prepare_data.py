"""Tokenises text once into shards that training reads with data.sources=('shards:DIR',).

    python launch/prepare_data.py --source='jsonl:corpus/*.jsonl' --train-bpe=32768 --output=DIR

A run that was stopped goes on where it was when the same command is given again.
"""

import argparse
import logging
import sys
from pathlib import Path

from mor_jax.runtime import exit_codes
from mor_jax.runtime.preemption import Signals


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line as values."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = "stdlib, text:GLOB, jsonl:GLOB, parquet:GLOB, tfds:NAME[:SPLIT], hf:NAME[:SPLIT]; "
    source += "give it repeatedly"
    parser.add_argument("--source", action="append", required=True, help=source)
    parser.add_argument("--output", type=Path, required=True, help="directory of the shards")
    parser.add_argument("--tokenizer", default="bytes", help="bytes, tokenizer.json or .model file")
    size = "train a byte-level BPE with this many tokens on the training documents instead"
    parser.add_argument("--train-bpe", type=int, metavar="VOCAB", help=size)
    parser.add_argument("--text-key", default="text", help="field, column or feature of the text")
    parser.add_argument("--shard-tokens", type=int, default=2**27, help="training tokens a shard")
    share = "share of the documents that is held out"
    parser.add_argument("--heldout-share", type=float, default=0.01, help=share)
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    """Runs the preparation; 2 on bad settings or sources, 1 if the disk refuses."""
    flags = vars(parse(arguments))
    from mor_jax.data.shards import prepare

    cfg = prepare.PrepareConfig(sources=tuple(flags.pop("source")), **flags)
    # On a terminal one line that is rewritten; elsewhere, such as in a job's log, line by line.
    start, end = ("\r", "") if sys.stderr.isatty() else ("", "\n")
    # What was left out is told on a line of its own.
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
        told = f"--train-bpe={cfg.train_bpe}: the text gave {own['vocab_size']:,} tokens, not more"
        print(told, file=sys.stderr)
    print(f"Train with data.sources=('shards:{cfg.output}',) data.tokenizer={name}")
    print(f"and model.vocab_size of at least {own['vocab_size']}")
    return 0


if __name__ == "__main__":
    with Signals("shards that are whole stay"):
        sys.exit(main(sys.argv[1:]))
