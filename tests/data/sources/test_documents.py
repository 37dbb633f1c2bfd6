"""Sources of text: what they read, in which order, from any start; and every bad input."""

import gzip
import json
import os

import pyarrow
import pytest
from pyarrow import parquet

from mor_jax.data.sources.documents import open_documents


def test_stdlib_is_python_source_in_a_fixed_order():
    source = open_documents("stdlib")
    first = [text for text, _ in zip(source.read(0), range(40), strict=False)]
    again = [text for text, _ in zip(source.read(10), range(30), strict=False)]
    assert first[10:] == again
    assert sum("import" in text for text in first) > 10
    assert source.identity == open_documents("stdlib").identity


def test_text_files_are_documents_in_order_of_their_names(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.txt").write_text("first é")
    (tmp_path / "deep" / "c.txt").write_text("third")
    source = open_documents(f"text:{tmp_path}/**/*.txt")
    assert list(source.read(0)) == ["first é", "second", "third"]
    assert list(source.read(2)) == ["third"]


def test_identity_follows_names_and_sizes_not_the_folder(tmp_path):
    for name, text in (("one", "aa"), ("two", "aa"), ("three", "aaa")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.txt").write_text(text)
    one, two, three = (
        open_documents(f"text:{tmp_path}/{name}/*.txt").identity for name in ("one", "two", "three")
    )
    assert one == two != three


def test_jsonl_reads_plain_and_compressed_from_any_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "one"}\n\n{"body": null}\n{"body": "t\\u00e9n"}\n')
    with gzip.open(tmp_path / "b.jsonl.gz", "wb") as stream:
        stream.write(json.dumps({"body": "half \ud800 pair"}).encode())
    source = open_documents(f"jsonl:{tmp_path}/*", text_key="body")
    expected = ["one", "", "", "tén", "half \ufffd pair"]
    assert list(source.read(0)) == expected
    for start in range(6):
        assert list(source.read(start)) == expected[start:]


def test_parquet_reads_from_any_row(tmp_path):
    for name in ("a", "b"):
        column = [f"{name}{i}" if i != 3 else None for i in range(7)]
        table = pyarrow.table({"text": column, "n": list(range(7))})
        parquet.write_table(table, tmp_path / f"{name}.parquet", row_group_size=3)
    source = open_documents(f"parquet:{tmp_path}/*.parquet")
    everything = list(source.read(0))
    assert len(everything) == 14 and everything[3] == "" and everything[13] == "b6"
    for start in range(15):
        assert list(source.read(start)) == everything[start:]


def test_unknown_source_and_missing_files(tmp_path):
    with pytest.raises(ValueError, match=r"data\.sources\[1\]='a\.txt': unknown source.*text:a"):
        open_documents("a.txt", setting="data.sources[1]")
    with pytest.raises(ValueError, match=r"matches no file"):
        open_documents(f"text:{tmp_path}/*.nothing")
    with pytest.raises(ValueError, match=r"is a directory.*\*\*"):
        open_documents(f"text:{tmp_path}")
    with pytest.raises(ValueError, match=r"'stdlib:3': takes no argument"):
        open_documents("stdlib:3")


def test_invalid_utf8_is_named_with_its_place(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"abc\xff")
    with pytest.raises(ValueError, match=r"bad\.txt'?: is not UTF-8: byte 0xff at offset 3.*iconv"):
        list(open_documents(f"text:{tmp_path}/bad.txt").read(0))


def test_binary_and_unreadable_files(tmp_path):
    (tmp_path / "nul.txt").write_bytes(b"ab\0c")
    with pytest.raises(ValueError, match="NUL character at offset 2"):
        list(open_documents(f"text:{tmp_path}/nul.txt").read(0))
    source = open_documents(f"text:{tmp_path}/nul.txt")
    os.remove(tmp_path / "nul.txt")
    with pytest.raises(ValueError, match="cannot be read"):
        list(source.read(0))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', r"f\.jsonl:2'?: is not one JSON value"),
        ("[1, 2]", r"f\.jsonl:2'?: must be an object, not list"),
        ('{"body": "a"}', r"data\.text_key='text': .*f\.jsonl:2 has no such field.*'body'"),
        ('{"text": 5}', r"data\.text_key='text': holds int in .*f\.jsonl:2"),
    ],
)
def test_bad_lines(tmp_path, line, message):
    (tmp_path / "f.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        list(open_documents(f"jsonl:{tmp_path}/f.jsonl").read(0))


def test_truncated_gzip(tmp_path):
    path = tmp_path / "f.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n' * 50)[:-12])
    with pytest.raises(ValueError, match=r"f\.jsonl\.gz.*cannot be read"):
        list(open_documents(f"jsonl:{path}").read(0))


def test_bad_parquet(tmp_path):
    (tmp_path / "no.parquet").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is not a parquet file"):
        list(open_documents(f"parquet:{tmp_path}/no.parquet").read(0))
    parquet.write_table(pyarrow.table({"body": ["a"]}), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match=r"data\.text_key='text'.*no such field, only \['body'\]"):
        list(open_documents(f"parquet:{tmp_path}/other.parquet").read(0))


def test_damaged_parquet_names_the_place(tmp_path):
    path = tmp_path / "f.parquet"
    texts = [os.urandom(30).hex() for _ in range(2000)]
    parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=1000)
    whole = path.read_bytes()
    for start in (4, len(whole) // 4, 3 * len(whole) // 4):
        path.write_bytes(whole[:start] + bytes(90) + whole[start + 90 :])
        with pytest.raises(ValueError, match=r"f\.parquet, group [01]': cannot be read") as refused:
            list(open_documents(f"parquet:{path}").read(0))
        assert "\n" not in str(refused.value)
    path.write_bytes(gzip.compress(whole))
    with pytest.raises(ValueError, match=r"f\.parquet': is compressed with gzip as a whole"):
        list(open_documents(f"parquet:{path}").read(0))
    path.unlink()
    (tmp_path / "gone.parquet").write_bytes(whole)
    source = open_documents(f"parquet:{tmp_path}/gone.parquet")
    (tmp_path / "gone.parquet").unlink()
    with pytest.raises(ValueError, match=r"gone\.parquet': cannot be read \(No such file"):
        list(source.read(0))
