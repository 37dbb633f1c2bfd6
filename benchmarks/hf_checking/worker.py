"""Runs exports under the transformers of its interpreter; knows nothing of mor_jax.

    python worker.py ASSISTANT FOLDER ... [--trainer]

Each folder is an export with expected.npz beside (models.py writes it). ASSISTANT is one that
guesses for the others in assisted generation. --trainer: Trainer has to take a step as well, which
needs accelerate. Prints a line of JSON: for each folder its findings, or the error that came up.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM

CUT = 16


def load(folder: Path) -> transformers.PreTrainedModel:
    """The export, as its users load it."""
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


def error(got: torch.Tensor, want: np.ndarray) -> float:
    """Largest difference relative to the largest magnitude."""
    return float(np.abs(got.detach().float().numpy() - want).max() / np.abs(want).max())


def logits(model: transformers.PreTrainedModel, expected: dict) -> dict:
    """Whole rows without a cache, padded on the left, under both routings."""
    rows, mask = expected["rows"], expected["mask"]
    real, found = mask.bool(), {}
    for routing in ("causal", "topk"):
        out = model(rows, attention_mask=mask, use_cache=False, routing=routing).logits
        found[routing] = error(out[real], expected[routing][real.numpy()])
    return found


def greedy(model: transformers.PreTrainedModel, expected: dict) -> dict:
    """The likeliest tokens: with the cache, without, row by row, from a returned cache."""
    rows, mask, length = expected["rows"], expected["mask"], expected["prompt"]
    ids, start, new = rows[:, :length], mask[:, :length], rows.shape[1] - length
    name = sys.modules[type(model).__module__].CACHE
    options = {"do_sample": False, "return_dict_in_generate": True}
    whole = {**options, "attention_mask": start, "max_new_tokens": new}
    out = model.generate(ids, output_logits=True, **whole)
    plain = model.generate(ids, use_cache=False, **whole)
    half = model.generate(ids, attention_mask=start, max_new_tokens=CUT, **options)
    cut = {"attention_mask": mask[:, : length + CUT], "max_new_tokens": new - CUT}
    rest = model.generate(half.sequences, **{name: getattr(half, name)}, **cut, **options)
    alone = [
        model.generate(ids[i : i + 1, int(length - start[i].sum()) :], max_new_tokens=new)[0, -new:]
        for i in range(len(ids))
    ]
    return {
        "decoded": error(torch.stack(out.logits, 1), expected["causal"][:, length - 1 : -1]),
        "greedy": torch.equal(out.sequences, rows),
        "uncached": torch.equal(plain.sequences, rows),
        "continued": torch.equal(rest.sequences, rows),
        "alone": torch.equal(torch.stack(alone), rows[:, length:]),
    }


def others(model: transformers.PreTrainedModel, guess, expected: dict) -> dict:
    """Ways to generate that move the cache, beside the same without a cache."""
    rows, mask, length = expected["rows"], expected["mask"], expected["prompt"]
    ids, start = rows[:, :length], mask[:, :length]
    beams = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 8, "do_sample": False}
    moved = model.generate(ids, attention_mask=start, **beams)
    still = model.generate(ids, attention_mask=start, use_cache=False, **beams)
    same = []
    # Of a single token the first guesses are taken back to the very beginning.
    for prompt in (ids[:1], ids[:1, -1:]):
        options = {"max_new_tokens": 12, "do_sample": False}
        helped = model.generate(prompt, assistant_model=guess, **options)
        same.append(torch.equal(helped, model.generate(prompt, **options)))
    return {"beams": torch.equal(moved, still), "assisted": all(same)}


def step(folder: Path, expected: dict) -> dict:
    """The training loss before and after a step of plain gradient descent, by hand."""
    model, rows = load(folder).train(), expected["train"]
    model.config.routing = "topk"
    model.gradient_checkpointing_enable()
    loss = model(rows, labels=rows).loss
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= float(expected["rate"]) * parameter.grad
    wanted = expected["losses"]
    return {
        "loss": abs(float(loss.detach()) - wanted[0]) / wanted[0],
        "step": gained(model, rows, float(loss.detach()), wanted),
    }


def gained(model, rows: torch.Tensor, before: float, wanted: np.ndarray) -> float:
    """Error of what the step gained, relative to it, so that a step not taken shows."""
    after, gain = float(model(rows, labels=rows).loss.detach()), wanted[0] - wanted[1]
    return abs(before - after - gain) / abs(gain)


def trainer(folder: Path, expected: dict) -> dict:
    """The same step by transformers' Trainer, and whether it can predict."""
    from transformers import Trainer, TrainingArguments

    model, rows = load(folder), expected["train"]
    model.config.routing = "topk"
    with tempfile.TemporaryDirectory() as place:
        arguments = TrainingArguments(
            place,
            max_steps=1,
            per_device_train_batch_size=len(rows),
            learning_rate=float(expected["rate"]),
            optim="sgd",
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        # The first label is nobody's target, but old releases count it as one and divide by it.
        labels = torch.cat([torch.full_like(rows[:, :1], -100), rows[:, 1:]], 1)
        data = [{"input_ids": r, "labels": t} for r, t in zip(rows, labels, strict=True)]
        made = Trainer(model, arguments, train_dataset=data)
        before = made.train().training_loss
        predicted = made.predict(data).predictions
    if predicted.shape != (*rows.shape, model.config.vocab_size):
        raise ValueError(f"predictions of Trainer have shape {predicted.shape}")
    return {"trainer": gained(model.train(), rows, before, expected["losses"])}


def examine(folder: Path, guess: transformers.PreTrainedModel, train: bool) -> dict:
    """All findings of one export."""
    with np.load(folder / "expected.npz") as file:
        expected = dict(file)
    for name in ("rows", "mask", "train"):
        expected[name] = torch.from_numpy(expected[name])
    expected["prompt"] = int(expected["prompt"])
    model = load(folder)
    with torch.no_grad():
        found = logits(model, expected) | greedy(model, expected) | others(model, guess, expected)
    found |= step(folder, expected)
    return found | (trainer(folder, expected) if train else {"trainer": None})


def main() -> None:
    """Prints what was found."""
    torch.set_num_threads(1)
    train = "--trainer" in sys.argv
    first, *folders = (Path(name) for name in sys.argv[1:] if name != "--trainer")
    guess, found = load(first), {}
    for folder in folders:
        try:
            found[folder.name] = examine(folder, guess, train)
        except Exception as failed:
            # A release that breaks one thing is told with what it breaks.
            last = (str(failed).strip().splitlines() or [""])[-1]
            found[folder.name] = {"error": f"{type(failed).__name__}: {last}"}
    print(json.dumps({"transformers": transformers.__version__, "models": found}))


if __name__ == "__main__":
    main()
