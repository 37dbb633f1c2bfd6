"""Sampling against sorting oracles in NumPy, and draws against the distribution they come from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mor_jax.inference.engine.request import MAX_LOGPROBS, Request, SamplingParams
from mor_jax.inference.engine.sampling import PenaltyState, SamplingArrays, SamplingFeatures, sample

GREEDY = SamplingParams(temperature=0.0)
run = jax.jit(sample)


def requests(rows: list[SamplingParams], logprobs: int | None = None) -> list[Request]:
    return [Request(prompt=(0,), sampling=row, logprobs=logprobs) for row in rows]


def drawn(logits, rows, positions=None, penalty_state=None, logprobs=None):
    """What `sample` gives for these rows, as NumPy arrays."""
    where = np.arange(len(rows)) if positions is None else positions
    where = jnp.asarray(where, jnp.int32)
    made = (SamplingArrays.of(rows), SamplingFeatures.of(requests(rows, logprobs)))
    settings, features = jax.tree.map(jnp.asarray, made)
    return jax.device_get(run(jnp.asarray(logits), settings, where, features, penalty_state))


def random_logits(rows: int, vocabulary: int, seed: int = 0) -> np.ndarray:
    return (2 * np.random.default_rng(seed).normal(size=(rows, vocabulary))).astype(np.float32)


def softmax(logits):
    out = np.exp(np.float64(logits) - np.max(logits, axis=-1, keepdims=True))
    return out / out.sum(-1, keepdims=True)


def kept(logits: np.ndarray, row: SamplingParams) -> np.ndarray:
    """Probabilities of one row's tokens after all cuts, by sorting."""
    share = softmax(logits / row.temperature)
    order = np.argsort(-share, kind="stable")
    if row.top_k is not None:
        share[order[row.top_k :]] = 0
        share /= share.sum()
    first_enough = np.argmax(np.cumsum(share[order]) >= row.top_p - 1e-6)
    share[order[first_enough + 1 :]] = 0
    share[share < row.min_p * share.max()] = 0
    return share / share.sum()


CUTS = {
    "temperature": SamplingParams(temperature=0.7, seed=1),
    "hot": SamplingParams(temperature=3.0, seed=2),
    "top_k": SamplingParams(top_k=5, seed=3),
    "top_p": SamplingParams(top_p=0.6, seed=4),
    "min_p": SamplingParams(min_p=0.2, seed=5),
    "all": SamplingParams(temperature=1.3, top_k=12, top_p=0.9, min_p=0.02, seed=6),
}


@pytest.mark.parametrize("name", CUTS)
def test_draws_follow_the_distribution_that_sorting_gives(name):
    """20,000 draws of one row: frequencies within five standard errors, nothing that was cut."""
    logits, row, number = random_logits(1, 40, seed=7), CUTS[name], 20_000
    wanted = kept(logits[0], row)
    features = jax.tree.map(jnp.asarray, SamplingFeatures.of(requests([row])))
    settings = jax.tree.map(lambda x: jnp.broadcast_to(x, (number,)), SamplingArrays.of([row]))
    rows = jnp.broadcast_to(jnp.asarray(logits), (number, 40))
    token = np.asarray(run(rows, settings, jnp.arange(number), features, None).token)
    share = np.bincount(token, minlength=40) / number
    assert np.all(share[wanted == 0] == 0)
    error = np.sqrt(wanted * (1 - wanted) / number)
    assert np.all(np.abs(share - wanted) <= 5 * error + 1e-9)


@pytest.mark.parametrize("vocabulary", [1, 3, 255, 256, 1000])
def test_only_what_the_cuts_keep_is_drawn_in_any_vocabulary(vocabulary):
    rng = np.random.default_rng(vocabulary)
    logits = random_logits(64, vocabulary, seed=vocabulary)
    rows = [
        SamplingParams(
            temperature=float(rng.uniform(0.2, 3)),
            top_k=int(rng.integers(1, 2 * vocabulary + 1)) if i % 2 else None,
            top_p=float(rng.uniform(0.01, 1)) if i % 3 else 1.0,
            min_p=float(rng.uniform(0, 0.5)) if i % 5 == 0 else 0.0,
            seed=i,
        )
        for i in range(len(logits))
    ]
    token = drawn(logits, rows).token
    for i, row in enumerate(rows):
        assert kept(logits[i], row)[token[i]] > 0, (row, token[i])


