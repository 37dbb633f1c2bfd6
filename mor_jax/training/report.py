"""The end of a run: figures, a completion, the summary."""

import time
from typing import Any

import jax
import numpy as np

from mor_jax import data
from mor_jax.checkpoint import pretrained
from mor_jax.config import TrainConfig
from mor_jax.data.ngram_baseline import LARGEST
from mor_jax.data.streams.token_streams import MemoryStream
from mor_jax.distributed.startup_check import gather
from mor_jax.models.flops import flops
from mor_jax.models.param_count import effective, effective_parameters, unique_parameters
from mor_jax.training.evaluator import complete, token_depths
from mor_jax.training.run import Run, TrainResult
from mor_jax.training.summary import RunSummary, show
from mor_jax.training.train_state import TrainState


def finish(run: Run, trained: TrainResult, began: tuple[int, float]) -> None:
    """Draws the figures and prints the summary, on the first process only.

    began: step and `time.perf_counter` at the start of this call.
    """
    first_step, start = began
    seconds = time.perf_counter() - start
    state, evaluated, meter = trained.state, trained.evaluated, trained.meter
    cfg, params = run.cfg, state.params
    completion = ""
    prompt = run.tokenizer.encode(cfg.eval.prompt)
    if cfg.eval.completion_tokens and len(prompt):
        tokens = complete(cfg.model, params, prompt, cfg.eval.completion_tokens, cfg.seed)
        completion = run.tokenizer.decode(tokens)
    depth_picture = _depths(run, state) if cfg.model.router.kind != "none" else None
    if jax.process_index() != 0:
        return
    # Deferred: only the end of a run draws.
    from mor_jax.plotting import plots

    bigram = bigram_loss(cfg, run.tokenizer)
    curves = run.path / "loss.png"
    plots.loss_curves(run.path / "metrics.jsonl", curves, baseline=bigram)
    show(
        RunSummary(
            name=_name(cfg),
            steps=int(state.step),
            seconds=seconds,
            first_step=first_step,
            started_from=pretrained.origin(run.path),
            unique_parameters=unique_parameters(cfg.model),
            effective_parameters=effective_parameters(cfg.model),
            flops_per_token=flops(cfg.model, cfg.seq_len).training(),
            plain_flops_per_token=flops(effective(cfg.model), cfg.seq_len).training(),
            loss_causal=evaluated["loss_causal"],
            loss_topk=evaluated.get("loss_topk"),
            loss_bigram=bigram,
            recursions=cfg.model.num_recursions,
            mean_depth=evaluated.get("depth_causal"),
            skipped_steps=int(state.skipped),
            tokens_per_second=meter.tokens_per_second,
            mfu=meter.mfu,
            prompt=cfg.eval.prompt,
            completion=completion,
            loss_picture=curves,
            depth_picture=depth_picture,
        )
    )


def bigram_loss(cfg: TrainConfig, tokenizer: data.Tokenizer) -> float | None:
    """Validation loss of a bigram model in nats per token; None for text that is not in memory."""
    if tokenizer.vocab_size > LARGEST:
        return None
    found: dict[str, np.ndarray] = {}
    for split in ("train", "heldout"):
        streams = data.open_streams(cfg.data, tokenizer, split)
        if len(streams) != 1 or not isinstance(streams[0], MemoryStream):
            return None
        found[split] = streams[0].tokens
    return data.ngram_loss(found["train"], found["heldout"], 2, tokenizer.vocab_size)


def _depths(run: Run, state: TrainState) -> Any:
    """Draws the first validation sequence, coloured by depth; returns the path of the figure."""
    first = run.evaluator.batches[0].tokens
    # Each process holds other sequences, and all have to compute on the same one.
    row = np.array(gather(np.asarray(first.addressable_data(0))[0].tolist())[0], np.int32)
    depths = token_depths(run.cfg.model, state.params, row)
    path = run.path / "depth.png"
    if jax.process_index() == 0:
        from mor_jax.plotting import plots

        pieces = plots.text_pieces(row, run.tokenizer.decode)
        plots.depth_map(pieces, depths, path, recursions=run.cfg.model.num_recursions)
    return path


def _name(cfg: TrainConfig) -> str:
    model = cfg.model
    if model.sharing == "none":
        return f"vanilla, {model.num_layers} layers of width {model.hidden_size}"
    kind = {"none": "recursive", "expert": "expert-choice MoR", "token": "token-choice MoR"}
    return (
        f"{kind[model.router.kind]}, {model.sharing}, {model.num_recursions} recursions, "
        f"{model.num_layers} effective layers of width {model.hidden_size}"
    )
