"""Does lm-evaluation-harness find the same with our model class as with its own on the export?

    python benchmarks/harness_parity.py --workdir=runs/quickstart --workdir=runs/smollm2 --save
    python benchmarks/harness_parity.py --workdir=runs/smollm2 --batch_sizes=1,4,auto --save

Exports each run, evaluates three local tasks (`harness_tasks.py`) with lm-eval's `hf` model on
the export and with ours on the run, both in float32 on the CPU, and compares every log-likelihood,
every "is greedy" and every text. Writes a table to benchmarks/results/ with --save.

PyTorch's log-softmax in float32 over 49,152 tokens is off by 9e-6 nats a token, always to the same
side, which adds up to more than a thousandth of a nat over a page. lm-eval's model has an option to
compute that one step in float64 (`softmax_dtype`); it is used unless --softmax_dtype=float32.

With --batch_sizes our model is compared with itself instead: how far do the scores of a request lie
apart that it gets in batches of these sizes?

Needs requirements-convert.txt and requirements-eval.txt.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import harness_tasks
import lm_eval
import timing
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from mor_jax.cli import convert
from mor_jax.evaluation.lm_eval.model import MorLM

LIMIT, PAGE_LIMIT = 1e-4, 1e-6
"""Largest differences that count as agreement: of a choice's log-likelihood, in nats; of a page's,
in shares of itself, since the rounding of every token adds up."""


def evaluated(
    model: Any, folder: Path, tasks: Sequence[str] = harness_tasks.NAMES
) -> dict[str, Any]:
    """lm-eval's results of the tasks, with all answers."""
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model=model, tasks=list(tasks), task_manager=manager, bootstrap_iters=0
    )
    assert found is not None
    return found


def answers(found: dict[str, Any], task: str) -> list[Any]:
    """What the model answered to each request of a task, in order."""
    samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    return [answer for sample in samples for group in sample["resps"] for answer in group]


