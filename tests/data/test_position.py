"""The place of a run in its data: no row twice, none left out, whatever a restart changes."""

import dataclasses
import itertools
import json

import pytest

from mor_jax.config import DataConfig
from mor_jax.data import DataPosition, Layout, advance, position_of, resume_position, train_batches

LENGTH, SEED = 16, 7


@pytest.fixture
def folder(tmp_path):
    """Sources a, b, c and d: files of ten texts each."""
    for letter in "abcd":
        texts = [" ".join(f"{letter}{i}.{k:02d}" for k in range(8)) for i in range(10)]
        lines = [json.dumps({"text": text}) for text in texts]
        (tmp_path / f"{letter}.jsonl").write_text("\n".join(lines))
    return tmp_path


def config(folder, letters="ab", **changes):
    sources = tuple(f"jsonl:{folder}/{letter}.jsonl" for letter in letters)
    return DataConfig(sources=sources, validation_fraction=0.2, **changes)


class Run:
    """Reads as a training does: legs of batches, and a place that outlives each of them."""

    def __init__(self, tokenizer):
        self.tokenizer, self.place, self.rows = tokenizer, None, []

    def change(self, cfg, length=LENGTH, seed=SEED, jumps=()):
        """A start under these settings."""
        now = position_of(cfg, self.tokenizer, length=length, seed=seed)
        if self.place is not None:
            # Through the checkpoint, as JSON.
            notes = json.loads(json.dumps(self.place.notes()))
            now = resume_position(DataPosition.of(self.place.row, notes, {}), now, jumps)
        self.cfg, self.place, self.jumps, self.seed = cfg, now, jumps, seed

    def read(self, count, batch_size=4, hosts=1):
        """`count` batches, joined from all hosts."""
        options = {"seed": self.seed, "start": self.place, "jumps": self.jumps}
        feeds = [
            train_batches(
                self.cfg,
                self.tokenizer,
                Layout(length=LENGTH, batch_size=batch_size, host=host, hosts=hosts),
                **options,
            )
            for host in range(hosts)
        ]
        for batches in itertools.repeat(feeds, count):
            for batch in [next(feed) for feed in batches]:
                self.rows += [bytes(row.astype("uint8")) for row in batch.tokens]
        (row,) = {feed.position for feed in feeds}
        self.place = dataclasses.replace(self.place, row=row)
        for feed in feeds:
            feed.close()


def alone(cfg, tokenizer, count, seed=SEED, jumps=()):
    """The first rows of a run that nothing interrupts."""
    run = Run(tokenizer)
    run.change(cfg, seed=seed, jumps=jumps)
    run.read(count, batch_size=1)
    return run.rows


@pytest.mark.parametrize("mixed", [{}, {"weights": (1.0, 3.0)}, {"shuffle": False}], ids=str)
def test_other_batch_sizes_and_hosts_read_the_same_rows_in_the_same_order(
    folder, byte_tokenizer, mixed
):
    cfg = config(folder, **mixed)
    run = Run(byte_tokenizer)
    legs = [(5, 8, 1), (3, 4, 2), (1, 16, 4), (7, 3, 1), (2, 1, 1), (2, 8, 2)]
    for number, (count, batch_size, hosts) in enumerate(legs):
        # How they are read is nobody's place.
        run.change(dataclasses.replace(cfg, prefetch=number % 3))
        run.read(count, batch_size, hosts)
    assert run.place.row == len(run.rows) == sum(count * size for count, size, _ in legs)
    assert run.rows == alone(cfg, byte_tokenizer, len(run.rows))


def test_rows_jumped_over_stay_out_whatever_the_batches(folder, byte_tokenizer):
    cfg, jumps = config(folder), [(9, 14), (30, 33), (12, 16)]
    whole = alone(cfg, byte_tokenizer, 60)
    kept = [row for n, row in enumerate(whole) if not (9 <= n < 16 or 30 <= n < 33)]
    assert alone(cfg, byte_tokenizer, 50, jumps=jumps) == kept
    run = Run(byte_tokenizer)
    for count, batch_size in [(1, 8), (2, 3), (1, 5), (3, 4)]:
        run.change(cfg, jumps=jumps)
        run.read(count, batch_size)
    assert run.rows == kept[: len(run.rows)] and len(run.rows) == 31


@pytest.mark.parametrize("row", [0, 3, 8, 9, 20])
def test_ahead_counts_only_rows_outside_of_jumps(row):
    jumps = [(8, 12), (3, 5), (11, 14), (20, 21)]
    outside = [n for n in range(row, 60) if not any(a <= n < b for a, b in jumps)]
    assert [advance(row, count, jumps) for count in range(30)] == outside[:30]
    assert [advance(row, count) for count in range(5)] == list(range(row, row + 5))


def of_source(rows, letter):
    return [row for row in rows if row.count(letter.encode())]


def test_in_another_mixture_every_source_goes_on_at_its_next_row(folder, byte_tokenizer):
    run = Run(byte_tokenizer)
    single = {letter: alone(config(folder, letter), byte_tokenizer, 90) for letter in "a"}
    run.change(config(folder))
    run.read(5)
    run.change(config(folder, weights=(1.0, 7.0)))
    run.read(6)
    run.change(config(folder, "abc", weights=(3.0, 1.0, 2.0)))
    run.read(9)
    # The order of sources, one that is gone for a while, and a file that moved.
    run.change(config(folder, "ca"))
    run.read(4)
    run.change(config(folder, "ab"))
    run.read(4)
    (folder / "moved").mkdir()
    (folder / "moved" / "a.jsonl").write_bytes((folder / "a.jsonl").read_bytes())
    moved = dataclasses.replace(
        config(folder, "ca"), sources=(f"jsonl:{folder}/c.jsonl", f"jsonl:{folder}/moved/a.jsonl")
    )
    run.change(moved)
    run.read(3)
    seen = of_source(run.rows, "a")
    assert len(seen) > 40
    # Number 0 seeds its order in every mixture that it was in, as it does alone.
    assert seen == single["a"][: len(seen)]
    for letter, order in (("b", 1), ("c", 2)):
        rows, whole = of_source(run.rows, letter), Run(byte_tokenizer)
        whole.change(config(folder, letter))
        only = dataclasses.replace(whole.place.readings[0], order=order)
        whole.place = dataclasses.replace(whole.place, readings=(only,))
        whole.read(len(rows), batch_size=1)
        assert rows == whole.rows and len(rows) > 20
    assert run.place.row == len(run.rows) == 124


