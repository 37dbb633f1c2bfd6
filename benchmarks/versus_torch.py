"""Is JAX the price to pay? The same plain model and train step, ours beside PyTorch's, in turns.

    python benchmarks/versus_torch.py

PyTorch's side is Hugging Face's LlamaForCausalLM with scaled-dot-product attention, clipping and
torch.optim.AdamW, float32, on as many CPU threads as ours. Both start from the same weights and
take the same steps on the same tokens; that their losses agree, step after step, shows that they
do the same work. Prints both times, ours over theirs, and the losses.

Needs requirements-convert.txt (torch, transformers).
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import timing
import torch
from torch_llama import llama
from transformers import LlamaForCausalLM

from mor_jax.config import ModelConfig, OptimConfig, TrainConfig
from mor_jax.types import Params

# No warm-up: every step moves the weights, so that the losses compare the optimisers too.
OPTIM = OptimConfig(schedule="constant", warmup_steps=0, decay_steps=0, lr=1e-3)


class TorchTrainer:
    """The model with `params` and its train step."""

    def __init__(self, cfg: TrainConfig, params: Params, tokens: np.ndarray):
        self.model = llama(cfg.model, params)
        self.tokens = torch.from_numpy(tokens.astype(np.int64))
        self.clip, self.losses = cfg.optim.clip_norm, []
        self.optimizer = _adamw(self.model, cfg.optim)

    def step(self) -> None:
        """One optimiser step; keeps its loss."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.model(input_ids=self.tokens, labels=self.tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.losses.append(float(loss.detach()))


def _adamw(model: LlamaForCausalLM, cfg: OptimConfig) -> torch.optim.AdamW:
    """AdamW that decays everything but norms, as `mor_jax.training.optimizer.decays` does."""
    norms = [p for name, p in model.named_parameters() if "norm" in name]
    others = [p for name, p in model.named_parameters() if "norm" not in name]
    groups = [
        {"params": others, "weight_decay": cfg.weight_decay},
        {"params": norms, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.b1, cfg.b2), eps=cfg.eps)


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=14)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--batch", type=int, default=4, help="rows of a step")
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each side")
    parser.add_argument("--warmup", type=int, default=2, help="steps before the timed ones")
    parser.add_argument("--cores", type=int, default=2, help="CPU cores that both sides use")
    parser.add_argument("--save", action="store_true", help="append to benchmarks/results/")
    return parser.parse_args()


def train_config(args: argparse.Namespace) -> TrainConfig:
    """A plain float32 model without rematerialisation."""
    model = ModelConfig(
        vocab_size=args.vocab,
        hidden_size=args.width,
        num_layers=args.layers,
        num_heads=args.width // 32,
        num_kv_heads=args.width // 64,
        head_dim=32,
        intermediate_size=args.width * 11 // 4,
        max_seq_len=args.length,
        dtype="float32",
    )
    cfg = TrainConfig(batch_size=args.batch, seq_len=args.length, model=model, optim=OPTIM)
    cfg.validate()
    return cfg


def main() -> None:
    """Measures, prints, saves."""
    args = parse_args()
    timing.use_cores(args.cores)
    torch.set_num_threads(args.cores)
    cfg = train_config(args)
    ours = timing.Trainer(cfg)
    theirs = TorchTrainer(cfg, ours.state.params, np.asarray(ours.batch.tokens))
    seconds = timing.interleaved(
        {"mor_jax": ours.step, "torch": theirs.step}, warmup=args.warmup, rounds=args.rounds
    )
    middle = {name: timing.median(values) for name, values in seconds.items()}
    ratio = middle["mor_jax"] / middle["torch"]
    for name, value in middle.items():
        print(f"{name:<10}{value * 1e3:>9.1f} ms a step")
    print(f"ours over theirs {ratio:.3f}\n\nstep   loss, mor_jax   loss, torch")
    for step, pair in enumerate(zip(ours.losses, theirs.losses, strict=True)):
        print(f"{step:>4}{pair[0]:>16.6f}{pair[1]:>14.6f}")
    record = {
        **timing.settings(cfg),
        "layers": cfg.model.num_layers,
        "torch": torch.__version__,
        "seconds": middle,
        "ratio": ratio,
        "losses": {"mor_jax": ours.losses, "torch": theirs.losses},
    }
    timing.report("versus_torch", record, args.save)


if __name__ == "__main__":
    main()
