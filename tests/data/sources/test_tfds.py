"""TensorFlow Datasets without TensorFlow: by directory and by name, ArrayRecord and TFRecord."""

import json
import re
import struct
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource
from support.sample_texts import words

from mor_jax.config import DataConfig
from mor_jax.data import open_streams
from mor_jax.data.sources.documents import open_documents
from mor_jax.data.sources.tfds import _masked_crc, read_tfrecord

COUNT = 30


class TinyText(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"text": tfds.features.Text(), "label": np.int64}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, manager):
        return {"train": self._generate(0, COUNT), "test": self._generate(100, 4)}

    def _generate(self, first, count):
        for i in range(first, first + count):
            yield i, {"text": words(i), "label": i}

    _generate_examples = _generate


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Directory of a dataset as TFDS itself prepares it, in ArrayRecord."""
    folder = tmp_path_factory.mktemp("tfds")
    builder = TinyText(data_dir=folder, file_format="array_record")
    builder.download_and_prepare()
    return folder / "tiny_text" / "1.0.0"


@pytest.fixture(scope="module")
def tfrecord(prepared, tmp_path_factory):
    """The same examples in TFRecord files, two for `train`."""
    folder = tmp_path_factory.mktemp("tfrecord")
    info = json.loads((prepared / "dataset_info.json").read_text())
    info["fileFormat"] = "tfrecord"
    for split in info["splits"]:
        [path] = prepared.glob(f"*-{split['name']}.array_record-*")
        examples = list(ArrayRecordDataSource([path]))
        counts = [13, COUNT - 13] if split["name"] == "train" else [len(examples)]
        split["shardLengths"] = [str(count) for count in counts]
        for number, count in enumerate(counts):
            name = f"tiny_text-{split['name']}.tfrecord-{number:05d}-of-{len(counts):05d}"
            write_tfrecord(folder / name, examples[:count])
            examples = examples[count:]
    (folder / "dataset_info.json").write_text(json.dumps(info))
    (folder / "features.json").write_bytes((prepared / "features.json").read_bytes())
    return folder


def write_tfrecord(path, records):
    with path.open("wb") as stream:
        for record in records:
            size = struct.pack("<Q", len(record))
            stream.write(size + struct.pack("<I", _masked_crc(size)))
            stream.write(record + struct.pack("<I", _masked_crc(record)))


@pytest.mark.parametrize("kind", ["prepared", "tfrecord"])
def test_reads_every_example_from_any_start(kind, request):
    folder = request.getfixturevalue(kind)
    source = open_documents(f"tfds:{folder}")
    everything = list(source.read(0))
    assert sorted(everything) == sorted(words(i) for i in range(COUNT))
    for start in (0, 1, 12, 13, 14, COUNT - 1, COUNT):
        assert list(source.read(start)) == everything[start:]
    assert list(open_documents(f"tfds:{folder}:train[10:20]").read(3)) == everything[13:20]
    test = list(open_documents(f"tfds:{folder}:test").read(0))
    assert sorted(test) == sorted(words(i) for i in range(100, 104))


def test_formats_agree_and_tensorflow_is_not_needed(prepared, tfrecord, byte_tokenizer):
    streams = [
        open_streams(
            DataConfig(sources=(f"tfds:{folder}",), validation_fraction=0.2),
            byte_tokenizer,
            "train",
        )[0]
        for folder in (prepared, tfrecord)
    ]
    np.testing.assert_array_equal(streams[0].tokens, streams[1].tokens)
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize("name", ["tiny_text", "tiny_text:1.0.0:train"])
def test_by_name(prepared, name):
    tfds.core.add_data_dir(prepared.parents[1])
    source = open_documents(f"tfds:{name}")
    assert sorted(source.read(0)) == sorted(words(i) for i in range(COUNT))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("tfds:{}:nothing", r"has no split 'nothing'.*\['test', 'train'\]"),
        ("tfds:{}/..", "is not a prepared dataset: it has no dataset_info"),
        ("tfds:no_such_dataset_at_all", "neither a dataset that TFDS knows nor a directory"),
        ("tfds:", "is not the name of a dataset"),
        ("tfds:imdb_reviews:9.9.9:train", "cannot be opened .*9.9.9, only: 1.0.0"),
        ("tfds:imdb_reviews/nosuch:train", "cannot be opened .*nosuch"),
    ],
)
def test_bad_names(prepared, spec, message):
    with pytest.raises(ValueError, match=rf"data\.sources='tfds:.*{message}"):
        open_documents(spec.format(prepared))


@pytest.mark.parametrize("split", ["nosuch", "test+nosuch[:3]"])
def test_a_split_that_is_not_there_is_told_before_preparing(tmp_path, monkeypatch, split):
    monkeypatch.setattr(tfds, "builder", lambda name: TinyText(data_dir=tmp_path))
    message = rf"has no split '{re.escape(split)}'. Choose one of \['test', 'train'\]"
    with pytest.raises(ValueError, match=message):
        open_documents(f"tfds:tiny_text:{split}")
    assert not list(tmp_path.iterdir())
    source = open_documents("tfds:tiny_text:test[1:]")
    assert len(list(source.read(0))) == 3


class NeedsFiles(TinyText, skip_registration=True):
    def _split_generators(self, manager):
        import tensorflow

        return {"train": tensorflow.io.gfile.glob(manager.download("x"))}


def test_a_split_that_cannot_be_known_is_named_beside_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    monkeypatch.setattr(tfds, "builder", lambda name: NeedsFiles(data_dir=tmp_path))
    message = "it may have no split 'nosuch'.*a package that is missing.*pip install tensorflow,"
    with pytest.raises(ValueError, match=message):
        open_documents("tfds:tiny_text:nosuch")


def test_bad_features(prepared):
    with pytest.raises(ValueError, match=r"data\.text_key='body': .*only \['label', 'text'\]"):
        open_documents(f"tfds:{prepared}", text_key="body")
    with pytest.raises(ValueError, match=r"data\.text_key='label': holds int"):
        list(open_documents(f"tfds:{prepared}", text_key="label").read(0))


def test_unreadable_file_format(prepared, tmp_path):
    info = json.loads((prepared / "dataset_info.json").read_text()) | {"fileFormat": "riegeli"}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    (tmp_path / "features.json").write_bytes((prepared / "features.json").read_bytes())
    with pytest.raises(ValueError, match=r"files are riegeli.*file_format='array_record'"):
        open_documents(f"tfds:{tmp_path}")


def test_tfrecord_checksums(tmp_path):
    def unmasked(crc):
        rotated = (crc - 0xA282EAD8) & 0xFFFFFFFF
        return ((rotated >> 17) | (rotated << 15)) & 0xFFFFFFFF

    # the check value of CRC-32C
    assert unmasked(_masked_crc(b"123456789")) == 0xE3069283
    path = tmp_path / "x.tfrecord"
    write_tfrecord(path, [b"one", b"twotwo"])
    assert list(read_tfrecord(path, 2)) == [b"one", b"twotwo"]
    whole = path.read_bytes()
    for broken in (whole[:-1], whole[:-15], b"\1" + whole[1:], whole + whole[:3]):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"x\.tfrecord'?: record \d of 3 is damaged"):
            list(read_tfrecord(path, 3))


@pytest.mark.parametrize(
    ("module", "source"),
    [("tensorflow_datasets", "tfds:x"), ("pyarrow", f"parquet:{__file__}")],
)
def test_missing_package_is_named(module, source, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    package = module.replace("_", "-")
    with pytest.raises(ValueError, match=f"data.sources=.*missing.*pip install {package}"):
        open_documents(source)
