"""Datasets of Hugging Face's library, as it saves them, and what the hub answers."""

import sys

import datasets
import pytest
from support.sample_texts import words

from mor_jax.config import DataConfig
from mor_jax.data import open_streams
from mor_jax.data.sources.documents import open_documents

COUNT = 25
TEXTS = [words(i) for i in range(COUNT)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory with `one`, a dataset in two files, and `two`, of splits train and test."""
    folder = tmp_path_factory.mktemp("hf")
    one = datasets.Dataset.from_dict({"text": TEXTS, "n": list(range(COUNT))})
    one.save_to_disk(folder / "one", num_shards=2)
    nothing = {"text": ["a\0b", None], "n": [1, 2]}
    test = datasets.Dataset.from_dict(nothing, features=one.features)
    datasets.DatasetDict(train=one.shuffle(seed=3), test=test).save_to_disk(folder / "two")
    return folder


def read(spec, start=0):
    return list(open_documents(spec).read(start))


def test_one_dataset_from_any_row(saved, monkeypatch):
    monkeypatch.setattr("mor_jax.data.sources.hf._ROWS", 7)
    for start in (0, 1, 7, 20, COUNT, COUNT + 1):
        assert read(f"hf:{saved}/one", start) == TEXTS[start:]
        assert read(f"hf:{saved}/one:train[5:]+train[:5]", start) == (TEXTS[5:] + TEXTS[:5])[start:]
    assert read(f"hf:{saved}/one:train[:20%]") == TEXTS[:5]


def test_splits_and_what_is_left_out(saved, caplog):
    train = read(f"hf:{saved}/two")
    assert sorted(train) == sorted(TEXTS) and train != TEXTS
    assert read(f"hf:{saved}/two:train[3:9]") == train[3:9]
    assert not caplog.messages
    assert read(f"hf:{saved}/two:test") == ["ab", ""]
    assert read(f"hf:{saved}/two:train+test") == [*train, "ab", ""]
    assert [f"two:test, row {i}" in line for i, line in enumerate(caplog.messages[:2])] == [
        True
    ] * 2
    assert f"two:train+test, row {COUNT}" in caplog.messages[2]


def test_identity_and_size_follow_the_rows_not_the_folder(saved, tmp_path, byte_tokenizer):
    one = open_documents(f"hf:{saved}/one")
    (tmp_path / "a:b").symlink_to(saved / "one")
    moved = open_documents(f"hf:{tmp_path}/a:b")
    assert one.identity == moved.identity and one.size == moved.size > sum(map(len, TEXTS))
    part = open_documents(f"hf:{saved}/one:train[:9]")
    assert part.identity != one.identity
    cfg = DataConfig(sources=(f"hf:{saved}/one",), validation_fraction=0.2)
    sides = [open_streams(cfg, byte_tokenizer, split)[0] for split in ("train", "heldout")]
    assert sum(map(len, sides)) == sum(len(text) + 1 for text in TEXTS)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{}/two:nosuch", r"has no split 'nosuch' .*Choose one of \['test', 'train'\]"),
        ("{}/one:test", r"has no split 'test' .*Choose one of \['train'\]"),
        ("{}/one:train[90:]", r"split 'train\[90:\]' has no rows"),
        ("{}/one:train[x]", r"has no split 'train\[x\]'"),
        ("{}/one:config:train", "a directory has no configuration"),
        ("{}", "was not written by save_to_disk"),
        ("{}/absent", "absent is neither a directory"),
        ("", "is not the name of a dataset"),
        ("gs://bucket/x", "is not the name of a dataset"),
        ("a:b:c:d", "is not the name of a dataset"),
    ],
)
def test_bad_names(saved, spec, message):
    with pytest.raises(ValueError, match=rf"data\.sources='hf:.*{message}"):
        open_documents(f"hf:{spec.format(saved)}")


def test_bad_columns(saved):
    with pytest.raises(ValueError, match=r"data\.text_key='body': .*only \['n', 'text'\]"):
        open_documents(f"hf:{saved}/one", text_key="body")
    with pytest.raises(ValueError, match=r"data\.text_key='n': holds int in .*one, row 0"):
        list(open_documents(f"hf:{saved}/one", text_key="n").read(0))


@pytest.mark.parametrize("damage", ["cut", "lost", "state", "info"])
def test_damaged_directories(tmp_path, damage):
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "d")
    [arrow] = (tmp_path / "d").glob("*.arrow")
    if damage == "cut":
        arrow.write_bytes(arrow.read_bytes()[:300])
    elif damage == "lost":
        arrow.unlink()
    else:
        (tmp_path / "d" / {"state": "state.json", "info": "dataset_info.json"}[damage]).write_text(
            "{"
        )
    with pytest.raises(
        ValueError, match=rf"='hf:{tmp_path}/d': cannot be loaded \(.*Copy it again"
    ):
        open_documents(f"hf:{tmp_path}/d")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConnectionError("no\nway"), r"hub cannot be reached \(no way\).*save_to_disk"),
        (datasets.exceptions.DatasetNotFoundError("absent"), r"loaded from the hub \(absent\)"),
        (
            ValueError("Config name is missing.\nPick one"),
            r"missing\. Pick one\).*NAME:CONFIG:SPLIT",
        ),
        (RuntimeError("scripts are no longer supported"), "scripts are no longer"),
    ],
)
def test_what_the_hub_answers_is_one_line(monkeypatch, error, message):
    asked = []

    def load(*arguments):
        asked.append(arguments)
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load)
    for spec in ("owner/name", "owner/name:test[:3]", "owner/name:part:test"):
        with pytest.raises(ValueError, match=message) as refused:
            open_documents(f"hf:{spec}")
        assert "\n" not in str(refused.value)
    assert asked == [("owner/name", None), ("owner/name", None), ("owner/name", "part")]


def test_a_name_on_the_hub(monkeypatch, saved):
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_: datasets.load_from_disk(str(saved / "two"))
    )
    assert read("hf:owner/name:test") == ["ab", ""]


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"data\.sources='hf:x'.*missing.*pip install datasets"):
        open_documents("hf:x")
