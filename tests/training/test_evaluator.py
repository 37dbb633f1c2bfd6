"""Evaluation: means over all held-out tokens, under both routings, causal where it says so."""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from support.seeded import random_params
from support.tiny import TINY, tokens, train_config

from mor_jax.evaluation.loss_sums import position_starts, row_sums
from mor_jax.models.params import forward, unembed
from mor_jax.models.routing.router import Route
from mor_jax.training.evaluator import Evaluator, complete, token_depths
from mor_jax.types import IGNORE, Batch

MODEL = dataclasses.replace(TINY["expert_cycle"], num_layers=2, num_recursions=2)
PARAMS = random_params(MODEL)


def rows(seed, padded):
    """Two rows of 16 tokens; the last `padded` of the second one are padding."""
    ids = np.array(tokens(MODEL, 2, 16, seed))
    targets, segments = np.roll(ids, -1, 1), np.ones_like(ids)
    segments[1, 16 - padded :] = 0
    targets[:, -1] = targets[segments == 0] = IGNORE
    return Batch(*(jnp.asarray(a, jnp.int32) for a in (ids, targets, segments)))


@cache
def predict(mode):
    def run(batch):
        out = forward(MODEL, PARAMS, batch, Route(mode=mode))
        return jax.nn.log_softmax(unembed(MODEL, PARAMS, out.hidden)), out.routing.depth

    return jax.jit(run)


def test_losses_and_depths_are_means_over_all_tokens():
    batches = [rows(0, padded=9), rows(1, padded=0)]
    cfg = train_config(model=MODEL)
    found = Evaluator.of(cfg, batches)(PARAMS)
    for mode in ("topk", "causal"):
        losses, right, depths = [], [], []
        for batch in batches:
            logp, depth = (np.asarray(x) for x in predict(mode)(batch))
            b, t = np.nonzero(np.asarray(batch.targets) != IGNORE)
            target = np.asarray(batch.targets)[b, t]
            losses += list(-logp[b, t, target])
            right += list(logp[b, t].argmax(-1) == target)
            depths += list(depth[np.asarray(batch.segments) > 0])
        assert len(depths) == 32 + 32 - 9
        np.testing.assert_allclose(found[f"loss_{mode}"], np.mean(losses), rtol=1e-5)
        np.testing.assert_allclose(found[f"accuracy_{mode}"], np.mean(right), atol=1e-6)
        np.testing.assert_allclose(found[f"depth_{mode}"], np.mean(depths), rtol=1e-6)
        shares = [depths.count(r) / len(depths) for r in range(3)]
        np.testing.assert_allclose(found[f"depth_share_{mode}"], shares, rtol=1e-6)
    assert found["loss_topk"] != found["loss_causal"]


def test_sums_of_rows_are_those_of_their_tokens():
    cfg = dataclasses.replace(train_config(model=MODEL), loss_chunk_size=5)
    batch = rows(0, padded=9)
    starts = position_starts(16)
    assert starts == (0, 1, 2, 4, 8)
    for mode in ("topk", "causal"):
        found = jax.jit(row_sums, static_argnums=(0, 3))(cfg, PARAMS, batch, mode)
        logp, depth = (np.asarray(x) for x in predict(mode)(batch))
        for b in range(2):
            (here,) = np.nonzero(np.asarray(batch.targets)[b] != IGNORE)
            ce = -logp[b, here, np.asarray(batch.targets)[b, here]]
            group = np.searchsorted(starts, here, side="right") - 1
            for name, where in (("position", group), ("depth", depth[b, here])):
                number = found[f"targets_{name}"].shape[1]
                wanted = np.bincount(where, ce, number)
                np.testing.assert_allclose(found[f"ce_{name}"][b], wanted, rtol=1e-5)
                np.testing.assert_array_equal(
                    found[f"targets_{name}"][b], np.bincount(where, minlength=number)
                )
            present = depth[b, np.asarray(batch.segments)[b] > 0]
            np.testing.assert_array_equal(found["depth_count"][b], np.bincount(present, None, 3))


def test_models_without_routing_have_one_loss():
    cfg = train_config("plain", model=dataclasses.replace(TINY["plain"], num_layers=1))
    found = Evaluator.of(cfg, [rows(0, padded=9)])(random_params(cfg.model))
    assert found.keys() == {"loss_causal", "accuracy_causal"}


def test_depths_of_a_text_are_those_of_causal_routing():
    batch = rows(3, padded=0)
    found = token_depths(MODEL, PARAMS, np.asarray(batch.tokens[0]))
    np.testing.assert_array_equal(found, predict("causal")(batch)[1][0])
    assert set(found.tolist()) == {1, 2}


def test_completions_follow_from_the_prompt_and_the_seed():
    prompt = np.asarray(tokens(MODEL, 1, 5))[0]
    run = partial(complete, MODEL, PARAMS)
    first, again, other = run(prompt, 11, 0), run(prompt, 11, 0), run(prompt, 11, 1)
    assert first.shape == (11,)
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)
    # Sharpened so far that sampling always takes the best, it must follow the model's own logits,
    # computed at once over the finished row.
    sharp = PARAMS | {"norm": {"scale": 1e4 * PARAMS["norm"]["scale"]}}
    greedy = complete(MODEL, sharp, prompt, 11, 0)
    row = jnp.asarray(np.concatenate([prompt, greedy]))
    known = rows(0, padded=0)
    logp, _ = predict("causal")(dataclasses.replace(known, tokens=jnp.stack([row, row])))
    np.testing.assert_array_equal(greedy, logp[0, 4:15].argmax(-1))
