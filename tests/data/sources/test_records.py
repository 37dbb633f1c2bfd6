"""What is no plain UTF-8: marks, other encodings, NUL, surrogates, empty documents."""

import codecs
import gzip
import io
import json
import lzma
import tarfile
import zipfile

import pyarrow
import pytest
from pyarrow import parquet

from mor_jax.cli import prepare_data
from mor_jax.config import DataConfig
from mor_jax.data import open_streams
from mor_jax.data.sources.documents import open_documents

FINE = [f"a document, the {i}th" for i in range(20)]


def write_jsonl(path, *lines):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in FINE) + "\n".join(lines))
    return f"jsonl:{path}"


def read(spec):
    return list(open_documents(spec).read(0))


def test_byte_order_marks_are_no_text(tmp_path, caplog):
    path = tmp_path / "f.jsonl"
    write_jsonl(path)
    one = codecs.BOM_UTF8 + path.read_bytes()
    # As `cat` joins two files; and inside a compressed one.
    path.write_bytes(one + one)
    assert read(f"jsonl:{path}") == FINE * 2
    path.write_bytes(gzip.compress(one))
    assert read(f"jsonl:{path}") == FINE
    path.write_bytes(codecs.BOM_UTF8 + b"\n" + codecs.BOM_UTF8)
    assert read(f"jsonl:{path}") == ["", ""]
    path.write_bytes(codecs.BOM_UTF8 + "first \ufeff last".encode())
    assert read(f"text:{path}") == ["first \ufeff last"]
    assert not caplog.messages


@pytest.mark.parametrize(
    ("encoding", "name"),
    [
        ("utf-16", "UTF-16"),
        ("utf-16-le", "UTF-16LE"),
        ("utf-16-be", "UTF-16BE"),
        ("utf-32", "UTF-32"),
    ],
)
def test_wide_encodings_are_named(tmp_path, encoding, name):
    path = tmp_path / "f.jsonl"
    path.write_bytes('{"text": "a line of words"}\n'.encode(encoding))
    for kind, line in (("jsonl", ":1"), ("text", "")):
        message = rf"f\.jsonl{line}': is {name}, not UTF-8\. Convert it: iconv -f {name} -t UTF-8"
        with pytest.raises(ValueError, match=message):
            read(f"{kind}:{path}")


def test_latin1_is_still_told_as_such(tmp_path):
    (tmp_path / "f.txt").write_bytes("a naïve line".encode("latin1"))
    with pytest.raises(ValueError, match=r"f\.txt': is not UTF-8: byte 0xef at .*iconv -f latin1"):
        read(f"text:{tmp_path}/f.txt")


def test_other_kinds_of_files_are_named(tmp_path):
    path = tmp_path / "f.jsonl"
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("inner.jsonl"))
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("inner.jsonl", "{}")
    table = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": FINE}), table)
    for contents, message in (
        (packed.getvalue(), "is a tar archive"),
        (gzip.compress(packed.getvalue()), "is a tar archive"),
        (zipped.getvalue(), "is a zip archive"),
        (table.getvalue(), r"is parquet, not text\. Read it with 'parquet:"),
        (b"\x04\x22\x4d\x18" + bytes(9), "is compressed with lz4"),
        (lzma.compress(b"text", format=lzma.FORMAT_ALONE), "is in the legacy \\.lzma format"),
    ):
        path.write_bytes(contents)
        for kind in ("jsonl", "text"):
            with pytest.raises(ValueError, match=message):
                read(f"{kind}:{path}")


@pytest.mark.parametrize("text", ["PAR1S est une ville é", "ARROW1 points up", "%PDF-like", "7z"])
def test_texts_may_begin_with_the_letters_of_a_mark(tmp_path, text):
    (tmp_path / "f.txt").write_text(text)
    assert read(f"text:{tmp_path}/f.txt") == [text]


def test_empty_documents_are_counted_and_said_once(tmp_path, caplog, byte_tokenizer):
    spec = write_jsonl(tmp_path / "f.jsonl", '{"text": null}', "", '{"text": ""}', "")
    cfg = DataConfig(sources=(spec,), validation_fraction=0.2)
    for split in ("train", "heldout", "train"):
        open_streams(cfg, byte_tokenizer, split)
    [said] = caplog.messages
    assert said.startswith(f"data.sources[0]={spec!r}: documents without text (empty or null)")
    assert said.endswith(f": 2. The first is {tmp_path}/f.jsonl:21")


