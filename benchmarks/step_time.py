"""Does routing save time and memory in training? Every variant's train step, beside the plain one.

    python benchmarks/step_time.py
    python benchmarks/step_time.py --size=360m --batch=32 --length=2048 --dtype=bfloat16 --save

The step is the one that launch/train.py runs, compiled as it compiles it, on random tokens.
Prints a table and one JSON line: the median step time and the compiled step's temporary memory of
each variant, both also as a ratio to the plain model, beside the ratio of the model FLOPs routed
and of the FLOPs executed. On a chip with a published peak also tokens/s and utilisation.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import timing

from configs import common
from mor_jax.config import ModelConfig, RouterConfig, TrainConfig
from mor_jax.config.parsing import parse
from mor_jax.models import params as state
from mor_jax.models.flops import flops
from mor_jax.runtime.hardware import mfu, peak_flops

# 2 + 12 layers, so that 2, 3 and 4 recursions all keep the depth.
SMALL = ModelConfig(
    vocab_size=4096,
    hidden_size=256,
    num_layers=14,
    num_heads=8,
    num_kv_heads=4,
    head_dim=32,
    intermediate_size=704,
)
EXPERT = RouterConfig(kind="expert")
# Room for exactly the balanced depths: static shapes as small as expert-choice's.
TOKEN = RouterConfig(kind="token", activation="softmax", alpha=1.0, capacity_factor=1.0)
ROUTED: dict[str, tuple[int, str, RouterConfig]] = {
    "expert-2": (2, "recursion", EXPERT),
    "expert-3": (3, "recursion", EXPERT),
    "expert-4": (4, "recursion", EXPERT),
    "expert-3-kv": (3, "shared", EXPERT),
    "token-3": (3, "recursion", TOKEN),
}


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=("small", "135m", "360m"), default="small")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--batch", type=int, default=4, help="rows of a step")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--attention", default="auto", help="model.attention")
    parser.add_argument("--remat", choices=("none", "block", "full"), default="none")
    parser.add_argument("--loss_chunk", type=int, default=128, help="positions; 0: whole rows")
    parser.add_argument("--variants", default=",".join(ROUTED), help="comma-separated")
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each variant")
    parser.add_argument("--warmup", type=int, default=2, help="steps before the timed ones")
    parser.add_argument("--cores", type=int, help="use only so many CPU cores")
    parser.add_argument("--save", action="store_true", help="append to benchmarks/results/")
    return parser.parse_args()


def train_config(args: argparse.Namespace, variant: str) -> TrainConfig:
    """The run of one variant (`plain` or a key of `ROUTED`)."""
    recursions, kv, router = ROUTED.get(variant, (1, "recursion", RouterConfig()))
    sharing = "none" if variant == "plain" else "middle_cycle"
    model = SMALL
    if args.size != "small":
        shape = common.vanilla_model(args.size)
        if recursions > 1:
            shape.num_layers = common.LAYERS[args.size]["middle"][recursions]
        model = parse(ModelConfig, shape.to_dict(), "model.")
    model = dataclasses.replace(
        model,
        sharing=sharing,
        num_recursions=recursions,
        kv_mode=kv,
        router=router,
        dtype=args.dtype,
        attention=args.attention,
        remat=args.remat,
        max_seq_len=max(args.length, model.max_seq_len),
    )
    cfg = TrainConfig(
        batch_size=args.batch,
        seq_len=args.length,
        loss_chunk_size=args.loss_chunk or None,
        model=model,
    )
    cfg.validate()
    return cfg


def spread_router(params: dict) -> dict:
    """Token-choice's router scaled up, so that a fresh model spreads its tokens over depths."""
    router = jax.tree.map(lambda weight: 50 * weight, params["router"])
    return {**params, "router": router}


def realised_shares(trainer: timing.Trainer) -> list[float]:
    """Share of the batch's tokens that each recursion takes at the trainer's present weights."""
    cfg = trainer.cfg.model
    forward = jax.jit(lambda params, batch: state.forward(cfg, params, batch).routing.depth)
    depth = forward(trainer.state.params, trainer.batch)
    return [float(jnp.mean(depth > r)) for r in range(cfg.num_recursions)]


def measure(args: argparse.Namespace) -> list[dict]:
    """One record a variant, the plain model first."""
    trainers = {}
    for name in ("plain", *filter(None, args.variants.split(","))):
        cfg = train_config(args, name)
        change = spread_router if cfg.model.router.kind == "token" else None
        trainers[name] = timing.Trainer(cfg, change)
        print(f"compiled {name}", file=sys.stderr, flush=True)
    steps = {name: trainer.step for name, trainer in trainers.items()}
    seconds = timing.interleaved(steps, warmup=args.warmup, rounds=args.rounds)
    return [record(name, trainers[name], seconds[name]) for name in trainers]


def record(name: str, trainer: timing.Trainer, seconds: list[float]) -> dict:
    """What is known of one variant, without ratios."""
    cfg = trainer.cfg
    report = flops(cfg.model, cfg.seq_len)
    routed = cfg.model.router.kind != "none"
    time = timing.median(seconds)
    per_second, kind = cfg.batch_size * cfg.seq_len / time, jax.devices()[0].device_kind
    return {
        "variant": name,
        "layers": cfg.model.num_layers,
        "seconds": time,
        "fastest": min(seconds),
        "temp_bytes": trainer.temp_bytes,
        "tokens_per_second": per_second,
        "routed_flops": report.training(),
        "hardware_flops": report.hardware(),
        "mfu": mfu(report.training(), per_second, kind),
        "hardware_utilisation": mfu(report.hardware(), per_second, kind),
        "shares": realised_shares(trainer) if routed else None,
        "loss": trainer.losses[-1],
    }


def add_ratios(records: list[dict]) -> None:
    """Adds each figure over the plain model's (the first record)."""
    plain = dict(records[0])
    for row in records:
        for name in ("seconds", "temp_bytes", "routed_flops", "hardware_flops"):
            row[f"{name}_ratio"] = row[name] / plain[name]


def print_table(records: list[dict]) -> None:
    """The records for people."""
    known = peak_flops(jax.devices()[0].device_kind) is not None
    print(
        f"{'variant':<13}{'step':>10}{'time':>8}{'memory':>8}{'routed':>8}{'run':>8}  tokens/s"
        + ("    MFU   hardware" if known else "")
        + "  shares"
    )
    for row in records:
        ratios = "".join(
            f"{row[f'{key}_ratio']:>8.3f}"
            for key in ("seconds", "temp_bytes", "routed_flops", "hardware_flops")
        )
        used = f"{row['mfu']:>7.1%}{row['hardware_utilisation']:>11.1%}" if known else ""
        shares = " ".join(f"{share:.2f}" for share in row["shares"] or ())
        time = f"{row['seconds'] * 1e3:>7.1f} ms"
        print(
            f"{row['variant']:<13}{time}{ratios}{row['tokens_per_second']:>10.0f}{used}  {shares}"
        )


def main() -> None:
    """Measures, prints, saves."""
    args = parse_args()
    timing.use_cores(args.cores)
    records = measure(args)
    add_ratios(records)
    print_table(records)
    shared = timing.settings(train_config(args, "plain"))
    timing.report("step_time", {"size": args.size, **shared, "variants": records}, args.save)


if __name__ == "__main__":
    main()
