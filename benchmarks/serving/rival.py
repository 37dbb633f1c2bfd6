"""`transformers.generate` on the same plain model: batches of equal prompts' lengths, greedy.

Needs requirements-convert.txt (torch, transformers).
"""

import dataclasses
import time

import numpy as np
import torch
from torch_llama import llama

from mor_jax.config import ModelConfig
from mor_jax.types import Params

_SHORT = 16


@dataclasses.dataclass(frozen=True)
class Generated:
    """tokens: int [rows, new], the answers. seconds: of everything; of the first tokens alone."""

    tokens: np.ndarray
    seconds: float
    first_seconds: float

    @property
    def rate(self) -> float:
        """Answer tokens a second, prompts included."""
        return self.tokens.size / self.seconds

    @property
    def decode_rate(self) -> float:
        """Answer tokens a second after the first ones."""
        rows, new = self.tokens.shape
        return rows * (new - 1) / (self.seconds - self.first_seconds)


def best(cfg: ModelConfig, params: Params, prompts: np.ndarray, new: int, cores: int) -> Generated:
    """`generate` with whichever number of threads decodes faster, one or as many as cores."""
    tried = [generate(cfg, params, prompts, _SHORT, threads) for threads in (1, cores)]
    fastest = max(range(2), key=lambda i: tried[i].rate)
    return generate(cfg, params, prompts, new, (1, cores)[fastest])


def generate(
    cfg: ModelConfig, params: Params, prompts: np.ndarray, new: int, threads: int
) -> Generated:
    """Greedy answers of `new` tokens to `prompts` [rows, length], after a short warm-up."""
    torch.set_num_threads(threads)
    network = llama(cfg, params).eval()
    rows = torch.from_numpy(prompts.astype(np.int64))
    there = torch.ones_like(rows)
    # No end of text: every answer has its full length.
    network.generation_config.eos_token_id = None
    network.generation_config.pad_token_id = 0

    def run(number: int) -> tuple[np.ndarray, float]:
        start = time.perf_counter()
        with torch.inference_mode():
            made = network.generate(
                rows, attention_mask=there, max_new_tokens=number, do_sample=False
            )
        return made[:, rows.shape[1] :].numpy(), time.perf_counter() - start

    run(2)
    _, first = run(1)
    tokens, seconds = run(new)
    return Generated(tokens, seconds, first)
