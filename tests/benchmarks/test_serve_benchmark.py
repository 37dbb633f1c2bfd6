"""The serving benchmark's models, its load, and what a machine allows; not its numbers."""

import queue
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from support.patience import until

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from serving import allowed, load, report, shapes, weights

from mor_jax.data.tokenizers.bytes import ByteTokenizer
from mor_jax.inference.engine.engine import Engine, EngineConfig
from mor_jax.models.flops import flops, kv_bytes
from mor_jax.models.param_count import unique_parameters

MODELS = shapes.family(shapes.SHAPES["scaled"], "float32")
RATES = ((1, 1e10), (32, 1e11), (512, 2e11))
MACHINE = allowed.Machine(rates=RATES, bandwidth=1e10, decoding=5e9, prefill=5e10)


def shares(cfg):
    return cfg.router.capacities(cfg.num_recursions)


def test_the_full_shape_is_the_papers():
    paper = shapes.family(shapes.SHAPES["360m"], "bfloat16")
    count = unique_parameters(paper["plain"], embedding=False)
    assert count == pytest.approx(314.6e6, rel=1e-3)
    assert [cfg.num_layers for cfg in paper.values()] == [32, 34, 32, 32, 32, 32, 34, 34]


@pytest.mark.parametrize("name", MODELS)
def test_the_flops_of_serving_are_those_of_the_same_tokens_in_rows(name):
    cfg = MODELS[name]
    traffic = allowed.Traffic(batch=32, prompt=256, answer=128, piece=64)
    parts = allowed.per_token(cfg, shares(cfg), traffic)
    whole = flops(cfg, 384, shares(cfg))
    # Only answers need the output matrix; routers are left out of what is allowed.
    wanted = whole.forward(head=False) * 384 / 128 + whole.head
    assert allowed.flops(parts) == pytest.approx(wanted, rel=2e-3)
    # What decoding reads, and pieces of prompts of 64 tokens at a time.
    read = sum(part.read for part in parts)
    keys = 256 + 128 / 2 + 256 / 128 * 128 / 64
    if cfg.sharing == "none":
        assert read == pytest.approx(kv_bytes(cfg, 384) * keys)
    else:
        assert read < kv_bytes(MODELS["plain"], 384) * keys


def test_few_rows_are_slower():
    assert [MACHINE.rate(rows) for rows in (0.5, 1, 16.5, 32, 272, 1000)] == pytest.approx(
        [1e10, 1e10, 5.5e10, 1e11, 1.5e11, 2e11]
    )
    slow, fast = (
        allowed.seconds(
            allowed.per_token(
                MODELS["MoR-4"],
                (1.0, 0.75, 0.5, 0.25),
                allowed.Traffic(batch=batch, prompt=256, answer=256, piece=128),
            ),
            MACHINE,
            bare=True,
        )
        for batch in (4, 64)
    )
    assert slow > fast
    # What the engine's attention really does is no faster than memory and products.
    parts = allowed.per_token(
        MODELS["plain"], (1.0,), allowed.Traffic(batch=32, prompt=256, answer=256, piece=128)
    )
    bare, measured = (allowed.seconds(parts, MACHINE, bare=bare) for bare in (True, False))
    assert measured > bare


def test_the_load_is_drawn_around_the_papers_lengths():
    made = load.requests(400, 1000)
    lengths = np.array([(len(request.prompt), request.max_tokens) for request in made])
    assert np.all(np.abs(lengths.mean(axis=0) - load.MEAN) < 15)
    assert lengths.min() >= load.SHORTEST and lengths.max() <= load.LONGEST
    assert made == load.requests(400, 1000) and made != load.requests(400, 1000, seed=1)


class InStep(queue.Queue):
    """The engine waits until an event has been taken, so that nobody looks at a later state of it
    than the clients have seen, however seldom they get their turn."""

    def put(self, item):
        super().put(item)
        until(self.empty, every=0.0005)


def test_a_closed_loop_counts_what_its_clients_see(monkeypatch):
    monkeypatch.setattr(load, "queue", SimpleNamespace(SimpleQueue=InStep))
    monkeypatch.setattr(load, "MEAN", 24)
    monkeypatch.setattr(load, "SPREAD", 6)
    monkeypatch.setattr(load, "SHORTEST", 4)
    monkeypatch.setattr(load, "_EVERY", 5)
    cfg = shapes.family(shapes.SHAPES["quick"], "float32")["MoR-2"]
    served = weights.random_served("MoR-2", cfg, ByteTokenizer())
    work = load.requests(9, cfg.vocab_size)
    with Engine(served, EngineConfig(slots=3, max_length=128)) as engine:
        seen = load.drive(engine, work, 3)
        assert engine.statistics().finished == 9
    assert 0 < seen.tokens < sum(request.max_tokens for request in work)
    assert seen.rate == pytest.approx(seen.tokens / seen.seconds)
    assert 1 < seen.depth < 2 and 0 < seen.useful <= 1 and 1 < seen.running <= 3
    most = 2 * cfg.num_kv_heads * cfg.head_dim * 4 * cfg.num_layers
    assert most / 3 < seen.stored < most and seen.given > seen.stored
    assert seen.first_median <= seen.first_p99 and seen.between_median <= seen.between_p99
    record = {"part": "fixed", "model": "MoR-2", "slots": 3, "shares": (1.0, 0.5)}
    record |= {"overflows": 0, "preemptions": 0, "allowed": 1.0, "allowed_bare": 2.0}
    record |= vars(MACHINE)
    record |= {"shape": "quick", "dtype": "float32", "device": "this", "cores": 1, "jax": "0"}
    page = report.page([record | {"date": "2000-01-01"} | vars(seen)])
    assert f"| MoR-2 | 3 | {seen.rate:,.0f} | 1.00 | 1.00 | 1.00 | 1.00 |" in page