def test_an_unchanged_mixture_goes_on_amid_its_cycle(folder, byte_tokenizer):
    cfg = config(folder, weights=(1.0, 2.0))
    run = Run(byte_tokenizer)
    for _ in range(4):
        run.change(cfg)
        run.read(1, batch_size=5)
    assert run.place.since == 0 and run.rows == alone(cfg, byte_tokenizer, 20)


def test_before_the_first_row_everything_may_change(folder, byte_tokenizer):
    run = Run(byte_tokenizer)
    run.change(config(folder))
    run.change(config(folder, "cd", seed=3), seed=9)
    run.read(4)
    assert run.rows == alone(config(folder, "cd", seed=3), byte_tokenizer, 16, seed=9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"length": 32},
            r"seq_len=32: 10 sequences of '.*a\.jsonl' were packed with seq_len=16, .*Keep",
        ),
        ({"seed": 8}, r"seed=8: 10 sequences of .* were read in the order of seed=7"),
        ({"data": {"seed": 1}}, r"data\.seed=1: .*order of data\.seed=0"),
        ({"data": {"shuffle": False}}, r"data\.shuffle=False: .*order of data\.shuffle=True"),
        (
            {"data": {"validation_fraction": 0.4}},
            r"data\.validation_fraction=0\.4: .*read with 0\.2",
        ),
        ({"data": {"text_key": "other"}}, r"data\.text_key='other': .*read with 'text'"),
    ],
    ids=str,
)
def test_what_cannot_be_carried_over_is_refused(folder, byte_tokenizer, change, message):
    for letter in "ab":
        lines = [json.loads(line) for line in (folder / f"{letter}.jsonl").read_text().split("\n")]
        lines = [json.dumps(line | {"other": line["text"].upper()}) for line in lines]
        (folder / f"{letter}.jsonl").write_text("\n".join(lines))
    run = Run(byte_tokenizer)
    run.change(config(folder))
    run.read(5)
    options = {name: value for name, value in change.items() if name != "data"}
    other = dataclasses.replace(config(folder), **change.get("data", {}))
    with pytest.raises(ValueError, match=message) as error:
        run.change(other, **options)
    assert "\n" not in str(error.value)
    # Of text that was not read yet nothing has to be carried over.
    run.change(dataclasses.replace(other, sources=config(folder, "cd").sources), **options) if (
        "text_key" not in str(change)
    ) else None


def test_unshuffled_text_has_no_seed(folder, byte_tokenizer):
    cfg = config(folder, shuffle=False)
    run = Run(byte_tokenizer)
    run.change(cfg)
    run.read(5)
    run.change(dataclasses.replace(cfg, seed=5), seed=1)
    run.read(5)
    assert run.rows == alone(cfg, byte_tokenizer, 40)


def test_changed_text_is_refused_under_its_old_name_and_new_under_another(folder, byte_tokenizer):
    run = Run(byte_tokenizer)
    run.change(config(folder))
    run.read(5)
    text = (folder / "a.jsonl").read_text()
    (folder / "a.jsonl").write_text(text.replace("a1.01", "other text"))
    message = r"data\.sources='jsonl:.*a\.jsonl': its text changed since 10 sequences of it were"
    with pytest.raises(ValueError, match=message):
        run.change(config(folder))
    (folder / "e.jsonl").write_text((folder / "a.jsonl").read_text())
    run.change(config(folder, "eb"))
    assert [reading.first for reading in run.place.readings] == [0, 10]
    assert [reading.order for reading in run.place.readings] == [2, 1]


def test_rows_left_out_ahead_bind_the_mixture(folder, byte_tokenizer):
    run = Run(byte_tokenizer)
    run.change(config(folder))
    run.read(5)
    with pytest.raises(ValueError, match=r"data\.sources=.*sequences 24 to 31 are skipped"):
        run.change(config(folder, weights=(1.0, 2.0)), jumps=[(24, 32)])
    run.change(config(folder, weights=(1.0, 2.0)), jumps=[(4, 8)])


def test_a_checkpoint_of_an_earlier_version_names_its_place_by_its_settings(folder, byte_tokenizer):
    cfg = config(folder, weights=(1.0, 3.0))
    config_then = {"seq_len": LENGTH, "seed": SEED, "data": dataclasses.asdict(cfg)}
    old = DataPosition.of(20, None, json.loads(json.dumps(config_then)))
    new = position_of(cfg, byte_tokenizer, length=LENGTH, seed=SEED)
    assert resume_position(old, new) == dataclasses.replace(new, row=20)
    other = dataclasses.replace(cfg, weights=(1.0, 1.0))
    carried = resume_position(old, position_of(other, byte_tokenizer, length=LENGTH, seed=SEED))
    assert [reading.first for reading in carried.readings] == [5, 15]
    with pytest.raises(ValueError, match=r"seq_len=32: 5 sequences"):
        resume_position(old, position_of(cfg, byte_tokenizer, length=32, seed=SEED))