def test_cuts_keep_equal_logits_together_and_the_extremes_are_sound():
    logits = np.tile(np.float32([3, 1, 3, 2, 2, -np.inf]), (400, 1))
    for row, wanted in (
        (SamplingParams(top_k=1, seed=0), {0, 2}),
        (SamplingParams(top_k=3, seed=0), {0, 2, 3, 4}),
        (SamplingParams(top_p=1e-30, seed=0), {0, 2}),
        (SamplingParams(min_p=1.0, seed=0), {0, 2}),
        (SamplingParams(top_k=10**12, temperature=1e30, seed=0), {0, 1, 2, 3, 4}),
        (SamplingParams(temperature=1e-30, seed=0), {0, 2}),
    ):
        assert set(drawn(logits, [row] * 400).token.tolist()) == wanted, row


def test_a_row_depends_on_nothing_beside_it():
    logits = random_logits(16, 700)
    kinds = [GREEDY, *CUTS.values()]
    rows = [kinds[i % len(kinds)] for i in range(16)]
    together = drawn(logits, rows, logprobs=3)
    for i in range(16):
        alone = drawn(logits[i : i + 1], rows[i : i + 1], positions=[i], logprobs=0)
        assert alone.token[0] == together.token[i]
        np.testing.assert_allclose(alone.logprob, together.logprob[i : i + 1], rtol=1e-6)


def test_seed_and_position_decide_a_draw():
    logits = np.zeros((200, 50), np.float32)
    first = drawn(logits, [SamplingParams(seed=9)] * 200).token
    np.testing.assert_array_equal(first, drawn(logits, [SamplingParams(seed=9)] * 200).token)
    other = drawn(logits, [SamplingParams(seed=10)] * 200).token
    one = drawn(logits, [SamplingParams(seed=9)] * 200, positions=[0] * 200).token
    assert len(set(one.tolist())) == 1 and len(set(first.tolist())) > 30
    assert np.mean(first == other) < 0.1
    # Without one, each row gets its own.
    assert (
        len(set(drawn(logits, [SamplingParams()] * 200, positions=[0] * 200).token.tolist())) > 30
    )


def test_greedy_takes_the_first_of_the_best():
    logits = random_logits(32, 3 * 256 + 17)
    logits[0] = 0.0
    logits[1, [5, 300, 700]] = 50.0
    logits[2, -1] = 60.0
    found = drawn(logits, [GREEDY] * 32).token
    np.testing.assert_array_equal(found, np.argmax(logits, axis=1))


def test_penalties():
    logits = np.float32([[2.0, 1.9, -1.0, 0.5, -np.inf]])
    output_counts = jnp.asarray([[2, 0, 1, 0, 1]], jnp.int16)
    in_prompt = jnp.asarray([[False, True, False, False, False]])
    penalty_state = PenaltyState(output_counts, in_prompt)

    def best(**penalties):
        return int(
            drawn(
                logits, [SamplingParams(temperature=0.0, **penalties)], penalty_state=penalty_state
            ).token[0]
        )

    assert best() == 0
    assert best(presence_penalty=0.2) == 1  # 1.8 against 1.9
    assert best(frequency_penalty=0.06) == 1  # 1.88
    assert best(frequency_penalty=0.04) == 0  # 1.92
    assert best(repetition_penalty=4.0) == 0  # 0.5, 0.475, -4, 0.5: the first of equals
    assert best(repetition_penalty=5.0) == 3
    assert best(repetition_penalty=0.1) == 0
    assert best(presence_penalty=-2.0) == 0
    # Beyond every scale: no NaN, and what the model rules out stays out.
    for repetition in (1e-300, 1e300):
        assert best(repetition_penalty=repetition) in (0, 3)
    row = SamplingParams(
        presence_penalty=-2.0, frequency_penalty=-2.0, repetition_penalty=1e-30, seed=0
    )
    many = PenaltyState(jnp.tile(output_counts, (300, 1)), jnp.tile(in_prompt, (300, 1)))
    assert 4 not in drawn(np.tile(logits, (300, 1)), [row] * 300, penalty_state=many).token