def compare(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Worst differences over all requests, and the metrics of both."""
    choices, pages, texts = (
        list(zip(answers(ours, task), answers(theirs, task), strict=True))
        for task in harness_tasks.NAMES
    )
    metrics = {
        f"{task} {name.partition(',')[0]}": [value, theirs["results"][task][name]]
        for task in harness_tasks.NAMES
        for name, value in ours["results"][task].items()
        if isinstance(value, float) and "stderr" not in name
    }
    return {
        "choices": len(choices),
        "worst_choice": max(abs(a[0] - b[0]) for a, b in choices),
        "greedy_equal": sum(a[1] == b[1] for a, b in choices),
        "pages": len(pages),
        "worst_page": max(abs(a - b) for a, b in pages),
        "worst_page_share": max(abs(a / b - 1) for a, b in pages),
        "texts": len(texts),
        "texts_equal": sum(a == b for a, b in texts),
        "metrics": metrics,
    }


def between(each: list[dict[str, Any]], sizes: list[str]) -> dict[str, Any]:
    """Worst distance of the answers that a request got, over all requests; nats."""
    choices, pages = (
        list(zip(*(answers(found, task) for found in each), strict=True))
        for task in harness_tasks.NAMES[:2]
    )
    apart = [max(a[0] for a in same) - min(a[0] for a in same) for same in choices]
    spread = [max(same) - min(same) for same in pages]
    return {
        "batch_sizes": sizes,
        "choices": len(choices),
        "worst_choice": max(apart),
        "greedy_equal": sum(len({a[1] for a in same}) == 1 for same in choices),
        "pages": len(pages),
        "worst_page": max(spread),
        "worst_page_share": max(far / -same[0] for far, same in zip(spread, pages, strict=True)),
    }


def lines_between(records: list[dict[str, Any]]) -> list[str]:
    """A page with a table of all runs."""
    made = ["# What the batch size does to a score", ""]
    sizes = ", ".join(records[0]["batch_sizes"])
    made += [f"Largest distance of the log-likelihoods of one request in batches of {sizes}; nats."]
    made += [f"Float32 on a CPU. Pages of {records[0]['page']:,} characters.", ""]
    made += ["| run | choices | worst | greedy equal | pages | worst | share |"]
    made += ["|---|---|---|---|---|---|---|"]
    for r in records:
        greedy = f"{r['greedy_equal']} of {r['choices']}"
        far = [f"{r[name]:.1e}" for name in ("worst_choice", "worst_page", "worst_page_share")]
        cells = (r["run"], r["choices"], far[0], greedy, r["pages"], far[1], far[2])
        made.append(f"| {' | '.join(map(str, cells))} |")
    return made


def lines(records: list[dict[str, Any]]) -> list[str]:
    """A page with a table of all runs and one of their metrics."""
    made = ["# Our model class beside lm-eval's own, on the same weights", ""]
    dtype = records[0]["softmax_dtype"]
    made += [
        f"Largest difference of a log-likelihood, nats. Float32 on a CPU; lm-eval's in {dtype}"
    ]
    made += ["for its log-softmax. Both read at most the same number of tokens at one time.", ""]
    made += ["| run | choices | worst | greedy equal | pages | worst | share | texts equal |"]
    made += ["|---|---|---|---|---|---|---|---|"]
    for r in records:
        greedy = f"{r['greedy_equal']} of {r['choices']}"
        choice, page = f"{r['worst_choice']:.1e}", f"{r['worst_page']:.1e}"
        share = f"{r['worst_page_share']:.1e}"
        cells = (r["run"], r["choices"], choice, greedy, r["pages"], page, share)
        made.append(f"| {' | '.join(map(str, cells))} | {r['texts_equal']} of {r['texts']} |")
    made += ["", "| run | metric | ours | lm-eval's hf |", "|---|---|---|---|"]
    for r in records:
        for name, (a, b) in r["metrics"].items():
            made.append(f"| {r['run']} | {name} | {a:.6f} | {b:.6f} |")
    return made


def batches(args: argparse.Namespace) -> None:
    """Compares our model with itself, prints, saves."""
    records, sizes = [], args.batch_sizes.split(",")
    for workdir in args.workdir:
        with tempfile.TemporaryDirectory() as directory:
            harness_tasks.write(Path(directory), answers=1, page=args.page)
            same = {"max_length": args.max_length, "dtype": "float32"}
            models = (MorLM(str(workdir), batch_size=size, **same) for size in sizes)
            scored = harness_tasks.NAMES[:2]
            each = [evaluated(model, Path(directory), scored) for model in models]
        record = {"run": workdir.name, "page": args.page, **between(each, sizes)}
        timing.report("harness_batches", record, args.save)
        records.append(record)
    page = lines_between(records)
    print("\n".join(page))
    if args.save:
        (timing.RESULTS / "harness_batches.md").write_text("\n".join([*page, ""]))


def main() -> None:
    """Exports, evaluates, compares, prints, saves."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, action="append", required=True, help="a run")
    parser.add_argument("--max_length", type=int, default=160, help="tokens read at one time")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--softmax_dtype", choices=("float32", "float64"), default="float64")
    parser.add_argument("--batch_sizes", help="compare these with each other, such as 1,4,auto")
    parser.add_argument("--page", type=int, default=700, help="characters of a page")
    parser.add_argument("--save", action="store_true", help="write to benchmarks/results/")
    args = parser.parse_args()
    if args.batch_sizes:
        return batches(args)
    records = []
    for workdir in args.workdir:
        with tempfile.TemporaryDirectory() as directory:
            folder, export = Path(directory), Path(directory) / "export"
            harness_tasks.write(folder, page=args.page)
            told = ["export", "--to=hf", f"--workdir={workdir}", f"--output={export}"]
            assert convert.main(told) == 0
            same = {"max_length": args.max_length, "batch_size": args.batch_size}
            device = {"device": "cpu", "dtype": "float32", "trust_remote_code": True}
            device["softmax_dtype"] = args.softmax_dtype
            theirs = evaluated(HFLM(str(export), **device, **same), folder)
            ours = evaluated(MorLM(str(workdir), dtype="float32", **same), folder)
        record = {"run": workdir.name, "softmax_dtype": args.softmax_dtype, **compare(ours, theirs)}
        timing.report("harness_parity", record, args.save)
        records.append(record)
    page = lines(records)
    print("\n".join(page))
    if args.save:
        (timing.RESULTS / "harness_parity.md").write_text("\n".join([*page, ""]))
    bad = [r["run"] for r in records if r["worst_choice"] > LIMIT]
    bad += [r["run"] for r in records if r["worst_page_share"] > PAGE_LIMIT]
    if bad:
        sys.exit(f"{bad}: differ by more than {LIMIT:.0e} nats, or {PAGE_LIMIT:.0e} of a page")


if __name__ == "__main__":
    main()
