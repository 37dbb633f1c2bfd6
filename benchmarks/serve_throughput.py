"""How much faster is a routed model served, with everything counted?

    python benchmarks/serve_throughput.py --save

A closed loop of clients keeps the engine full: random prompts and answers of lengths drawn around
256 tokens; prompts stored, keys and values written, routing, sampling and detokenisation included.
The models have the paper's 360M shape, here scaled down: plain (the same engine, which then is
ordinary continuous batching), MoR-2, -3 and -4 with recursion-wise and with shared caches. Each
is served at a fixed number of sequences, and with as many as a budget of cache bytes holds.

Weights are random, which does not change what a token costs. Thresholds are calibrated, so that
depths follow the capacities of training; the depths that came out are printed. Beside each speed
stands what the machine allows (serving/allowed.py). transformers.generate answers the same prompts
with the plain model's weights (needs requirements-convert.txt).

Prints tables; --save appends the records to results/serve_throughput.jsonl and writes the tables to
results/serve_throughput.md.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import timing
from serving import allowed, load, report, shapes, weights
from serving.vocabulary import tokenizer_of

from mor_jax.config import ModelConfig
from mor_jax.inference.engine.engine import Engine, EngineConfig
from mor_jax.inference.load_model import LoadedModel

PARTS = ("fixed", "budget", "static", "rival")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=shapes.SHAPES, default="scaled")
    parser.add_argument("--quick", action="store_true", help="tiny models, few requests: seconds")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--models", nargs="+", help="names, such as plain 'MoR-4'; default: all")
    parser.add_argument("--slots", type=int, default=32, help="sequences, where they are fixed")
    parser.add_argument(
        "--budgets",
        type=int,
        nargs="+",
        default=[8],
        help="cache bytes: those of so many plain sequences of 512 tokens",
    )
    parser.add_argument("--requests", type=int, default=3, help="for each slot")
    parser.add_argument("--cores", type=int, default=2, help="CPU cores that all sides use")
    parser.add_argument("--save", action="store_true", help="write to benchmarks/results/")
    args = parser.parse_args(argv)
    if args.quick:
        args.shape, args.slots, args.budgets, args.requests = "quick", 4, [2], 4
        args.models = args.models or ["plain", "MoR-4"]
    return args


@dataclasses.dataclass(frozen=True)
class Bench:
    """One machine, one family of models."""

    args: argparse.Namespace
    machine: allowed.Machine
    models: dict[str, LoadedModel]

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Bench":
        """Measures the machine and makes the models."""
        family = shapes.family(shapes.SHAPES[args.shape], args.dtype)
        wanted = args.models or list(family)
        machine = allowed.measure(family["plain"])
        with tempfile.TemporaryDirectory() as directory:
            tokenizer = tokenizer_of(family["plain"].vocab_size, Path(directory))
        made = {
            name: weights.random_served(name, cfg, tokenizer)
            for name, cfg in family.items()
            if name in wanted
        }
        return cls(args, machine, made)

    def fixed(self, served: LoadedModel) -> dict[str, Any]:
        """A number of sequences that is the same for all models."""
        slots = self.args.slots
        return self.measured(served, EngineConfig(slots=slots, cache_bytes=self.ample(served)))

    def budget(self, served: LoadedModel, sequences: int) -> dict[str, Any]:
        """As many sequences as a number of bytes holds."""
        plain = shapes.plain(shapes.SHAPES[self.args.shape], self.args.dtype)
        held = sequences * 2 * load.MEAN * plain.num_layers * self._entry(plain)
        return self.measured(served, EngineConfig(cache_bytes=held)) | {"budget": sequences}

    def ample(self, served: LoadedModel) -> int:
        """Bytes in which all slots find room for every recursion of the longest sequences."""
        layers = (
            served.cfg.num_layers if served.cfg.kv_mode == "recursion" else served.cfg.unique_layers
        )
        longest = 2 * load.LONGEST
        return int(1.2 * self.args.slots * longest * layers * self._entry(served.cfg))

    def _entry(self, cfg: ModelConfig) -> int:
        # Bytes of a token's keys and values in one layer.
        return 2 * cfg.num_kv_heads * cfg.head_dim * {"float32": 4, "bfloat16": 2}[self.args.dtype]

    def measured(self, served: LoadedModel, cfg: EngineConfig) -> dict[str, Any]:
        """One model under load: what clients saw, and what the machine allows."""
        with Engine(served, self.config(cfg)) as engine:
            slots = engine.plan.slots
            work = load.requests(self.args.requests * slots, served.cfg.vocab_size)
            seen = load.drive(engine, work, slots)
            statistics = engine.statistics()
        shares = realised(served.cfg, statistics.depth_counts)
        traffic = allowed.Traffic(
            batch=max(1.0, seen.running), prompt=load.MEAN, answer=load.MEAN, piece=cfg.piece
        )
        parts = allowed.per_token(served.cfg, shares, traffic)
        return {
            "shares": shares,
            "slots": slots,
            "allowed": 1 / allowed.seconds(parts, self.machine, bare=False),
            "allowed_bare": 1 / allowed.seconds(parts, self.machine, bare=True),
            "flops": allowed.flops(parts),
            "cache_bytes": statistics.cache_bytes,
            "overflows": statistics.overflows,
            "preemptions": statistics.preemptions,
            **dataclasses.asdict(seen),
        }

    def config(self, cfg: EngineConfig) -> EngineConfig:
        """`cfg` in the dtype asked for, everything compiled before the clock starts."""
        return dataclasses.replace(cfg, dtype=self.args.dtype, warm=True, max_waiting=10**6)

    def static(self, served: LoadedModel) -> dict[str, Any]:
        """The same work in batches that start together and wait for their longest answer."""
        slots = self.args.slots
        cfg = EngineConfig(slots=slots, cache_bytes=self.ample(served))
        work = load.requests(self.args.requests * slots, served.cfg.vocab_size)
        with Engine(served, self.config(cfg)) as engine:
            return {"slots": slots, "rate": load.in_waves(engine, work, slots)}

    def rival(self, served: LoadedModel) -> dict[str, Any]:
        """transformers.generate beside our engine: the same prompts, greedy."""
        from serving import rival

        slots = self.args.slots
        prompts = load.prompts(slots, served.cfg.vocab_size)
        cfg = EngineConfig(slots=slots, cache_bytes=self.ample(served))
        with Engine(served, self.config(cfg)) as engine:
            load.together(engine, prompts, 2)
            _, first = load.together(engine, prompts, 1)
            ours = rival.Generated(*load.together(engine, prompts, load.MEAN), first)
        theirs = rival.best(served.cfg, served.params, prompts, load.MEAN, self.args.cores)
        return {
            "slots": slots,
            "rate": ours.rate,
            "decode_rate": ours.decode_rate,
            "transformers_rate": theirs.rate,
            "transformers_decode_rate": theirs.decode_rate,
            "same_tokens": float((ours.tokens == theirs.tokens).mean()),
        }


def realised(cfg: ModelConfig, counts: tuple[int, ...]) -> tuple[float, ...]:
    """Share of all tokens that went through each recursion."""
    if cfg.router.kind == "none":
        return (1.0,) * cfg.num_recursions
    total = max(sum(counts), 1)
    return tuple(sum(counts[r:]) / total for r in range(1, len(counts)))


def runs(bench: Bench) -> list[tuple[str, str, Any]]:
    """What is asked for: part, model, and the call that measures it."""
    args, found = bench.args, []
    for part in args.parts:
        for name, served in bench.models.items():
            if part in ("static", "rival") and name != "plain":
                continue
            if part == "budget":
                calls = [(lambda s=served, b=b: bench.budget(s, b)) for b in args.budgets]
            else:
                calls = [lambda s=served, part=part: getattr(bench, part)(s)]
            found += [(part, name, call) for call in calls]
    return found


def main(argv: list[str] | None = None) -> None:
    """Measures, prints, saves."""
    args = parse_args(argv)
    timing.use_cores(args.cores)
    bench = Bench.of(args)
    settings = {"shape": args.shape, "dtype": args.dtype, "requests": args.requests}
    settings |= dataclasses.asdict(bench.machine)
    records = []
    for part, name, call in runs(bench):
        record = {"part": part, "model": name, **settings, **call()}
        timing.report("serve_throughput", record, args.save)
        records.append(timing.machine() | record)
    print("\n" + report.page(records))
    if args.save:
        lines = (timing.RESULTS / "serve_throughput.jsonl").read_text().splitlines()
        text = report.page([json.loads(line) for line in lines])
        (timing.RESULTS / "serve_throughput.md").write_text(text)


if __name__ == "__main__":
    main()