def test_empty_rows_and_files_are_counted(tmp_path, caplog):
    table = pyarrow.table({"text": ["one", None, "", "two", None]})
    parquet.write_table(table, tmp_path / "f.parquet", row_group_size=3)
    assert read(f"parquet:{tmp_path}/f.parquet") == ["one", "", "", "two", ""]
    for name, text in (("a.txt", "text"), ("b.txt", ""), ("c.txt", "\ufeff")):
        (tmp_path / name).write_text(text)
    assert read(f"text:{tmp_path}/*.txt") == ["text", "", ""]
    in_parquet, in_text = caplog.messages
    assert in_parquet.endswith(f"skipped: 3. The first is {tmp_path}/f.parquet, row 1 of group 0")
    assert in_text.endswith(f"skipped: 2. The first is {tmp_path}/b.txt")


def test_nul_is_left_out_everywhere_and_said(tmp_path, caplog):
    """One rule for every source and tokenizer: no text holds NUL."""
    spec = write_jsonl(tmp_path / "f.jsonl", r'{"text": "a\u0000b\u0000"}', r'{"text": "\u0000c"}')
    assert read(spec) == [*FINE, "ab", "c"]
    parquet.write_table(pyarrow.table({"text": ["a\0b"]}), tmp_path / "f.parquet")
    assert read(f"parquet:{tmp_path}/f.parquet") == ["ab"]
    (tmp_path / "f.txt").write_text("slip\0 " + "word " * 50)
    assert read(f"text:{tmp_path}/f.txt") == ["slip " + "word " * 50]
    in_jsonl, in_parquet, in_text = caplog.messages
    assert f": 3 (documents: 2). The first is {tmp_path}/f.jsonl:21" in in_jsonl
    assert f": 1 (documents: 1). The first is {tmp_path}/f.parquet, row 0" in in_parquet
    assert f": 1 (documents: 1). The first is {tmp_path}/f.txt" in in_text


def test_half_surrogate_pairs_are_counted(tmp_path, caplog):
    lines = (r'{"text": "\ud83d\ude00 \ud800 \udc00 x"}', r'{"text": "é \ud800"}')
    spec = write_jsonl(tmp_path / "f.jsonl", *lines)
    assert read(spec) == [*FINE, "😀 \ufffd \ufffd x", "é \ufffd"]
    [said] = caplog.messages
    assert "unpaired surrogates, replaced by U+FFFD: 3 (documents: 2). The first is" in said
    assert said.endswith("f.jsonl:21")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a", "n": ' + "9" * 5000 + "}", "contains a number that cannot be read .*4300"),
        ('{"text": "a", "n": ' + "[" * 100_000 + "]" * 100_000 + "}", "nests brackets too deeply"),
        ("[" * 100_000, "nests brackets too deeply"),
        ('{"text": "a",', r"is not one JSON value.*jq -c \. FILE"),
        ('[{"text": "a"},', r"is not one JSON value.*jq -c '\.\[\]' FILE"),
        ('{"text": "a"}\r{"text": "b"}', r"is not one JSON value.*End lines with a line feed"),
        ("readme", "is not one JSON value.*exclude files that are not JSONL from the pattern"),
        ('{"text": "\x01"}', "is not one JSON value .Invalid control character"),
    ],
)
def test_lines_that_cannot_be_read(tmp_path, line, message):
    spec = write_jsonl(tmp_path / "f.jsonl", line, '{"text": "more"}', "")
    with pytest.raises(ValueError, match=rf"line='.*f\.jsonl:21': {message}"):
        read(spec)


def test_a_last_line_that_was_cut(tmp_path):
    spec = write_jsonl(tmp_path / "f.jsonl", '{"text": "a')
    with pytest.raises(ValueError, match=r"f\.jsonl:21'.*the file may be cut short"):
        read(spec)


def test_a_preparation_says_it_too_and_refuses_in_one_line(tmp_path, capsys, caplog):
    spec = write_jsonl(tmp_path / "f.jsonl", '{"text": null}', "")
    arguments = [f"--source={spec}", "--validation-fraction=0.2", "--train-bpe=300"]
    assert prepare_data.main([*arguments, f"--output={tmp_path}/out"]) == 0
    assert [line.endswith("f.jsonl:21") for line in caplog.messages] == [True]
    capsys.readouterr()
    spec = write_jsonl(tmp_path / "f.jsonl", "[" * 100_000)
    assert prepare_data.main([f"--source={spec}", f"--output={tmp_path}/other"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "f.jsonl:21': nests brackets" in line
    for output in ("gs://bucket/out", "s3://bucket/out"):
        assert prepare_data.main([f"--source={spec}", f"--output={output}"]) == 2
        assert "--output=" in capsys.readouterr().err
