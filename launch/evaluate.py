"""Evaluates a run on held-out text: its newest checkpoint, or the weights that it starts from.

    python launch/evaluate.py --workdir=runs/mor
    python launch/evaluate.py --workdir=runs/smollm2 --source="text:docs/*.md" --length=512

Loss (nats per token), perplexity, accuracy and mean depth, for routed models under causal and under
top-k routing. A training job may be at work in the directory meanwhile.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mor_jax import exit_codes, platforms


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    platforms.skip_absent()
    from mor_jax.evaluation import Asked, evaluate
    from mor_jax.load import find

    asked = Asked(
        sources=None if options.source is None else tuple(options.source),
        length=options.length,
        batches=options.batches,
        batch_size=options.batch_size,
        fsdp=options.fsdp,
        calibration=options.calibration,
        recursions=options.recursions,
    )
    try:
        evaluation = evaluate(find(options.workdir, options.step), asked)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_codes.ERROR
    print(json.dumps(evaluation.to_dict()) if options.json else "\n".join(evaluation.lines()))
    return exit_codes.OK


def _parser() -> argparse.ArgumentParser:
    about, _, more = (__doc__ or "").partition("\n")
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=about, epilog=more, formatter_class=raw)
    parser.add_argument("--workdir", required=True, help="run to evaluate")
    parser.add_argument("--step", type=int, help="checkpoint; default: the newest good one")
    parser.add_argument(
        "--source",
        action="append",
        help="text to evaluate on, all of it, written like data.sources; may be repeated; default: "
        "the held-out part of the run's own text",
    )
    parser.add_argument("--length", type=int, help="tokens of a row; default: the run's")
    parser.add_argument("--batches", type=int, help="default: the run's eval.batches")
    parser.add_argument("--batch_size", type=int, help="rows; default: the run's eval.batch_size")
    parser.add_argument("--fsdp", type=int, default=1, help="devices that share each parameter")
    parser.add_argument("--calibration", help="one of the run's, by name, or a file")
    parser.add_argument("--recursions", type=int, help="to run, in place of those trained")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


if __name__ == "__main__":
    sys.exit(main())
