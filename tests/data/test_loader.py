"""Batches: the same from any start, for any number of hosts and workers, in the right mixture."""

import dataclasses
import json
from itertools import islice

import numpy as np
import pytest

from mor_jax.config import DataConfig
from mor_jax.data import Layout, fingerprint, open_corpus, train_batches, validation_batches
from mor_jax.data.streams.mixture import CYCLE, Mixture, apportion
from mor_jax.types import IGNORE

LAYOUT = Layout(length=16, batch_size=4)


def take(cfg, tokenizer, count, layout=LAYOUT, **options):
    batches = train_batches(cfg, tokenizer, layout, seed=7, **options)
    taken = list(islice(batches, count))
    assert batches.position == options.get("start", 0) + count * layout.batch_size
    batches.close()
    return taken


def rows_of(batches):
    return [tuple(row) for batch in batches for row in batch.tokens.tolist()]


def assert_same(one, two):
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        for field in dataclasses.fields(a):
            left, right = getattr(a, field.name), getattr(b, field.name)
            assert (left is None) == (right is None)
            if left is not None:
                np.testing.assert_array_equal(left, right)


def test_batches_are_rows_of_the_corpus(cfg, byte_tokenizer):
    [batch] = take(cfg, byte_tokenizer, 1)
    assert batch.tokens.shape == batch.targets.shape == (4, 16)
    assert type(batch.tokens) is np.ndarray and batch.tokens.dtype == np.int32
    assert batch.segments is None and batch.positions is None
    np.testing.assert_array_equal(batch.tokens[:, 1:], batch.targets[:, :-1])


def test_an_epoch_has_every_row_once_and_the_next_is_in_another_order(cfg, byte_tokenizer):
    corpus = open_corpus(cfg, byte_tokenizer, "train", 16)
    everything = sorted(tuple(corpus[i]["tokens"].tolist()) for i in range(len(corpus)))
    one_row = Layout(length=16, batch_size=1)
    seen = rows_of(take(cfg, byte_tokenizer, 2 * len(corpus), one_row))
    first, second = seen[: len(corpus)], seen[len(corpus) :]
    assert sorted(first) == sorted(second) == everything
    assert first != second and first != everything
    plain = dataclasses.replace(cfg, shuffle=False)
    unshuffled = rows_of(take(plain, byte_tokenizer, len(corpus), one_row))
    assert unshuffled == [tuple(corpus[i]["tokens"].tolist()) for i in range(len(corpus))]


@pytest.mark.parametrize("prefetch", [0, 3])
@pytest.mark.parametrize("within", [False, True])
def test_any_start_continues_the_same_batches(cfg, byte_tokenizer, prefetch, within):
    cfg = dataclasses.replace(cfg, prefetch=prefetch, document_mask=within)
    whole = take(cfg, byte_tokenizer, 100)
    for start in (1, 99):
        assert_same(take(cfg, byte_tokenizer, 100 - start, start=4 * start), whole[start:])


