"""Counts parameters, FLOPs and bytes of a configuration, per recursion.

    mor accounting --config=mor:size=360m
    mor accounting --config=mor:size=360m,kv=shared --json
    mor accounting --config=mor:size=360m --platform=gpu

docs/accounting.md explains what is counted.
"""

import dataclasses
import json
import sys

from mor_jax.runtime.preemption import Signals

_SIGNALS = Signals("nothing was written")
if __name__ == "__main__":
    # First, because the imports below take seconds.
    _SIGNALS.__enter__()

from absl import app, flags
from ml_collections import config_flags

from mor_jax.cli import config_flag, option_names
from mor_jax.config import TrainConfig
from mor_jax.config.shipped import config_path
from mor_jax.models.flops import effective_parameters, flops, memory, unique_parameters
from mor_jax.runtime import exit_codes
from mor_jax.training.resolved_settings import resolve_settings

CONFIG = config_flags.DEFINE_config_file(
    "config", config_path("mor"), "the configuration; default: mor"
)
LENGTH = flags.DEFINE_integer(
    "length", None, "sequence length in tokens; default: the configuration's", lower_bound=1
)
_LENGTH = {"seq_len": "--length"}
PLATFORM = flags.DEFINE_enum(
    "platform",
    "cpu",
    ["cpu", "gpu", "tpu"],
    "platform of the training run: capacities are rounded to its tile sizes",
)
JSON = flags.DEFINE_bool("json", False, "print one line of JSON instead of tables")


def main(_: list[str]) -> None:
    try:
        cfg = TrainConfig.from_dict(CONFIG.value.to_dict())
        if LENGTH.value is not None:
            cfg = dataclasses.replace(cfg, seq_len=LENGTH.value)
            cfg.validate()
    except ValueError as error:
        names = option_names.flags_given()
        message = option_names.as_typed(error, names | ({} if LENGTH.value is None else _LENGTH))
        print(f"error: {message}", file=sys.stderr)
        sys.exit(exit_codes.REFUSED)
    cfg, length = resolve_settings(cfg, PLATFORM.value), cfg.seq_len
    report, room = flops(cfg.model, length), memory(cfg.model, length)
    counts = {
        name: count(cfg.model, embedding=embedding)
        for name, count, embedding in (
            ("unique", unique_parameters, True),
            ("unique_non_embedding", unique_parameters, False),
            ("effective", effective_parameters, True),
            ("effective_non_embedding", effective_parameters, False),
        )
    }
    totals = {
        "forward_causal": report.forward(),
        "forward_all_pairs": report.forward(causal=False),
        "training_causal": report.training(),
        "training_all_pairs": report.training(causal=False),
        "hardware": report.hardware(),
    }
    if JSON.value:
        print(
            json.dumps(
                {
                    "length": length,
                    "parameters": counts,
                    "flops_per_token": totals | dataclasses.asdict(report),
                    "bytes": dataclasses.asdict(room),
                }
            )
        )
        return
    _print_tables(report, counts, totals, dataclasses.asdict(room))


def _print_tables(report, counts, totals, room) -> None:
    print(f"{'parameters':<28}{'millions':>12}")
    for name, value in counts.items():
        print(f"{name:<28}{value / 1e6:>12.2f}")
    print(f"\n{f'stage at length {report.length}':<28}{'layers':>8}{'share':>8}{'MFLOP/token':>14}")
    for stage in report.routed:
        flop = stage.forward() / 1e6
        print(f"{stage.name:<28}{stage.layers:>8}{stage.share:>8.3f}{flop:>14.2f}")
    print(f"{'head':<44}{report.head / 1e6:>14.2f}")
    print(f"\n{'FLOPs per token':<28}{'MFLOP/token':>14}")
    for name, value in totals.items():
        print(f"{name:<28}{value / 1e6:>14.2f}")
    print(f"\n{'bytes':<28}{'MB':>14}")
    for name in ("parameters", "train_state"):
        print(f"{name:<28}{room[name] / 1e6:>14.2f}")
    print(f"\n{'bytes per token of a row':<28}{'KB':>14}")
    for name in ("kv", "activations", "logits"):
        print(f"{name:<28}{room[name] / 1e3:>14.2f}")


if __name__ == "__main__":
    with _SIGNALS:
        app.run(main, flags_parser=config_flag.parsed)