def test_logprobs_are_those_of_the_model():
    logits = random_logits(4, 300)
    logits[3, 7] = logits[3, 200] = 30.0
    row = SamplingParams(temperature=0.3, top_k=3, repetition_penalty=2.0, seed=3)
    penalty_state = PenaltyState(jnp.ones((4, 300), jnp.int16), jnp.ones((4, 300), bool))
    found = drawn(logits, [row] * 4, penalty_state=penalty_state, logprobs=5)
    wanted = np.log(softmax(logits))
    np.testing.assert_allclose(found.logprob, wanted[np.arange(4), found.token], atol=1e-5)
    order = np.argsort(-logits, axis=1, kind="stable")[:, :MAX_LOGPROBS]
    np.testing.assert_array_equal(found.top_ids, order)
    sorted_ = np.take_along_axis(wanted, order, axis=1)
    np.testing.assert_allclose(found.top_logprobs, sorted_, atol=1e-5)
    few = drawn(logits[:, :7], [row] * 4, logprobs=1)
    assert np.all(few.top_ids[:, 7:] == -1) and np.all(np.isneginf(few.top_logprobs[:, 7:]))
    none = drawn(logits, [row] * 4)
    assert np.all(none.logprob == 0) and np.all(none.top_ids == -1)


def test_logits_that_are_no_numbers_are_told_and_hurt_nobody_else():
    logits = random_logits(5, 600)
    fine = drawn(logits, list(CUTS.values())[:5]).token
    logits[1, 300], logits[2, 3], logits[3] = np.nan, np.inf, -np.inf
    for rows in ([GREEDY] * 5, list(CUTS.values())[:5]):
        found = drawn(logits, rows, logprobs=2).token
        np.testing.assert_array_equal(found[1:4], [-1, -1, -1])
    assert found[0] == fine[0] and found[4] == fine[4]


def test_nothing_is_wanted_that_nobody_asked_for():
    def names(*rows, logprobs=None):
        features = SamplingFeatures.of(requests(list(rows), logprobs))
        return {name for name, value in vars(features).items() if value}

    assert names() == names(GREEDY, SamplingParams(temperature=0.0, top_k=4)) == set()
    assert names(GREEDY, SamplingParams()) == {"random_sampling"}
    assert (
        names(SamplingParams(top_p=0.9))
        == names(SamplingParams(top_k=3))
        == {"random_sampling", "truncation"}
    )
    assert names(SamplingParams(temperature=0.0, frequency_penalty=0.1)) == {"penalties"}
    assert names(GREEDY, logprobs=0) == {"logprobs"}
    assert names(GREEDY, logprobs=1) == {"logprobs", "alternatives"}


def test_one_row_is_filled_like_all():
    odd = SamplingParams(top_k=2**40, repetition_penalty=1e300, seed=2**32 - 1)
    rows = [*CUTS.values(), SamplingParams(temperature=0.0, seed=0), odd]
    for name, values in vars(SamplingArrays.of(rows)).items():
        assert np.all(np.isfinite(values)), name
        for value, row in zip(values, rows, strict=True):
            one = SamplingArrays.row(row)[name]
            assert (value, values.dtype) == (one, one.dtype)
    assert SamplingArrays.row(odd, seed=5)["seed"] == 5
    assert np.all(SamplingArrays.greedy(3).temperature == 0)