def test_seeds_change_the_order(cfg, byte_tokenizer):
    other = dataclasses.replace(cfg, seed=1)
    assert rows_of(take(cfg, byte_tokenizer, 5)) != rows_of(take(other, byte_tokenizer, 5))
    batches = train_batches(cfg, byte_tokenizer, LAYOUT, seed=8)
    assert rows_of(islice(batches, 5)) != rows_of(take(cfg, byte_tokenizer, 5))
    batches.close()


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_out_the_global_batch(cfg, byte_tokenizer, hosts):
    whole = take(cfg, byte_tokenizer, 30, start=12)
    layouts = [dataclasses.replace(LAYOUT, host=h, hosts=hosts) for h in range(hosts)]
    parts = [take(cfg, byte_tokenizer, 30, layout, start=12) for layout in layouts]
    for i, batch in enumerate(whole):
        joined = np.concatenate([part[i].tokens for part in parts])
        np.testing.assert_array_equal(joined, batch.tokens)
        assert all(part[i].tokens.shape == (4 // hosts, 16) for part in parts)


def test_workers_change_nothing(cfg, byte_tokenizer):
    layout = dataclasses.replace(LAYOUT, host=1, hosts=2)
    parallel = dataclasses.replace(cfg, num_workers=2, document_mask=True)
    alone = dataclasses.replace(parallel, num_workers=0)
    expected = take(alone, byte_tokenizer, 7, layout, start=8)
    assert_same(take(parallel, byte_tokenizer, 7, layout, start=8), expected)


@pytest.fixture
def three(tmp_path):
    """Three sources whose rows tell where they come from: their letter."""
    for letter in "abc":
        lines = [json.dumps({"text": letter * (20 + i)}) for i in range(30)]
        (tmp_path / f"{letter}.jsonl").write_text("\n".join(lines))
    sources = tuple(f"jsonl:{tmp_path}/{letter}.jsonl" for letter in "abc")
    return DataConfig(sources=sources, weights=(1.0, 2.0, 5.0), validation_fraction=0.3)


def letters(batches):
    return [max(row, key=row.count) for row in rows_of(batches)]


def test_mixture_follows_the_weights_everywhere(three, byte_tokenizer):
    drawn = letters(take(three, byte_tokenizer, 200))
    for start in range(0, 800, 80):
        counts = [drawn[start : start + 80].count(ord(letter)) for letter in "abc"]
        assert np.abs(np.array(counts) - [10, 20, 50]).max() <= 1
    even = dataclasses.replace(three, weights=None)
    assert letters(take(even, byte_tokenizer, 30)).count(ord("a")) == 40


def test_mixture_counts_each_source_without_gaps():
    mixture = Mixture((0.2, 0.5, 0.3))
    drawn = [mixture[i] for i in range(CYCLE - 50, CYCLE + 950)]
    for source, share in enumerate((200, 500, 300)):
        numbers = [number for owner, number in drawn if owner == source]
        assert len(numbers) == share
        assert numbers == list(range(numbers[0], numbers[0] + share))


def test_shares_add_up():
    assert apportion((1.0, 1.0, 1.0), 10).tolist() in ([4, 3, 3], [3, 4, 3], [3, 3, 4])
    assert apportion((1e-9, 1.0), 10).tolist() == [1, 9]
    assert apportion((1e-9, 1e-9, 1.0), 3).tolist() == [1, 1, 1]


def test_heldout_is_fixed_disjoint_and_spread(cfg, byte_tokenizer):
    one = validation_batches(cfg, byte_tokenizer, LAYOUT, 3)
    other_seed = dataclasses.replace(cfg, seed=5)
    assert_same(one, validation_batches(other_seed, byte_tokenizer, LAYOUT, 3))
    assert len(one) == 3
    train = open_corpus(cfg, byte_tokenizer, "train", 16)
    trained = {tuple(train[i]["tokens"].tolist()) for i in range(len(train))}
    assert not trained & set(rows_of(one))
    corpus = open_corpus(cfg, byte_tokenizer, "heldout", 16)
    everything = [tuple(corpus[i]["tokens"].tolist()) for i in range(len(corpus))]
    chosen = [everything.index(row) for row in rows_of(one)]
    assert len(set(chosen)) == 12 and max(chosen) > len(corpus) * 0.8


def test_heldout_hosts_and_mixture(three, byte_tokenizer):
    whole = validation_batches(three, byte_tokenizer, LAYOUT, 4)
    hosts = [
        validation_batches(three, byte_tokenizer, dataclasses.replace(LAYOUT, host=h, hosts=2), 4)
        for h in range(2)
    ]
    for i, batch in enumerate(whole):
        joined = np.concatenate([host[i].tokens for host in hosts])
        np.testing.assert_array_equal(joined, batch.tokens)
    assert [letters(whole).count(ord(letter)) for letter in "abc"] == [2, 4, 10]


def test_small_heldout_split_fills_the_last_batch_without_targets(cfg, byte_tokenizer):
    rows = len(open_corpus(cfg, byte_tokenizer, "heldout", 100))
    layout = Layout(length=100, batch_size=rows + 3)
    [batch] = validation_batches(cfg, byte_tokenizer, layout, 5)
    assert batch.tokens.shape == (rows + 3, 100)
    assert (batch.targets[:rows] != IGNORE).all() and (batch.targets[rows:] == IGNORE).all()


def test_a_batch_larger_than_the_text_has_no_more_rows_than_there_are(cfg, byte_tokenizer):
    rows = len(open_corpus(cfg, byte_tokenizer, "heldout", 100))
    for size, batches in ((10**30, 1), (8 * rows, 10**30)):
        layout = Layout(length=100, batch_size=size)
        [batch] = validation_batches(cfg, byte_tokenizer, layout, batches, "heldout", 4)
        assert len(batch.tokens) == -(-rows // 4) * 4
        assert (batch.targets[:rows] != IGNORE).all() and (batch.targets[rows:] == IGNORE).all()
    hosts = [dataclasses.replace(layout, host=h, hosts=2) for h in range(2)]
    parts = [validation_batches(cfg, byte_tokenizer, h, 9, "heldout", 4)[0].tokens for h in hosts]
    np.testing.assert_array_equal(np.concatenate(parts), batch.tokens)


def test_fingerprint_changes_when_batches_would(cfg, byte_tokenizer, tmp_path, texts):
    one = fingerprint(cfg, byte_tokenizer)
    assert one == fingerprint(dataclasses.replace(cfg, num_workers=3, prefetch=9), byte_tokenizer)
    assert one == fingerprint(dataclasses.replace(cfg, weights=(1.0,)), byte_tokenizer)
    for change in ({"seed": 1}, {"document_mask": True}, {"validation_fraction": 0.4}):
        assert one != fingerprint(dataclasses.replace(cfg, **change), byte_tokenizer)
    (tmp_path / "moved").mkdir()
    for i, text in enumerate(texts):
        (tmp_path / "moved" / f"{i:02d}").write_text(text)
    moved = dataclasses.replace(cfg, sources=(f"text:{tmp_path}/moved/*",))
    assert one == fingerprint(moved, byte_tokenizer)
    (tmp_path / "moved" / "07").write_text("changed")
    assert one != fingerprint(moved, byte_tokenizer)


def test_layout_and_start_are_checked(cfg, byte_tokenizer):
    with pytest.raises(ValueError, match=r"=6: .*multiple of the number of hosts, 4.*Try 8"):
        Layout(length=16, batch_size=6, hosts=4)
    with pytest.raises(ValueError, match=r"host=2: must be in 0 \.\. 1"):
        Layout(length=16, batch_size=4, host=2, hosts=2)
    with pytest.raises(ValueError, match=r"start=-1"):
        train_batches(cfg, byte_tokenizer, LAYOUT, seed=0, start=-1)
