"""Engines of tiny models, and what their answers have to agree with."""

import contextlib
import dataclasses
import threading

import jax
import numpy as np
from support.patience import PATIENCE
from support.seeded import random_params
from support.tiny import TINY

from mor_jax.data.tokenizers.bytes import ByteTokenizer
from mor_jax.inference.engine.request import Request, SamplingParams, Token
from mor_jax.inference.load_model import LoadedModel
from mor_jax.models.flops import routed_shares
from mor_jax.models.params import forward, unembed
from mor_jax.models.routing.router import Route
from mor_jax.types import Batch


def served(name: str, **changes) -> LoadedModel:
    """`TINY[name]` for the byte tokenizer, with random parameters; `changes` replace fields."""
    cfg = dataclasses.replace(TINY[name], vocab_size=256)
    made = LoadedModel(
        name=name,
        cfg=cfg,
        params=random_params(cfg),
        thresholds=None,
        shares=routed_shares(cfg, cfg.max_seq_len),
        tokenizer=ByteTokenizer(),
        chat_template=None,
        special_tokens={},
        eos_ids=frozenset({0}),
        created=0,
    )
    return dataclasses.replace(made, **changes)


def requests(number: int, seed: int = 0, longest: int = 64) -> list[Request]:
    """Random prompts of 1 token and more; half of the answers greedy, half drawn."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(number):
        length = 1 if i == 0 else int(rng.integers(2, longest // 2))
        made.append(
            Request(
                prompt=tuple(rng.integers(1, 256, length).tolist()),
                max_tokens=int(rng.integers(1, longest - length)),
                sampling=SamplingParams(temperature=float(i % 2), seed=i),
                ignore_eos=True,
                logprobs=3,
            )
        )
    return made


@contextlib.contextmanager
def paused(engine, monkeypatch, steps=0):
    """The engine stands still after so many steps with work, until the event given here is set.

    What a test does to an answer under way would otherwise race with the answer.
    """
    going, step, left = threading.Event(), engine._runner.step, [steps]
    scheduler = engine._runner.scheduler

    def slow():
        if scheduler.running or scheduler.waiting:
            left[0] -= 1
            assert left[0] >= 0 or going.wait(PATIENCE)
        return step()

    with monkeypatch.context() as patch:
        patch.setattr(engine._runner, "step", slow)
        try:
            yield going
        finally:
            going.set()


def check_answer(
    model: LoadedModel, request: Request, tokens: list[Token], tolerance: float
) -> None:
    """Log-probabilities, alternatives and depths are those of the full causal forward pass."""
    row = np.array([[*request.prompt, *(token.id for token in tokens)]], np.int32)
    whole = np.zeros((1, 64), np.int32)
    whole[:, : row.shape[1]] = row
    logprobs, depths = _forward(model, whole)
    start = len(request.prompt) - 1
    for i, token in enumerate(tokens):
        there = logprobs[start + i]
        told = [(token.id, token.logprob), *token.top]
        np.testing.assert_allclose(
            [p for _, p in told], [there[t] for t, _ in told], atol=tolerance
        )
        best = np.sort(there)[::-1][: len(token.top)]
        np.testing.assert_allclose([p for _, p in token.top], best, atol=tolerance)
        if request.sampling.temperature == 0:
            assert there[token.id] >= best[0] - tolerance
        if depths is not None:
            assert token.depth == depths[start + i]


_COMPILED: dict[tuple, object] = {}


def _forward(model: LoadedModel, row: np.ndarray):
    cfg = model.cfg

    def run(params, row):
        route = Route(mode="causal", thresholds=model.thresholds)
        out = forward(cfg, params, Batch(row, row), route if cfg.router.kind != "none" else None)
        logits = jax.nn.log_softmax(unembed(cfg, params, out.hidden)[0])
        return logits, None if out.routing is None else out.routing.depth[0]

    key = (model.name, model.thresholds)
    if key not in _COMPILED:
        _COMPILED[key] = jax.jit(run)
    return jax.device_get(_COMPILED[key](model.params, row))
